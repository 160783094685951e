"""The trust ratios of a layer-wise optimizer, for the record."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def trust_ratios(optimizer: Optimizer, by_layer: bool) -> dict[str, Tensor]:
    """Least, median and greatest trust ratio over the layers that adapt, where there are any.

    With `by_layer` every layer's as well, as `trust_ratio/NAME`.
    """
    if by_layer or not hasattr(optimizer, "adapting_ratios"):
        layers = _by_layer(optimizer)
        ratios = torch.stack([*layers.values()]) if layers else None
        each = {f"trust_ratio/{name}": ratio for name, ratio in layers.items()} if by_layer else {}
    else:  # all at once: one by one is dear at every step
        ratios, each = optimizer.adapting_ratios(), {}
    if ratios is None:
        return {}
    return each | {
        "trust_ratio_min": ratios.min(),
        "trust_ratio_median": ratios.median(),
        "trust_ratio_max": ratios.max(),
    }


def _by_layer(optimizer: Optimizer) -> dict[Any, Tensor]:
    """The trust ratio of each layer that adapts, by its name."""
    layer_stats: Callable[[], dict[Any, dict[str, Tensor]]] = getattr(
        optimizer, "layer_stats", dict
    )
    stats = layer_stats()
    adapting: Callable[[], set[Any]] = getattr(optimizer, "adapting_layers", lambda: {*stats})
    names = adapting()
    return {name: layer["trust_ratio"] for name, layer in stats.items() if name in names}
