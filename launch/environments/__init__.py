"""`largebatch env`: a Python environment, packed and spread to every node."""
