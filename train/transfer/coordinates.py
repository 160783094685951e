"""The coordinate check: what every layer puts out after a few steps, at several widths.

Under µP the outputs of a layer change alike in training at every width; where they change the more
the wider the model, or the less, no rate fits two widths (Yang et al. 2022, arXiv:2203.03466,
appendix D.1). Runs in this process, on the CPU, on batches of the run's own task.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from largebatch.common.errors import ConfigError
from largebatch.conf.build import build
from largebatch.conf.config import TrainConfig
from largebatch.distributed.ranks import Ranks
from largebatch.train.build import build_optimizer
from largebatch.train.hyperparameter_scaler import HyperparameterScaler
from largebatch.train.models import Transformer
from largebatch.train.models.transformer import usual_hidden
from largebatch.train.run_spec import make_plan
from largebatch.train.tasks import Task, loss_of, sampler_of

ALONE: Final = Ranks("none", 0, 1, 0, 1, "127.0.0.1", 0)
ROOT: Final = "model"
"""The layer that is the whole model."""


@dataclass(frozen=True)
class Coordinates:
    """Root mean squares over each layer's outputs on one batch that is not trained on.

    Attributes:
        after: of the outputs after the steps, by the layer's name.
        change: of what training has changed them by.
    """

    width: int
    after: dict[str, float]
    change: dict[str, float]


def widened(config: TrainConfig, key: str, width: int) -> TrainConfig:
    """The run at another width; the transformer's heads stay as large as they are, and its SwiGLU
    in proportion.

    Raises:
        ConfigError: the model has no such key, or no such width.
    """
    now = config.model.get(key)
    if not isinstance(now, int) or isinstance(now, bool):
        known = ", ".join(name for name, value in config.model.items() if type(value) is int)
        raise ConfigError(
            f"--key must be a whole number among the keys of model ({known or 'none'}), got {key!r}"
        )
    changed: dict[str, Any] = {key: width}
    of_transformer = str(config.model["_target_"]).endswith(f".{Transformer.__name__}")
    if of_transformer and key == "dim":
        # Its own rule for `hidden` rounds, and would be no proportion.
        sizes = {"hidden": usual_hidden(now)} | {
            name: value
            for name in ("heads", "kv_heads", "hidden")
            if (value := config.model.get(name)) is not None
        }
        for name, value in sizes.items():
            if value * width % now:
                raise ConfigError(
                    f"model.{name}={value} at model.dim={now} is no whole number at a width of "
                    f"{width}: give --widths that are multiples of {now // math.gcd(value, now)}"
                )
            changed[name] = value * width // now
    return replace(config, model=config.model | changed)


class ShortRun:
    """A model, and its optimizer at the run's peak learning rate, for a few steps in this process.

    Args:
        samples: in a step's batch.
    """

    def __init__(self, config: TrainConfig, task: Task, samples: int) -> None:
        torch.manual_seed(config.seed)
        self.model: nn.Module = build(config.model, "model", nn.Module)
        self.optimizer: Optimizer = build_optimizer(config, self.model, ALONE)
        plan = make_plan(config)
        self._scaler, self._peak_lr = HyperparameterScaler(plan, self.optimizer), plan.peak_lr
        self._scaler.apply(plan.at(0))
        self.set_lr_factor(1.0)
        self._task, self._samples, self._clip_norm = task, samples, config.clip_norm
        self._sampler = sampler_of(task, config.seed)
        self._taken = 0

    def set_lr_factor(self, factor: float) -> None:
        """Take this much of the peak learning rate from now on."""
        self._scaler.set_lr(self._peak_lr * factor)

    def evaluate(self) -> float:
        """Return the loss on the task's evaluation samples."""
        batch = self._task.eval_batch(np.arange(self._task.num_eval, dtype=np.int64))
        with torch.no_grad():
            self.model.eval()
            loss = loss_of(self._task, self.model, batch).item()
            self.model.train()
        return loss

    def step(self) -> float:
        """Make one step; returns the loss before it."""
        batch = self._task.train_batch(self._sampler.take(self._taken, self._samples))
        self._taken += self._samples
        loss = loss_of(self._task, self.model, batch)
        torch.autograd.backward(loss)
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def coordinates(
    config: TrainConfig, task: Task, *, key: str, width: int, steps: int, samples: int, seeds: int
) -> Coordinates:
    """Train at one width, with `seeds` seeds, and say what each layer puts out then.

    Raises:
        ConfigError: the run is none at this width.
    """
    wide = widened(config, key, width)
    batch = task.eval_batch(np.arange(min(samples, task.num_eval), dtype=np.int64))
    after: dict[str, list[Tensor]] = {}
    change: dict[str, list[Tensor]] = {}
    for seed in range(config.seed, config.seed + seeds):
        run = ShortRun(replace(wide, seed=seed), task, samples)
        first = _outputs(run.model, task, batch)
        for _ in range(steps):
            run.step()
        for name, output in _outputs(run.model, task, batch).items():
            after.setdefault(name, []).append(output)
            change.setdefault(name, []).append(output - first[name])
    return Coordinates(
        width,
        {name: _rms(torch.stack(outputs)) for name, outputs in after.items()},
        {name: _rms(torch.stack(outputs)) for name, outputs in change.items()},
    )


def _outputs(model: nn.Module, task: Task, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    with _recorded(model) as found, torch.no_grad():
        model.eval()
        loss_of(task, model, batch)
        model.train()
    return found


@contextmanager
def _recorded(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within it, the last output of each layer with weights, of each block and of the model."""
    blocks = {block for m in model.modules() if isinstance(m, nn.ModuleList) for block in m}
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                found[name] = output.detach()

        return hook

    handles = [
        module.register_forward_hook(keep(name or ROOT))
        for name, module in model.named_modules()
        if not name or module in blocks or any(True for _ in module.parameters(recurse=False))
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _rms(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """The exponent of width that values grow with, by least squares; NaN where one is not finite.

    >>> round(slope([64, 128, 256], [1.0, 2.0, 4.0]), 6)
    1.0
    """
    if not all(math.isfinite(value) for value in values):
        return math.nan
    if not all(values):
        return 0.0 if not any(values) else math.nan
    logs = [math.log(width) for width in widths]
    middle = sum(logs) / len(logs)
    spread = sum((log - middle) ** 2 for log in logs)
    return (
        sum(
            (log - middle) * math.log(value)
            for log, value in zip(logs, values, strict=True)
        )
        / spread
    )  # fmt: skip


def drifting(found: Sequence[Coordinates], tolerance: float) -> list[str]:
    """The layers whose change grows, or falls, faster than as width to the power `tolerance`."""
    widths = [one.width for one in found]
    return [
        name
        for name in found[0].change
        # The comparison is false for NaN.
        if not abs(slope(widths, [one.change[name] for one in found])) <= tolerance
    ]
