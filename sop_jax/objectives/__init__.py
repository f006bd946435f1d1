"""Training objectives: their interface, what they share, and a folder for each of them."""
