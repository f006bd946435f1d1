"""Weights of other projects: their files, and the tables that translate them both ways.

Nothing here knows a network: arrays have names, and trees have paths.
"""
