"""The parts specific to SOP: memories, prototypes, soft assignment, health and the objective."""
