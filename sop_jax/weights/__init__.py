"""Weights of other projects: reads their files, and translates names both ways by tables.

Nothing here depends on the networks: arrays have names, and trees have paths.
"""
