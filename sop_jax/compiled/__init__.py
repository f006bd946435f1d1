"""Compiled programs: where they are kept and what they cost."""
