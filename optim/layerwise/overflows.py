"""Second moments that have become infinite, looked for and begun anew."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from largebatch.optim.layerwise.chunks import Chunk
from largebatch.optim.layerwise.step_plan import StepPlan
from largebatch.optim.math.tensors import CPU_STRETCH, Tensors
from largebatch.optim.sharding.layout import Name, local

# Elements that are looked through in every step, at least.
STRETCH = 1 << 16

MOMENTS = ("exp_avg", "exp_avg_sq")


class Overflows:
    """Begins anew where a squared gradient was beyond FP32 and has made v infinite.

    Such an element has not moved, its direction being m / ∞, and would never again: its m and v
    become 0. Parameters take turns, so that looking through v costs little: all of a small model
    are looked at in every step, of a large one a sixteenth.

    Attributes:
        dropped: how many elements of a layer on this rank have begun anew, 0-d.
    """

    def __init__(self) -> None:
        self.dropped: dict[Name, Tensor] = {}
        self._turn = 0

    def restart(
        self, plan: StepPlan, states: Mapping[Tensor, Mapping[str, Any]], skip: Tensor | None
    ) -> None:
        """Look through the chunks whose turn it is; where `skip`, change nothing."""
        turns: list[Chunk] = []
        wanted = max(STRETCH, plan.numel // 16)
        while wanted > 0 and len(turns) < len(plan.chunks):
            turns.append(plan.chunks[self._turn % len(plan.chunks)])
            wanted -= turns[-1].numel
            self._turn += 1
        moments = [
            [chunk.of(local(states[chunk.param][key])) for chunk in turns] for key in MOMENTS
        ]
        if not turns or (plan.on_cpu and below_infinity(moments[1])):
            return
        for chunk, exp_avg, exp_avg_sq in zip(turns, *moments, strict=True):
            lost = exp_avg_sq == math.inf
            if skip is not None:
                lost = lost.logical_and(skip.logical_not().to(lost.device))
            for moment in (exp_avg, exp_avg_sq):
                moment.masked_fill_(lost, 0.0)
            name, count = plan.names[chunk.layer], lost.sum(dtype=torch.float32)
            self.dropped[name] = self.dropped.get(name, 0.0) + count


def below_infinity(tensors: Tensors) -> bool:
    """Say whether every element of tensors on the host is a number below ∞."""
    small = [tensor.reshape(-1) for tensor in tensors if tensor.numel() <= CPU_STRETCH]
    large = [tensor.amax() for tensor in tensors if tensor.numel() > CPU_STRETCH]
    if small:
        large.append(torch.cat(small).amax())
    return all(value < math.inf for value in torch.stack(large).tolist())
