"""Gradients of parts of a batch, and the gradient noise scale that they give."""
