"""Partial collapse of prototypes: how many differ, how they share the data, and figures of it."""
