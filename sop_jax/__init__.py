"""Self-Organizing Visual Prototypes: self-supervised pretraining of vision transformers in JAX."""

__version__ = "0.3.0"
