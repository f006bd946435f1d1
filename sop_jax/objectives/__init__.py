"""Training objectives, a folder each."""
