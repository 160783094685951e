"""Training from Python: what the command line does, as a function."""
