"""Wrappers that hide layers from LARS and LAMB, seen from inside before they do harm.

DeepSpeed ZeRO puts flat tensors of many layers in the place of an optimizer's parameters; torch's
ZeroRedundancyOptimizer gives it some of a model's. `largebatch.optim.zero.bind` says what they are.
"""

import math
import sys
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

REDUNDANCY = "torch.distributed.optim.zero_redundancy_optimizer"


class Unbound:
    """What an optimizer was given, against what it is asked to step."""

    def __init__(self) -> None:
        self._given: set[torch.Size] = set()
        self._stepped: set[int] = set()

    def give(self, params: Iterable[Tensor]) -> None:
        self._given.update(param.shape for param in params)

    def flats(self, groups: Iterable[dict[str, Any]], bound: Collection[Tensor]) -> list[Tensor]:
        """Tensors of one dimension that nobody gave, where all that were given have made room."""
        params = [param for group in groups for param in group["params"]]
        had_layers = any(len(shape) > 1 for shape in self._given)
        if not had_layers or any(param.dim() != 1 or param in bound for param in params):
            return []
        return [param for param in params if param.shape not in self._given]

    def refuse_flats(self, name: str, flats: Iterable[Tensor]) -> None:
        """Refuse the second step of a flat tensor; DeepSpeed itself makes one as it builds some."""
        for flat in flats:
            if id(flat) in self._stepped:
                raise RuntimeError(
                    f"{name} needs to know which layer an element belongs to, and in the place of "
                    f"the parameters that it was given stands a flat tensor of {flat.numel()} "
                    "elements, as DeepSpeed ZeRO makes them: call "
                    "largebatch.optim.zero.bind(engine) on every rank before the first step."
                )
            self._stepped.add(id(flat))


def refuse_redundancy(optimizer: Any, max_grad_norm: float) -> None:
    """Refuse to clip by the norm of one rank's part of the parameters, where a
    ZeroRedundancyOptimizer, which has the others, calls this step.
    """
    module = sys.modules.get(REDUNDANCY)
    if module is None or max_grad_norm == math.inf:
        return
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        caller = frame.f_locals.get("self")
        if isinstance(caller, module.ZeroRedundancyOptimizer) and caller.optim is optimizer:
            raise RuntimeError(
                f"max_grad_norm={max_grad_norm} bounds the norm of all gradients, and "
                "ZeroRedundancyOptimizer shows each rank a part of the parameters: call "
                "largebatch.optim.zero.bind(optimizer) on every rank before the first step."
            )
