"""What is measured of a network's features."""
