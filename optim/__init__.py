"""Layer-wise optimizers for very large batches, as plain `torch.optim.Optimizer` subclasses."""

from largebatch.optim.lamb import LAMB
from largebatch.optim.lars import LARS
from largebatch.optim.param_groups import param_groups

__all__ = ["LAMB", "LARS", "param_groups"]
