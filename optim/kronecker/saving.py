"""Save the factors and inverses that only a layer's owner has, and load them at any world size.

As in `largebatch.optim.blockwise.portable`, they are sharded DTensors in a state dict.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from largebatch.optim.blockwise.portable import Key, Portable, States
from largebatch.optim.blockwise.state_memory import DROPPED
from largebatch.optim.blockwise.work_group import BlockedLayer
from largebatch.optim.kronecker.factors import state_shapes
from largebatch.optim.kronecker.layers import Layer
from largebatch.optim.kronecker.work_group import KroneckerWorkGroup
from largebatch.optim.loading import as_kept, as_state
from largebatch.optim.sharding.layout import Name, local
from largebatch.optim.sharding.placement import Placement

Forms = Mapping[Layer, str]


def portables(
    work_groups: list[KroneckerWorkGroup], forms: Forms, states: States
) -> Iterator[Portable]:
    """Yield what is saved and loaded of the layers of each work group."""
    for work_group in work_groups:
        held = [layer for layer in work_group.layers if "factor_in" in states.get(layer.weight, {})]
        if work_group.group is None or not held:
            continue
        shapes: dict[Key, tuple[int, ...]] = {}
        owners: dict[Key, int] = {}
        for layer in held:
            for key, shape in state_shapes(layer, forms[layer]).items():
                shapes[layer.weight, key] = shape
                owners[layer.weight, key] = work_group.owners[layer]
        placements = [
            as_blocked_layer(layer, work_group.placements[layer.weight]) for layer in held
        ]
        yield Portable(placements, shapes, owners)


def as_blocked_layer(layer: Layer, placement: Placement) -> BlockedLayer:
    return BlockedLayer(layer.weight, layer.name, placement, ())


def checked(
    param: Tensor,
    name: Name,
    found: Mapping[str, Any],
    keys: set[str],
    layer: Layer | None,
    form: str,
) -> dict[str, Any]:
    """Return a parameter's loaded state in the dtype and on the device that `step` expects.

    Args:
        keys: what there has to be, apart from the layer's own.

    Raises:
        ValueError: an entry that is missing or of another shape; one that is unknown is kept.
    """
    shapes = {} if layer is None else state_shapes(layer, form)
    zeros = {"dropped_updates": torch.zeros(1)} if layer is not None else {}
    found = {DROPPED: torch.zeros(()), **zeros, **found}  # of before these were counted
    if (keys | shapes.keys()) - found.keys():
        wrong = sorted(found.keys() ^ (keys | shapes.keys()))
        raise ValueError(
            f"state of parameter {name!r} must have the entries that its options make, got or "
            f"lacks {', '.join(wrong[:4])}: was it saved by another optimizer, or with another "
            "form, graft, rule or fallback?"
        )
    ready = {}
    for key, value in found.items():
        if key not in shapes:
            known = key in keys and key != DROPPED
            ready[key] = as_state(key, value, name, param) if known else as_kept(value, param)
            continue
        assert layer is not None
        if tuple(value.shape) != shapes[key]:
            raise ValueError(
                f"state {key!r} of parameter {name!r} must have the shape {shapes[key]}, got "
                f"{tuple(value.shape)}: was it saved with another max_factor_size?"
            )
        ready[key] = value.to(local(param).device, layer.dtype, copy=True)
    return ready
