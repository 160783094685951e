"""Training steps that are alike but for what they measure of the noise scale.

They are those of `largebatch.train.loop`, method by method, evaluations left out. Every row steps a
model of its own from the same start, over the same samples in the same micro-batches.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from largebatch.benchmarks.workloads import Workload
from largebatch.distributed.ranks import Ranks
from largebatch.schedules import Constant, ConstantBatch, Plan
from largebatch.train.data.sampler import Sampler
from largebatch.train.engines.base import Engine
from largebatch.train.engines.ddp import DDP
from largebatch.train.engines.fsdp import FSDP
from largebatch.train.loop import Loop
from largebatch.train.noise.gradient_noise import GradientNoise
from largebatch.train.parts import Parts

NUM_MICRO_BATCHES = 2  # of a rank's share: the fewest that differ from their mean


@dataclass(frozen=True)
class Row:
    """One way to step: without the noise scale (`source` None), or with it."""

    name: str
    source: str | None = None
    by_layer: bool = False
    preconditioned: bool = False
    reference: str = "without"
    """The row, of the same round, that the ratio is to."""
    sharded: bool = False


ALONE = (
    Row("without"),
    Row("without, again"),
    Row("micro_batch", "micro_batch"),
    Row("micro_batch by layer", "micro_batch", by_layer=True),
    Row("micro_batch preconditioned", "micro_batch", preconditioned=True),
    Row("example", "example"),
    Row("example by layer", "example", by_layer=True),
)
ON_RANKS = (
    Row("without"),
    Row("without, again"),
    Row("rank", "rank"),
    Row("rank by layer", "rank", by_layer=True),
    Row("rank preconditioned", "rank", preconditioned=True),
    Row("FSDP2 without", reference="FSDP2 without", sharded=True),
    Row("FSDP2 rank", "rank", reference="FSDP2 without", sharded=True),
    Row("FSDP2 rank by group", "rank", True, reference="FSDP2 without", sharded=True),
)


class NoiseStepper:
    """A model that one row steps."""

    def __init__(self, row: Row, workload: Workload, ranks: Ranks, device: torch.device) -> None:
        torch.manual_seed(0)
        task, model = workload.task(), workload.model()
        micro_batch_size = workload.batch_size // (ranks.size * NUM_MICRO_BATCHES)
        make = FSDP if row.sharded else DDP
        engine = make(model, ranks, device, micro_batch_size)
        optimizer = AdamW(list(engine.model.named_parameters()), lr=1e-5, fused=True)
        self.model, self.noise = engine.model, noise_of(row, engine, optimizer)
        self._loop = Loop(
            plan=Plan(
                ramp=ConstantBatch(size=workload.batch_size),
                curve=Constant(),
                budget_samples=1 << 50,
                base_lr=1e-5,
                base_batch=workload.batch_size,
            ),
            parts=Parts(task, engine, optimizer, self.noise),
            sampler=Sampler(task.num_train, 0, task.replacement),
            ranks=ranks,
            evaluation=None,
        )
        self._points = self._loop.plan.steps_from(0)
        self.num_summed = 0
        self.least_bytes = (
            0 if self.noise is None else least_bytes(row, self.noise, workload, ranks)
        )

    def step(self) -> None:
        """As `Loop.run` does it."""
        loop, point = self._loop, next(self._points)
        batch = loop.take(point)
        loss = loop.parts.engine.forward_backward(loop.parts.task, batch, point.batch_size)
        numbers = loop.measure(point, loss)
        numbers |= loop.update(point.lr)
        before = loop.send_off(point, numbers)
        loop.advance(point)
        loop.record(before)
        self.num_summed = len(numbers.reduced)

    def finish(self) -> None:
        """Wait for what is still on its way."""
        self._loop._metrics.flush()

    def own_work(self, num_steps: int) -> float:
        """Processor seconds of a step inside of the calls that measure, each timed by itself."""
        if self.noise is None:
            return 0.0
        spent = 0.0

        def timed(call: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                nonlocal spent
                began = time.process_time()
                result = call(*arguments)
                spent += time.process_time() - began
                return result

            return run

        calls: list[tuple[object, str]] = [
            (self.noise, name) for name in ("begin", "parts", "take")
        ]
        calls.append((self.noise.source, "see"))
        for owner, name in calls:
            setattr(owner, name, timed(getattr(owner, name)))  # shadows the method
        for _ in range(num_steps):
            self.step()
        for owner, name in calls:
            delattr(owner, name)
        return spent / num_steps


def noise_of(row: Row, engine: Engine, optimizer: AdamW) -> GradientNoise | None:
    if row.source is None:
        return None
    measured = optimizer if row.preconditioned else None
    source = engine.small_gradients(row.source)
    return GradientNoise(
        source, 8192, by_layer=row.by_layer, optimizer=measured, copies=engine.gradient_copies
    )


def least_bytes(row: Row, noise: GradientNoise, workload: Workload, ranks: Ranks) -> int:
    """What the norms of one step are taken of, on one rank, read once.

    That is every small gradient that goes by and the whole one, each with the second moment where
    they are weighted with it; where there is no small gradient, what came into layers and back.
    """
    held = sum(param.numel() for params in noise.source.layers.values() for param in params)
    whole = held // ranks.size if row.sharded else held
    if row.source == "example":
        num_samples = workload.batch_size // ranks.size
        return 4 * (whole + num_samples * passing_values(workload))
    small = held * (NUM_MICRO_BATCHES if row.source == "micro_batch" else 1)
    return 4 * (small + whole) * (2 if row.preconditioned else 1)


def passing_values(workload: Workload) -> int:
    """Values of one sample that come into layers, and those that come back from them."""
    counted = 0

    def on_forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal counted
        del module
        counted += output.numel() + (inputs[0].numel() if inputs[0].is_floating_point() else 0)

    model, task = workload.model(), workload.task()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm):
            module.register_forward_hook(on_forward)
    with torch.no_grad():
        task.loss(model, task.train_batch(np.zeros(1, dtype=np.int64)))
    return counted
