"""The commands: what runs them, their options, and those of ``advmed`` itself. Imports nothing heavy."""
