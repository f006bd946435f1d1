"""What networks see, as arrays: each file computes one kind of picture and draws nothing."""
