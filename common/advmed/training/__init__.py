"""A method in the course of a training: its settings, and the run around its steps."""
