"""Layers of every kind under 36 steps: what a variant and its oracle both go through."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from optimizer_rows import take_steps
from torch import Tensor
from torch.nn import Parameter
from variant_layers import Array, norm

NUM_STEPS = 36


@dataclass(frozen=True)
class Spec:
    """One layer of the scenario: what it starts from and which group it is in."""

    shape: tuple[int, ...]
    weight_scale: float
    grad_scale: float
    decays: bool = True
    adapt: bool = True
    without_grad: tuple[int, ...] = ()
    """Steps, from 0, at which the gradient is all zeros."""


SPECS = (
    Spec((7,), 1.0, 0.01, without_grad=(0,)),
    Spec((5, 3), 100.0, 0.1, without_grad=(3, 4)),
    Spec((4, 3, 2, 2), 1e-3, 1.0),
    Spec((), 1.0, 0.1),
    Spec((3, 2), 0.0, 0.1),
    Spec((6,), 1.0, 0.1, decays=False, without_grad=(0, 1, 7)),
    Spec((2, 5), 0.0, 1.0, decays=False),
    Spec((4,), 1.0, 0.1, adapt=False, without_grad=(2,)),
    Spec((8,), 1.0, 0.01, decays=False, adapt=False),
)
SIZE_OF_STEP = (0.01, 1.0, 100.0, 0.1)  # gradients of step t are larger by SIZE_OF_STEP[t % 4]


def make_weights(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(spec.shape, generator=generator) * spec.weight_scale).to(dtype)
        for spec in SPECS
    ]


@functools.cache
def make_grads(dtype: torch.dtype) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    grads = []
    for step in range(NUM_STEPS):
        scales = [
            0.0 if step in spec.without_grad else spec.grad_scale * SIZE_OF_STEP[step % 4]
            for spec in SPECS
        ]
        grads.append(
            [
                (torch.randn(spec.shape, generator=generator) * scale).to(dtype)
                for spec, scale in zip(SPECS, scales, strict=True)
            ]
        )
    return grads


def warmup(lr: float) -> list[float]:
    return [lr * min(1.0, (step + 1) / 20) for step in range(NUM_STEPS)]


def make_groups(params: Sequence[Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """The scenario's layers as one group for each kind of layer."""
    groups: dict[tuple[bool, bool], list[tuple[str, Parameter]]] = {}
    for number, (spec, param) in enumerate(zip(SPECS, params, strict=True)):
        groups.setdefault((spec.decays, spec.adapt), []).append((str(number), param))
    return [
        {"params": named, "weight_decay": weight_decay * decays, "adapt": adapt}
        for (decays, adapt), named in groups.items()
    ]


def to_numpy(tensor: Tensor) -> Array:
    copy: Array = tensor.detach().to(torch.float64, copy=True).numpy()
    return copy


def steps_of(
    optimizer: torch.optim.Optimizer,
    params: Sequence[Parameter],
    grads: Sequence[Sequence[Tensor]],
    lrs: Sequence[float],
) -> Iterator[list[Tensor]]:
    """The parameters after each step of the scenario."""
    for lr, step_grads in zip(lrs, grads, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        take_steps(optimizer, params, [step_grads])
        yield [param.detach() for param in params]


def relative_error(actual: Tensor, expected: Array, start: Array) -> float:
    """‖actual - expected‖ against the layer's size at the start or now, whichever is larger."""
    size = max(norm(start), norm(expected))
    difference = norm(to_numpy(actual) - expected)
    return difference / size if difference else 0.0
