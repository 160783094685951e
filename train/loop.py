"""The way of a batch. Read `Loop.run` first: one step from plan to record."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from largebatch.schedules import Plan, Point
from largebatch.train.coscaling import CoScaling
from largebatch.train.engines import Engine
from largebatch.train.evaluation import EvaluationGrid
from largebatch.train.interruption import Interruption
from largebatch.train.ranks import Ranks
from largebatch.train.readings import Readings
from largebatch.train.sampler import Sampler
from largebatch.train.tasks import Batch, Task


@dataclass
class Progress:
    """Where a run stands, and how it ended."""

    status: str = "exhausted"
    steps: int = 0
    samples: int = 0
    loss: float | None = None
    eval_loss: float | None = None


@dataclass
class Loop:
    """One training run over a plan.

    Attributes:
        evaluate: the evaluation loss now, the same number on every rank.
        record: takes each complete line; called on every rank, in step order.
        target_loss: the run ends at the first evaluation at or below it.
        record_layers: put each layer's trust ratio into the lines.
        give_up_samples: ends a run without its target earlier than the budget, which schedules see.
    """

    plan: Plan
    task: Task
    engine: Engine
    optimizer: Optimizer
    sampler: Sampler
    ranks: Ranks
    evaluate: Callable[[], float]
    grid: EvaluationGrid
    record: Callable[[dict[str, Any]], None]
    interruption: Interruption
    target_loss: float | None = None
    give_up_samples: int | None = None
    record_layers: bool = False
    progress: Progress = field(default_factory=Progress)
    _readings: Readings = field(default_factory=Readings)
    _coscaling: CoScaling = field(init=False)

    def __post_init__(self) -> None:
        self._coscaling = CoScaling(self.plan, self.optimizer)

    def run(self) -> Progress:
        """Step until the target, the budget, an interruption or a non-finite number."""
        for point in self.plan:
            batch = self.take(point)
            loss = self.engine.forward_backward(self.task, batch, point.batch_size)
            grad_norm = get_total_norm(self.gradients())
            change = self._coscaling.take_up(point)
            self.update(point.lr)
            before = self.send_off(point, loss, grad_norm)
            self._readings.annotate(**change)
            self.advance(point)
            if self.ends_with(before) or self.evaluation_ends_it():
                break
        self.ends_with(self._readings.flush())
        return self.progress

    def take(self, point: Point) -> Batch:
        """This rank's share of the global batch."""
        share = point.batch_size // self.engine.data_parallel_size
        start = point.samples + self.ranks.rank * share
        return self.task.train_batch(self.sampler.take(start, share))

    def gradients(self) -> Iterable[Tensor]:
        groups = self.optimizer.param_groups
        return [p.grad for group in groups for p in group["params"] if p.grad is not None]

    def update(self, lr: float) -> None:
        """One optimizer step at learning rate `lr`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def send_off(self, point: Point, loss: Tensor, grad_norm: Tensor) -> dict[str, Any] | None:
        """Pack the step's numbers for the host; returns the line of the step before."""
        interrupted = torch.full_like(loss, float(self.interruption.signal is not None))
        numbers = {"loss": loss, "interrupted": interrupted, "grad_norm": grad_norm}
        numbers |= trust_ratios(self.optimizer, self.record_layers)
        packed = torch.stack(list(numbers.values()))
        work = self.engine.sum_over_ranks(packed[:2])  # the loss's parts and the interruptions
        micro = self.engine.micro_batch_size(point.batch_size)
        ranks = self.engine.data_parallel_size
        line = {
            "step": self.progress.steps + 1,
            "samples": point.samples + point.batch_size,
            "lr": point.lr,
            "global_batch_size": point.batch_size,
            "micro_batch_size": micro,
            "gradient_accumulation_steps": math.ceil(point.batch_size / (ranks * micro)),
            "data_parallel_size": ranks,
        }
        return self._readings.push(line, tuple(numbers), packed, work)

    def advance(self, point: Point) -> None:
        self.progress.steps += 1
        self.progress.samples = point.samples + point.batch_size

    def ends_with(self, line: dict[str, Any] | None) -> bool:
        """Record a complete line; True where it ends the run."""
        if line is None:
            return False
        interrupted = line.pop("interrupted") > 0
        self.progress.loss = line["loss"]
        self.record(line)
        if not (math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])):
            self.progress.status = "diverged"
        elif interrupted and self.progress.status == "exhausted":
            self.progress.status = "interrupted"
        return self.progress.status in ("diverged", "interrupted")

    def evaluation_ends_it(self) -> bool:
        """Evaluate where the grid or the end says so; True where the run has no more to do."""
        seen = self.progress.samples
        spent = seen >= min(self.give_up_samples or math.inf, self.plan.budget_samples)
        if not (self.grid.is_due(self.progress.steps) or spent):
            return False
        self.progress.eval_loss = self.evaluate()
        self._readings.annotate(eval_loss=self.progress.eval_loss)
        self.plan.observe(seen, eval_loss=self.progress.eval_loss)
        if not math.isfinite(self.progress.eval_loss):
            self.progress.status = "diverged"
        elif self.target_loss is not None and self.progress.eval_loss <= self.target_loss:
            self.progress.status = "reached"
        return spent or self.progress.status != "exhausted"


def trust_ratios(optimizer: Optimizer, by_layer: bool) -> dict[str, Tensor]:
    """Least, median and greatest trust ratio over the layers, where the optimizer has any.

    With `by_layer` every layer's as well, as `trust_ratio/NAME`.
    """
    layer_stats: Callable[[], dict[Any, dict[str, Tensor]]] = getattr(
        optimizer, "layer_stats", dict
    )
    layers = {name: stats["trust_ratio"] for name, stats in layer_stats().items()}
    if not layers:
        return {}
    ratios = torch.stack([*layers.values()])
    each = {f"trust_ratio/{name}": ratio for name, ratio in layers.items()} if by_layer else {}
    return each | {
        "trust_ratio_min": ratios.min(),
        "trust_ratio_median": ratios.median(),
        "trust_ratio_max": ratios.max(),
    }
