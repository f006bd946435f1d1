"""Compiled programs: how they are cached, and what they cost in memory, operations and traffic."""
