"""Which ranks share the work on which parameters, and what of it falls to whom and when."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from largebatch.optim.base import Group
from largebatch.optim.blockwise.blocks import Block, blocks_of
from largebatch.optim.math.tensors import compute_dtype
from largebatch.optim.sharding.layout import Name, local
from largebatch.optim.sharding.placement import Placement, placement_of
from largebatch.optim.sharding.redistribution import WorkGroup
from largebatch.optim.sharding.rounds import ShardedTensor
from largebatch.optim.sharding.work_assignment import assign

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# The running averages whose β may change on the way.
AVERAGES = ("exp_avg", "exp_avg_sq", "factor")

# An entry of the state: elements of gradients so far that were too large to be squared.
DROPPED = "dropped_elements"

# What a block has for each dimension with a factor.
MATRICES = ("factor_", "root_", "basis_", "asked_")

# The options of a group that say which blocks its parameters have.
CUT = ("precondition", "block_size", "merge_dims", "max_preconditioner_dim", "sides")


@dataclass(eq=False)
class BlockedLayer:
    """A parameter as a second-order optimizer treats it."""

    param: Tensor
    name: Name
    placement: Placement
    blocks: tuple[Block, ...]
    """What is preconditioned; none: a first-order method moves it."""
    seen: tuple[Any, ...] = ()
    """What it was made from, by `look_of`: where that has changed, it is another layer."""
    owners: tuple[int, ...] = ()
    """Of each block, by rank in the process group."""
    slots: tuple[int, ...] = ()
    """At which steps of an interval each block's roots are taken."""
    state_names: tuple[str, ...] = ()
    """Of each block's state, once there is any."""

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.param)

    @property
    def device(self) -> torch.device:
        return local(self.param).device

    @property
    def has_factors(self) -> bool:
        return bool(self.blocks) and bool(self.blocks[0].dims)


class BlockWorkGroup(WorkGroup[BlockedLayer]):
    """Parameters in blocks, each with an owner among the ranks of the group."""

    def __init__(self, layers: Sequence[BlockedLayer]) -> None:
        tensors = [
            ShardedTensor(layer.placement, tuple(block.box for block in layer.blocks), layer.owners)
            for layer in layers
        ]
        super().__init__(layers, tensors, layers[0].device)

    @property
    def is_sharded(self) -> bool:
        return any(layer.placement.is_sharded for layer in self.layers)


def look_of(param: Tensor, group: Group, options: Sequence[str] = CUT) -> tuple[Any, ...]:
    """What decides how a parameter is cut, by these options of its group, and where it lies."""
    cut = tuple(group[name] for name in options)
    placements = getattr(param, "placements", None)
    return cut, param.shape, param.dtype, param.device, placements


def blocks_in(group: Group, shape: Sequence[int]) -> tuple[Block, ...]:
    """The blocks of a tensor of this shape."""
    precondition, *cut = (group[name] for name in CUT)
    return blocks_of(shape, *cut) if precondition else ()


def make_layer(
    param: Tensor,
    name: Name,
    blocks: tuple[Block, ...],
    process_group: "ProcessGroup | None",
    seen: tuple[Any, ...] = (),
) -> BlockedLayer:
    """A parameter with its blocks, which nobody owns yet.

    Raises:
        ValueError: a parameter whose parts cannot be known.
    """
    return BlockedLayer(param, name, placement_of(param, name, process_group), blocks, seen)


def share_out(layers: Iterable[BlockedLayer], group_of: Mapping[Tensor, Group]) -> None:
    """Give every block of the layers an owner and a slot; those who have some keep them.

    Slots are the same whatever the world size, and so are the steps at which roots are taken.
    """
    listed = sorted(layers, key=lambda layer: len(layer.owners) < len(layer.blocks))
    by_interval: dict[int, list[BlockedLayer]] = {}
    for layer in listed:
        interval = group_of[layer.param].get("precondition_interval", 1)
        by_interval.setdefault(interval, []).append(layer)
    for interval, members in by_interval.items():
        fill(members, "slots", interval)
    by_group: dict[Any, list[BlockedLayer]] = {}
    for layer in listed:
        by_group.setdefault(layer.placement.group, []).append(layer)
    for process_group, members in by_group.items():
        rounds = [slot for layer in members for slot in layer.slots]
        fill(members, "owners", 1 if process_group is None else process_group.size(), rounds)


def fill(
    layers: list[BlockedLayer], what: str, num_bins: int, rounds: list[int] | None = None
) -> None:
    """Set `slots` or `owners` of the layers, those that have none last in the list."""
    costs = [block.cost for layer in layers for block in layer.blocks]
    given = [chosen for layer in layers for chosen in getattr(layer, what)]
    bins = assign(costs, num_bins, given=[chosen % num_bins for chosen in given], rounds=rounds)
    ends = [0]
    for layer in layers:
        ends.append(ends[-1] + len(layer.blocks))
    for layer, (start, end) in zip(layers, pairwise(ends), strict=True):
        setattr(layer, what, tuple(bins[start:end]))


def work_groups_of(layers: Iterable[BlockedLayer]) -> list[BlockWorkGroup]:
    """The layers by what they are spread over, in an order that all ranks share."""
    by_group: dict[Any, list[BlockedLayer]] = {}
    for layer in layers:
        # The collectives of a work group are on one device.
        key = layer.placement.group, None if layer.placement.group is not None else layer.device
        by_group.setdefault(key, []).append(layer)
    return [BlockWorkGroup(members) for members in by_group.values()]


def new_entry(name: str, shape: tuple[int, ...], layer: BlockedLayer) -> Tensor:
    """An entry of a block's state before its first step; empty where the block is another rank's.

    Roots and bases of nothing are the identity.
    """
    if name.startswith(("root_", "basis_")) and len(shape) == 2:
        return torch.eye(*shape, dtype=layer.dtype, device=layer.device)
    return torch.zeros(shape, dtype=layer.dtype, device=layer.device)
