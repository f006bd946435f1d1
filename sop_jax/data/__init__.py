"""The input pipeline: sources, decoding, multi-crop, masks and batches. It never imports jax."""
