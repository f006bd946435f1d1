"""Users' own images: what a folder contains, and the settings that suit it."""
