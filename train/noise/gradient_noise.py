"""The noise scale of a run: from the squared norms at a source to what a record line says.

It costs no collective of its own: this rank's parts of the small gradients' mean squared norms, and
of the whole gradient's, travel with the loss. The host sees the numbers
with the step's others, one step late.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from largebatch.optim.math.tensors import CPU_STRETCH
from largebatch.schedules import BatchSplit, NoiseReading, NoiseScale
from largebatch.train.noise.small_gradients import (
    PassingGradients,
    SmallGradients,
    squares,
    weighted_squares,
    wide,
)

PartialSums = dict[str, Tensor]

_SMALL, _BIG = "noise/small", "noise/big"


@dataclass
class GradientNoise:
    """Measures, averages and tells the noise scale: of all layers, and as asked of each.

    Attributes:
        half_life_samples: of the averages.
        every: steps between measurements; the first step is measured.
        by_layer: also each layer's, as `noise_scale/NAME`. Their ratios are not to be averaged:
            tr Σ and ‖G‖² add up, the noise scale does not.
        optimizer: where given, also the noise scale in the metric P = 1 / (√v̂ + ε) of its second
            moment v̂ before the step, `noise_scale_preconditioned`: the noise as Adam sees it.
        copies: ranks that hold the same piece of the whole gradient, or of that of another group.
        groups: of ranks, each with a whole gradient of its own, of its part of the batch.

    Raises:
        ValueError: a second moment is asked for where there is none, or at a source where no whole
            gradient goes by.
    """

    source: SmallGradients
    half_life_samples: float
    every: int = 1
    by_layer: bool = False
    optimizer: Optimizer | None = None
    copies: int = 1
    groups: int = 1
    _scales: dict[str, NoiseScale] = field(default_factory=dict)
    _metric: dict[str, Tensor] = field(default_factory=dict)
    _samples: int = 0

    def __post_init__(self) -> None:
        if self.optimizer is None:
            return
        of_gradients = not getattr(type(self.optimizer), "takes_model", False)  # as K-FAC's
        if "betas" not in self.optimizer.defaults or not of_gradients:
            raise ValueError(
                "noise.preconditioned needs the second moment of an optimizer such as AdamW or "
                f"LAMB, got {type(self.optimizer).__name__}"
            )
        whole = all(len(params) == 1 for params in self.source.layers.values())
        if not (isinstance(self.source, PassingGradients) and whole):
            raise ValueError(
                "noise.preconditioned needs whole gradients to go by: use noise.small=micro_batch "
                "or rank"
            )

    def begin(self, steps: int) -> None:
        """To be called before a step's first backward pass, after `steps` steps."""
        self.source.active = steps % self.every == 0
        if self.source.active and self.optimizer is not None:
            assert isinstance(self.source, PassingGradients)
            self._metric = metric_of(self.optimizer, self.source.layers, self._metric)
            self.source.metric = self._metric or None

    def parts(self, split: BatchSplit, loss_scale: float | Tensor = 1.0) -> PartialSums:
        """This rank's parts of what has to be summed over ranks, after the backward passes and
        before the whole gradient is clipped.

        Args:
            loss_scale: what small gradients were multiplied with as they went by.
        """
        if not self.source.active:
            return {}
        whole = {name: value / self.copies for name, value in self._whole().items()}
        return self._small(split, loss_scale) | whole

    def _small(self, split: BatchSplit, loss_scale: float | Tensor) -> PartialSums:
        small = self.source.part(split, loss_scale)
        numbers = {_SMALL: small.sum()}
        if self.by_layer:
            numbers |= _by_name(f"{_SMALL}/", self.source.layers, small)
        if isinstance(self.source, PassingGradients) and self.source.metric is not None:
            numbers[f"{_SMALL}_preconditioned"] = self.source.weighted_part(split, loss_scale)
        return numbers

    def _whole(self) -> PartialSums:
        """This rank's pieces of the whole gradient."""
        big = squares(self.source.layers)
        numbers = {_BIG: big.sum()}
        if self.by_layer:
            numbers |= _by_name(f"{_BIG}/", self.source.layers, big)
        if isinstance(self.source, PassingGradients) and self.source.metric is not None:
            metric = self.source.metric
            layers = [
                (name, param.grad)
                for name, (param,) in self.source.layers.items()
                if name in metric and param.grad is not None
            ]
            grads, weights = [grad for _, grad in layers], [metric[name] for name, _ in layers]
            weighted = torch.stack([*weighted_squares(grads, weights)])
            numbers[f"{_BIG}_preconditioned"] = weighted.sum()
        return numbers

    def take(self, line: dict[str, Any]) -> None:
        """Take a complete line's numbers in, and leave the readings in their place."""
        numbers = {key: line.pop(key) for key in [*line] if key.startswith((_SMALL, _BIG))}
        split = BatchSplit(
            line["global_batch_size"],
            line["data_parallel_size"],
            line["gradient_accumulation_steps"],
        )
        if line.get("skipped"):  # a step that was none says nothing of the next
            return
        taken = False
        for key, small in numbers.items():
            if not key.startswith(_SMALL):
                continue
            name = key.removeprefix(_SMALL)
            big = numbers[_BIG + name]
            if not (math.isfinite(small) and math.isfinite(big)):
                continue
            scale = self._scales.setdefault(name, NoiseScale(self.half_life_samples))
            scale.update(
                small_sq_norm=small,
                big_sq_norm=big,
                small_batch=self.source.small_batch(split),
                big_batch=split.global_batch_size // self.groups,
                samples=line["samples"] - self._samples,
            )
            line.update(_fields(scale.reading(), name))
            taken = True
        if taken:
            self._samples = line["samples"]

    def readings(self) -> dict[str, float | bool]:
        """The reading over all layers, as fields of a record, and after how many samples it was
        last measured, `noise_samples`; empty before the first.
        """
        scale = self._scales.get("")
        if scale is None:
            return {}
        return _fields(scale.reading(), "") | {"noise_samples": self._samples}

    def state_dict(self) -> dict[str, Any]:
        """The averages, in plain numbers."""
        scales = {name: scale.state_dict() for name, scale in self._scales.items()}
        return {"scales": scales, "samples": self._samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a `state_dict`."""
        self._scales, self._samples = {}, int(state["samples"])
        for name, averages in state["scales"].items():
            self._scales[name] = NoiseScale(self.half_life_samples)
            self._scales[name].load_state_dict(averages)


def metric_of(
    optimizer: Optimizer, layers: Mapping[str, Any], before: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """P = 1 / (√v̂ + ε) of each parameter that the optimizer has a second moment for; empty before
    its first step.

    Args:
        before: the metric of another step, whose memory this one takes over, or empty.

    Raises:
        ValueError: the optimizer keeps no second moment of a parameter that it has stepped.
    """
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    metric: dict[str, Tensor] = {}
    for name, (param,) in layers.items():
        state = optimizer.state.get(param, {})
        if not state:
            continue
        if "exp_avg_sq" not in state:
            raise ValueError(
                "noise.preconditioned needs the second moment of every parameter, and "
                f"{type(optimizer).__name__} keeps none of {name!r}: leave it at false"
            )
        group, moment = groups[param], wide(state["exp_avg_sq"])
        metric[name] = before[name] if name in before else torch.empty_like(moment)
        # √(v̂ / v); on the device where steps are counted there.
        correction = (1 - group["betas"][1] ** state["step"]) ** -0.5
        for v, into in _stretches(moment, metric[name]):
            torch.sqrt(v, out=into).mul_(correction).add_(group["eps"]).reciprocal_()
    return metric


def _stretches(one: Tensor, other: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Both, on a CPU in stretches that stay in its cache from one operation to the next."""
    if one.device.type != "cpu" or not (one.is_contiguous() and other.is_contiguous()):
        return [(one, other)]
    pieces = (torch.split(tensor.view(-1), CPU_STRETCH) for tensor in (one, other))
    return zip(*pieces, strict=True)


def _by_name(prefix: str, layers: Mapping[str, Any], values: Tensor) -> PartialSums:
    return {f"{prefix}{name}": value for name, value in zip(layers, values.unbind(), strict=True)}


def _fields(reading: NoiseReading, name: str) -> dict[str, float | bool]:
    """A reading as fields of a record; of a layer only the ratio and whether it is resolved."""
    if name.startswith("/"):
        return {f"noise_scale{name}": reading.noise_scale if reading.resolved else math.nan}
    return {
        f"noise_scale{name}": reading.noise_scale,
        f"noise_scale{name}_error": reading.standard_error,
        f"noise{name}_resolved": reading.resolved,
    } | ({} if name else {"grad_sq_norm": reading.grad_sq_norm, "grad_trace": reading.trace})
