"""What a run records and reports about itself."""
