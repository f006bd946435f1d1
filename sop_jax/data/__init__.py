"""The input pipeline: sources, decoding, multi-crop, masks and batches. Does not import jax."""
