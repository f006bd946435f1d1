"""The train step, its state, the optimizer, and what a run needs to save and resume."""
