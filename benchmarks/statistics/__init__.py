"""`largebatch bench statistics`: how often the intervals of a study cover, by simulation."""
