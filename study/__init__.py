"""Reads run records and turns them into curves, critical batch sizes, figures and a report."""
