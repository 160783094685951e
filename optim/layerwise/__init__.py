"""The family of LARS and LAMB: one trust ratio for each layer."""
