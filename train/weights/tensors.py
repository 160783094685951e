"""Copies of weights, which lie as the weights do."""

from collections.abc import Mapping

import torch
from torch import Tensor

from largebatch.optim.sharding.layout import local


def wide_copy(param: Tensor) -> Tensor:
    """A copy in FP32, or in FP64 where the weights are that."""
    return param.detach().to(torch.promote_types(param.dtype, torch.float32), copy=True)


def locals_of(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """What this rank holds of each, to be read and written in place."""
    return [local(tensor.detach()) for tensor in tensors.values()]
