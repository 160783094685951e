"""`largebatch explain`: why a run stopped or slowed, from what it left behind."""
