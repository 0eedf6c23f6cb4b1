"""The original's other commands, by its flags, done by those of `ds`."""
