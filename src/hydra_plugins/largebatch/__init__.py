"""Hydra finds its plugins here: thin shims that import no torch."""
