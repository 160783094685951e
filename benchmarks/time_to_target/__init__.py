"""Time to a target on N tiles: a study's curve, a step's seconds, and a cost model of sums."""
