"""`largebatch bench collectives`: measured values, models of their cost, advice."""
