"""The train step, its state, the optimizer and the checkpoints."""
