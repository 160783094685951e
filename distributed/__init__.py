"""Ranks and launchers, and what a rank shows of itself; no training."""
