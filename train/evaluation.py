"""When to evaluate, and the evaluation: the loss, and the task's metrics."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from largebatch.distributed.ranks import Ranks
from largebatch.train.engines.base import Engine
from largebatch.train.progress import Evaluated
from largebatch.train.tasks import Task
from largebatch.train.tasks.metrics import MetricSums

_MOST_AT_ONCE = 4096


@dataclass
class EvaluationGrid:
    """After steps 1, 2, 3, …, each at least `growth` times as far: a resolution of growth - 1."""

    growth: float
    due_at: int = 1

    def is_due(self, step: int) -> bool:
        """Whether to evaluate after this step."""
        return step >= self.due_at

    def advance(self, step: int) -> None:
        """Note that the run was evaluated after this step."""
        self.due_at = max(step + 1, math.ceil(step * self.growth))


@dataclass
class Evaluation:
    """What a loop evaluates with.

    Attributes:
        find: the evaluation now, the same on every rank.
        within: evaluate only while the running training loss is at most so far above the target;
            None: wherever the grid says.
    """

    find: Callable[[], Evaluated]
    grid: EvaluationGrid
    within: float | None = None

    def is_near(self, running_loss: float | None, target: float | None) -> bool:
        """Whether an evaluation could find the target reached."""
        if self.within is None or running_loss is None or target is None:
            return True
        return running_loss <= target + self.within


@torch.no_grad()
def evaluate(task: Task, engine: Engine, ranks: Ranks, most: int | None = None) -> Evaluated:
    """The mean loss over the evaluation set and the task's metrics, each rank taking its share; the
    same on all ranks.

    Every rank makes the same number of forward passes, on samples of no weight where it has no
    more: a sharded model gathers its weights in each.

    Args:
        most: samples in a forward pass.
    """
    engine.model.eval()
    share = math.ceil(task.num_eval / ranks.size)
    begin, end = share * ranks.rank, min(share * (ranks.rank + 1), task.num_eval)
    most = min(most or _MOST_AT_ONCE, _MOST_AT_ONCE)
    total, metrics = torch.zeros((), device=engine.device), MetricSums(engine.device)
    for start in range(begin, begin + share, most):
        chunk = np.arange(start, min(start + most, end), dtype=np.int64)
        batch = task.eval_batch(chunk if len(chunk) else np.zeros(1, np.int64))
        loss, found = engine.evaluate(task, batch)
        total += loss * len(chunk)
        metrics.add(found, counts=len(chunk) > 0)
    if ranks.size > 1:
        dist.all_reduce(total)
    engine.model.train()
    return Evaluated(float(total) / task.num_eval, metrics.means(ranks.size))
