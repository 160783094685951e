"""One run of layer-wise Gauss-Newton to a target, counted as the loop counts any optimizer's.

At each step d_l = (G_l + λ_l)⁻¹ g_l for every layer l, g_l of the step's batch and G_l of its
first `curvature_samples`, then
w_l ← w_l - lr · s · d_l with one length s for all layers: the power of √2 that makes the batch's
loss least. λ_l is `damping` times the mean of G_l's eigenvalues, which a vector of random signs
estimates. No momentum, no average of anything over steps.

Samples, initial weights, the target and where between two evaluations it was crossed are those of
the loop for the same seed. Evaluations are made wherever `evaluation.growth` has them due:
`evaluation.within`, which saves time, would find a fast fall late.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from largebatch.benchmarks.gauss_newton.blocks import (
    Blocks,
    conjugate_gradients,
    gradients_of,
    layers_of,
    parts,
)
from largebatch.common.errors import ConfigError
from largebatch.conf.build import build
from largebatch.conf.config import TrainConfig
from largebatch.study.protocol.search import Result
from largebatch.train.evaluation import EvaluationGrid
from largebatch.train.progress import Evaluated, RunProgress
from largebatch.train.tasks import Task, sampler_of

SHORTEST, LONGEST = -10, 2
"""Powers of √2, of the lengths that are tried."""


@dataclass
class GaussNewton:
    """Layer-wise Gauss-Newton on a model, a step at a time.

    Attributes:
        damping: over the mean of a block's eigenvalues.
        tolerance: a solve ends where its residual is so many times the gradient's length,
        most_products: or after so many products with the block.
        curvature_samples: of a batch, at most, that blocks are made of.
    """

    model: nn.Module
    damping: float
    tolerance: float
    most_products: int
    curvature_samples: int
    _length: int = SHORTEST
    """Of the last step, as a power of √2: the next search begins there."""
    _signs: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def step(self, inputs: Tensor, labels: Tensor, lr: float) -> None:
        """Move the weights by one batch."""
        gradients = gradients_of(self.model, inputs, labels)
        blocks = Blocks(self.model, inputs[: self.curvature_samples])
        directions = [self._solved(blocks, *one) for one in enumerate(gradients)]
        steps = [
            part
            for direction, layer in zip(directions, blocks.layers, strict=True)
            for part in parts(direction, layer)
        ]
        self._length = self._best_length(steps, inputs, labels)
        self._move(steps, -lr * length(self._length))

    def _solved(self, blocks: Blocks, place: int, gradient: Tensor) -> Tensor:
        signs = torch.randint(2, gradient.shape, generator=self._signs).to(gradient) * 2 - 1
        damping = self.damping * blocks.mean_curvature(place, signs)

        def damped(vector: Tensor) -> Tensor:
            return blocks.product(place, vector) + damping * vector

        return conjugate_gradients(damped, gradient, self.tolerance, self.most_products).vector

    def _best_length(self, steps: list[Tensor], inputs: Tensor, labels: Tensor) -> int:
        def loss(power: int) -> float:
            self._move(steps, -length(power))
            with torch.no_grad():
                found = float(cross_entropy(self.model(inputs), labels))
            self._move(steps, length(power))
            return found if math.isfinite(found) else math.inf

        return downhill(loss, self._length)

    @torch.no_grad()
    def _move(self, steps: list[Tensor], factor: float) -> None:
        params: list[Tensor] = [param for layer in layers_of(self.model) for param in layer]
        torch._foreach_add_(params, steps, alpha=factor)


def length(power: int) -> float:
    """The power of √2."""
    return float(math.sqrt(2.0) ** power)


def downhill(loss: Callable[[int], float], start: int) -> int:
    """Where the loss is least, from `start` on downhill.

    >>> downhill(lambda power: (power + 3) ** 2, 0)
    -3
    """
    found = {start: loss(start)}
    best = start
    while True:
        for near in (best - 1, best + 1):
            if near not in found and SHORTEST <= near <= LONGEST:
                found[near] = loss(near)
        before, best = best, min(found, key=found.__getitem__)
        if best == before:
            return best


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a run is told beside its configuration."""

    batch_size: int
    lr: float
    damping: float
    seed: int
    most_steps: int
    tolerance: float
    most_products: int
    curvature_samples: int


def run_to_target(config: TrainConfig, task: Task, asked: Asked) -> Result:
    """Train from the seed's initial weights to the target, or for as many steps as are allowed."""
    target = config.target.aim
    assert target is not None
    torch.manual_seed(asked.seed)
    model = build(config.model, "model", nn.Module)
    check_loss(task, model)
    method = GaussNewton(
        model, asked.damping, asked.tolerance, asked.most_products, asked.curvature_samples
    )
    sampler = sampler_of(task, asked.seed)
    grid, progress = EvaluationGrid(config.evaluation.growth), RunProgress()
    while progress.steps < asked.most_steps:
        start = progress.steps * asked.batch_size
        batch = task.train_batch(sampler.take(start, asked.batch_size))
        method.step(batch[0], batch[1], asked.lr)
        progress.steps += 1
        if not grid.is_due(progress.steps) and progress.steps < asked.most_steps:
            continue
        grid.advance(progress.steps)
        found = evaluated(task, model)
        progress.take_evaluation(found, target, 0.0)
        if target.is_met(found.loss):
            return Result(progress.crossed_at, found.loss)
        if not math.isfinite(found.loss):
            return Result(None)
    return Result(None, math.inf if progress.eval_loss is None else progress.eval_loss)


@torch.no_grad()
def evaluated(task: Task, model: nn.Module) -> Evaluated:
    """The mean loss over the evaluation set."""
    return Evaluated(float(task.loss(model, task.eval_batch(np.arange(task.num_eval)))))


@torch.no_grad()
def check_loss(task: Task, model: nn.Module) -> None:
    """Refuse a task whose loss is not the mean cross-entropy of classes."""
    batch = task.train_batch(np.arange(min(32, task.num_train)))
    logits = model(batch[0]) if len(batch) == 2 else None
    if logits is None or logits.ndim != 2 or batch[1].shape != logits.shape[:1]:
        raise ConfigError(
            "Gauss-Newton blocks are those of a cross-entropy over classes, a label a sample: "
            f"take task=bytes, digits or mnist5k, got {type(task).__name__}"
        )
    if not torch.isclose(task.loss(model, batch), cross_entropy(logits, batch[1])):
        raise ConfigError(
            f"the loss of {type(task).__name__} is not the mean cross-entropy of its labels, of "
            "which Gauss-Newton blocks are: take task=bytes, digits or mnist5k"
        )
