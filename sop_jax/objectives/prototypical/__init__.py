"""The parts that methods with learnt prototypes share, each in a file of its own."""
