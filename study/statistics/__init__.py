"""Fits, intervals and comparisons of steps to a target: numpy on tables, no torch."""
