"""Arithmetic on tensors that several optimizers share; no state, no communication."""
