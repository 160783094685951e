"""`largebatch doctor`: look at a machine, and say what is wrong in findings."""
