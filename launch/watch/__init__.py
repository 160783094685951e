"""`largebatch watch`: end a run that hangs, name the rank, start it again."""
