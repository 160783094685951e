"""Small layers of every kind with curvature, and independent ways to their rows and factors.

The references ask autograd for everything: the row a that a layer's matrix meets at a position is
what the output there depends on, ∂(output)/∂(weight, bias); δ is the gradient by the output.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from largebatch.optim.kronecker.layers import Layer, find_layers


@dataclass(frozen=True)
class Case:
    """A layer and inputs for it."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    """Of the input; of indices below 5 where the layer is an embedding."""

    def __str__(self) -> str:
        return self.name

    def layer(self, seed: int = 0) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(seed)
        module = self.make().double()
        if isinstance(module, nn.Embedding):
            return module, torch.randint(0, 5, self.shape)
        return module, torch.randn(self.shape, dtype=torch.float64)


CASES = [
    Case("linear", lambda: nn.Linear(3, 4), (6, 3)),
    Case("linear without bias", lambda: nn.Linear(3, 4, bias=False), (6, 3)),
    Case("linear over a sequence", lambda: nn.Linear(3, 4), (4, 5, 3)),
    Case("linear over two dimensions", lambda: nn.Linear(3, 2), (2, 3, 2, 3)),
    Case("conv2d", lambda: nn.Conv2d(2, 3, 3), (3, 2, 5, 4)),
    Case("conv2d without bias", lambda: nn.Conv2d(2, 3, (2, 3), bias=False), (3, 2, 5, 4)),
    Case("conv2d padded", lambda: nn.Conv2d(2, 3, 3, padding=(1, 2)), (2, 2, 4, 3)),
    Case("conv2d strided", lambda: nn.Conv2d(2, 3, 3, stride=(2, 1), padding=1), (2, 2, 5, 4)),
    Case("conv2d dilated", lambda: nn.Conv2d(2, 3, 2, dilation=(2, 3)), (2, 2, 5, 6)),
    Case("conv2d grouped", lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 3, 4)),
    Case("conv2d depthwise", lambda: nn.Conv2d(3, 3, 3, groups=3, bias=False), (2, 3, 4, 4)),
    Case("conv2d depthwise doubled", lambda: nn.Conv2d(3, 6, 2, groups=3), (2, 3, 3, 4)),
    Case(
        "conv2d with everything",
        lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (2, 1), (2, 3), groups=2),
        (2, 4, 6, 7),
    ),
    Case("conv2d same", lambda: nn.Conv2d(2, 3, (4, 3), padding="same"), (2, 2, 5, 4)),
    Case("conv2d valid", lambda: nn.Conv2d(2, 3, 2, padding="valid"), (2, 2, 3, 4)),
    Case(
        "conv2d circular",
        lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"),
        (2, 2, 4, 5),
    ),
    Case(
        "conv2d reflecting",
        lambda: nn.Conv2d(2, 3, (4, 2), padding="same", dilation=(1, 2), padding_mode="reflect"),
        (2, 2, 5, 4),
    ),
    Case("conv1d", lambda: nn.Conv1d(2, 3, 3, padding=1), (3, 2, 5)),
    Case(
        "conv1d with everything",
        lambda: nn.Conv1d(4, 6, 3, 2, 3, 2, groups=2, padding_mode="replicate"),
        (2, 4, 8),
    ),
    Case("conv1d same", lambda: nn.Conv1d(2, 3, 4, padding="same", dilation=3), (2, 2, 7)),
    Case("embedding", lambda: nn.Embedding(5, 3), (6,)),
    Case("embedding of a sequence", lambda: nn.Embedding(5, 3), (4, 3)),
    Case("embedding with padding", lambda: nn.Embedding(5, 3, padding_idx=2), (6, 3)),
]


def only_layer(module: nn.Module, max_factor_size: int = 100) -> Layer:
    (layer,) = find_layers(module, max_factor_size)
    return layer


def rows_of(layer: Layer, x: Tensor) -> Tensor:
    """a at every position, (groups, positions, in): ∂ output / ∂ (row of the weight, bias).

    One position of one output channel at a time.
    """
    module, params = layer.module, layer.params
    output = module(x)
    if isinstance(module, nn.Embedding):
        kept = [index for index in x.reshape(-1).tolist() if index != module.padding_idx]
        return nn.functional.one_hot(torch.tensor(kept), layer.inputs).double().unsqueeze(0)
    by_position = positions_last(layer, output)  # (groups, out, positions)
    rows = []
    for group in range(layer.groups):
        first = by_position[group, 0]
        for value in first:
            grads = torch.autograd.grad(value, params, retain_graph=True)
            flat = [grad.reshape(layer.groups, layer.outputs, -1)[group, 0] for grad in grads]
            rows.append(torch.cat(flat))
    return torch.stack(rows).reshape(layer.groups, -1, layer.inputs)


def positions_last(layer: Layer, output: Tensor) -> Tensor:
    """What a layer returns, or its gradient, as (groups, out, positions)."""
    if isinstance(layer.module, nn.Conv1d | nn.Conv2d):
        return output.movedim(1, 0).reshape(layer.groups, layer.outputs, -1)
    return output.reshape(-1, layer.outputs).T.unsqueeze(0)


def deltas_of(layer: Layer, x: Tensor, grad: Tensor) -> Tensor:
    """δ at every position, (groups, positions, out)."""
    deltas = positions_last(layer, grad).mT
    if isinstance(layer.module, nn.Embedding) and layer.module.padding_idx is not None:
        deltas = deltas[:, x.reshape(-1) != layer.module.padding_idx]
    return deltas
