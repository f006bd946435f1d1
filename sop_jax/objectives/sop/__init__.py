"""What is SOP's own: memories, prototypes, soft assignment, losses, health and their objective."""
