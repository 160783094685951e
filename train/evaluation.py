"""When to evaluate, and the evaluation loss."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from largebatch.train.engines import Engine
from largebatch.train.ranks import Ranks
from largebatch.train.tasks import Task, to_device

_MOST_AT_ONCE = 4096


@dataclass
class EvaluationGrid:
    """After steps 1, 2, 3, …, each at least `growth` times as far: a resolution of growth - 1."""

    growth: float
    due_at: int = 1

    def is_due(self, step: int) -> bool:
        if step < self.due_at:
            return False
        self.due_at = max(step + 1, math.ceil(step * self.growth))
        return True


@torch.no_grad()
def evaluate(task: Task, engine: Engine, ranks: Ranks, device: torch.device) -> float:
    """The mean loss over the evaluation set, each rank taking its share; the same on all ranks."""
    engine.model.eval()
    indices = np.array_split(np.arange(task.num_eval, dtype=np.int64), ranks.size)[ranks.rank]
    total = torch.zeros((), device=device)
    for start in range(0, len(indices), _MOST_AT_ONCE):
        chunk = indices[start : start + _MOST_AT_ONCE]
        batch = to_device(task.eval_batch(chunk), device)
        total += task.loss(engine.model, batch) * len(chunk)
    if ranks.size > 1:
        dist.all_reduce(total)
    engine.model.train()
    return float(total) / task.num_eval
