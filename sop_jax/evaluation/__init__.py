"""Evaluations of a network's features."""
