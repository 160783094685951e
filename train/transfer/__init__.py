"""Rates tuned on a smaller model, put onto a larger one, and whether that holds."""
