"""The table of optimizers that drives the property tests, and what those tests step them with.

A new optimizer is one row: its class, its options, and its reference in `optimizer_references.py`.
torch's own AdamW and SGD are rows too: what fails for them is wrong with the test.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optimizer_references as references
import torch
from torch import Tensor
from torch.nn import Parameter

from largebatch.optim import LAMB, LARS

SHAPES = ((), (1,), (7,), (5, 3), (4, 3, 2, 2))
ZERO_SHAPE = (3, 2)  # one more layer, initialised with zeros
NUM_LAYERS = len(SHAPES) + 1


@dataclass(frozen=True)
class Row:
    name: str
    optimizer: type[torch.optim.Optimizer]
    reference: Callable[..., references.Array]
    lr: float
    options: dict[str, Any] = field(default_factory=dict)  # known to the reference too
    ours: bool = True

    def make(self, params: Any, **overrides: Any) -> torch.optim.Optimizer:
        return self.optimizer(params, **{"lr": self.lr, **self.options, **overrides})

    def expected(
        self, weight: Tensor, grads: Sequence[Tensor], lrs: Sequence[float], **overrides: Any
    ) -> references.Array:
        """The reference's weights for one layer after all the steps."""
        w, *gs = (np.asarray(t.detach().double().numpy()) for t in (weight, *grads))
        return self.reference(w, gs, lrs, **{**self.options, **overrides})


LAMB_OPTIONS = {"betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1}
LARS_OPTIONS = {"momentum": 0.9, "weight_decay": 0.05, "trust_coefficient": 0.02, "eps": 1e-3}
SGD_OPTIONS = {"momentum": 0.9, "weight_decay": 0.05, "nesterov": True}

ROWS = (
    Row("lamb", LAMB, references.lamb, lr=0.02, options=LAMB_OPTIONS),
    Row("lars", LARS, references.lars, lr=0.5, options=LARS_OPTIONS),
    Row("lars-nesterov", LARS, references.lars, 0.5, {**LARS_OPTIONS, "nesterov": True}),
    Row("lars-plain", LARS, references.lars, 0.5, {**LARS_OPTIONS, "momentum": 0.0}),
    Row("torch-adamw", torch.optim.AdamW, references.adamw, 0.02, LAMB_OPTIONS, ours=False),
    Row("torch-sgd", torch.optim.SGD, references.sgd, 0.05, SGD_OPTIONS, ours=False),
)
OUR_ROWS = tuple(row for row in ROWS if row.ours)


def make_layers(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [Parameter(weight.to(dtype)) for weight in (*weights, torch.zeros(ZERO_SHAPE))]


def make_grads(num_steps: int, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """`num_steps` gradients for each of the layers, of growing scale from layer to layer."""
    generator = torch.Generator().manual_seed(1)
    return [
        [
            (torch.randn(shape, generator=generator) * 10 ** (layer - 3)).to(dtype)
            for layer, shape in enumerate((*SHAPES, ZERO_SHAPE))
        ]
        for _ in range(num_steps)
    ]


def take_steps(
    optimizer: torch.optim.Optimizer, params: Sequence[Parameter], grads: Sequence[Sequence[Tensor]]
) -> None:
    for step_grads in grads:
        for param, grad in zip(params, step_grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()


def tensors_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Every parameter and every state tensor, in a fixed order."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            yield param.detach()
            state = optimizer.state.get(param, {})
            yield from (state[key] for key in sorted(state) if isinstance(state[key], Tensor))


def snapshot(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors_of(optimizer)]


def same_bits(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Equal to the last bit, dtype and shape included; 0.0 and -0.0 differ, a NaN equals itself."""
    return len(one) == len(other) and all(
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for a, b in zip(one, other, strict=True)
    )
