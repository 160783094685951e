"""Placements of tensors: the box of elements that each member of a process group holds."""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from largebatch.optim.sharding.layout import Name, is_dtensor, local

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Box:
    """The elements of a tensor with start <= index < start + size in every dimension."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    @cached_property
    def numel(self) -> int:
        return math.prod(self.size)

    def overlap(self, other: "Box") -> "Box | None":
        """What lies in both; None where nothing does."""
        start = tuple(map(max, self.start, other.start))
        ends = map(min, self.end, other.end)
        size = tuple(end - begin for begin, end in zip(start, ends, strict=True))
        return Box(start, size) if all(length > 0 for length in size) else None

    @property
    def end(self) -> tuple[int, ...]:
        return tuple(begin + length for begin, length in zip(self.start, self.size, strict=True))

    def of(self, tensor: Tensor, within: "Box") -> Tensor:
        """This box of a tensor that holds the box `within`, a view."""
        for dim, (begin, length) in enumerate(zip(self.start, self.size, strict=True)):
            if length != within.size[dim]:
                tensor = tensor.narrow(dim, begin - within.start[dim], length)
        return tensor


@dataclass(frozen=True)
class SubGroup:
    """A process group within that of a placement."""

    group: "ProcessGroup"
    members: Sequence[int]
    """By rank in this group, the rank in the placement's."""


@dataclass(frozen=True)
class Placement:
    """The placement of a tensor over the members of a process group, by their rank in the group."""

    shape: tuple[int, ...]
    group: "ProcessGroup | None"
    """None: this process has all of it, and works alone."""
    boxes: tuple[Box, ...]
    """What each member holds; may be empty."""
    copies: Sequence[int]
    """Which copy of the tensor each member's box is a part of: 0, 1, … where it is replicated."""
    across: SubGroup | None = None
    """Who has this member's box in each copy, where a group of them is known."""
    within: SubGroup | None = None
    """Beside `across`: who has the parts of this member's copy; None: it has all of them."""

    @property
    def me(self) -> int:
        return 0 if self.group is None else self.group.rank()

    @cached_property
    def is_sharded(self) -> bool:
        """Whether some copy of it is in parts."""
        return self.num_copies < len(self.copies)

    @cached_property
    def num_copies(self) -> int:
        every = isinstance(self.copies, range)  # each is another copy
        return len(self.copies) if every else len(set(self.copies))

    @cached_property
    def largest(self) -> int:
        """Elements of the largest box."""
        return max(box.numel for box in self.boxes) if self.is_sharded else math.prod(self.shape)


def whole_box(shape: Sequence[int]) -> Box:
    return Box((0,) * len(shape), tuple(shape))


def placement_of(
    tensor: Tensor, name: Name, process_group: "ProcessGroup | None" = None
) -> Placement:
    """Return the placement of a parameter.

    Args:
        process_group: whose ranks hold a copy each of a plain tensor; None: this process is alone.

    Raises:
        ValueError: a placement that does not give every rank a box of the tensor.
    """
    shape = tuple(tensor.shape)
    if not is_dtensor(tensor):
        return replicated(shape, process_group)
    placement = mesh_placement(shape, tensor.device_mesh, tensor.placements, name)
    box, found = placement.boxes[placement.me], tuple(local(tensor).shape)
    if box.numel != local(tensor).numel() or (box.numel and box.size != found):
        raise ValueError(
            f"parameter {name!r} of shape {shape}, placed as "
            f"{tensor.placements}, should have a local part of shape {box.size}, got {found}: "
            "only shards as torch.chunk cuts them are known here"
        )
    return placement


def replicated(shape: tuple[int, ...], group: "ProcessGroup | None") -> Placement:
    """Every member of the group holds all of it."""
    if group is None or group.size() == 1:
        return Placement(shape, None, (whole_box(shape),), (0,))
    every = range(group.size())
    boxes = (whole_box(shape),) * len(every)
    return Placement(shape, group, boxes, every, SubGroup(group, every))


def mesh_placement(
    shape: tuple[int, ...], mesh: Any, placements: Sequence[Any], name: Name
) -> Placement:
    """Return the placement of a DTensor over its mesh.

    Raises:
        ValueError: a placement that is neither a shard nor a replica.
    """
    for placement in placements:
        if not (placement.is_replicate() or hasattr(placement, "dim")):
            raise ValueError(
                f"parameter {name!r} is placed as {placement}: shard or replicate it instead"
            )
    if mesh.size() == 1:
        return replicated(shape, None)
    boxes, copies = boxes_over(shape, mesh, tuple(placements))
    return Placement(shape, group_of(mesh), boxes, copies, *lines_of(mesh, placements))


@functools.lru_cache(maxsize=256)  # many tensors are alike, and there may be thousands of ranks
def boxes_over(
    shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]
) -> tuple[tuple[Box, ...], tuple[int, ...]]:
    """The box of each member of a mesh, and the copy that it is of."""
    sizes, boxes, copies = tuple(mesh.shape), [], []
    known: dict[tuple[int, ...], Box] = {}
    for coordinate in coordinates_of(mesh):
        copy, part = 0, []
        for position, size, placement in zip(coordinate, sizes, placements, strict=True):
            if placement.is_replicate():
                copy = copy * size + position
            else:
                part.append(position)
        if tuple(part) not in known:
            known[tuple(part)] = box_at(shape, sizes, coordinate, placements)
        boxes.append(known[tuple(part)])
        copies.append(copy)
    return tuple(boxes), tuple(copies)


def lines_of(mesh: Any, placements: Sequence[Any]) -> tuple[SubGroup | None, SubGroup | None]:
    """`Placement.across` and `Placement.within` of a DTensor, of groups that its mesh has."""
    group = group_of(mesh)
    every = SubGroup(group, range(group.size()))
    sizes = tuple(mesh.shape)  # `mesh.mesh` makes a tensor each time
    axes = [axis for axis, size in enumerate(sizes) if size > 1]
    replicating = [axis for axis in axes if placements[axis].is_replicate()]
    sharding = [axis for axis in axes if axis not in replicating]
    if not sharding:
        return every, None
    if len(replicating) != 1:
        return None, None
    within = line_along(mesh, sharding[0], group) if len(sharding) == 1 else every
    return line_along(mesh, replicating[0], group), within


def line_along(mesh: Any, axis: int, group: "ProcessGroup") -> SubGroup:
    """This process's line of the mesh along one of its dimensions."""
    line = mesh.get_group(axis)
    ranks = (tuple(dist.get_process_group_ranks(each)) for each in (line, group))
    return SubGroup(line, places(*ranks))


@functools.lru_cache(maxsize=16)
def places(ranks: tuple[int, ...], among: tuple[int, ...]) -> tuple[int, ...]:
    where = {rank: place for place, rank in enumerate(among)}
    return tuple(where[rank] for rank in ranks)


@functools.lru_cache(maxsize=16)
def coordinates_of(mesh: Any) -> tuple[tuple[int, ...], ...]:
    """Where in the mesh each member of its group is, by its rank in the group."""
    group = group_of(mesh)
    every = itertools.product(*map(range, mesh.shape))
    ranks = mesh.mesh.flatten().tolist()
    found = {
        dist.get_group_rank(group, rank): coordinate
        for rank, coordinate in zip(ranks, every, strict=True)
    }
    return tuple(found[member] for member in range(len(found)))


def box_at(
    shape: tuple[int, ...],
    sizes: tuple[int, ...],
    coordinate: tuple[int, ...],
    placements: Sequence[Any],
) -> Box:
    """What the rank at a mesh coordinate holds: chunks of chunks, cut as torch.chunk does."""
    start, size = [0] * len(shape), list(shape)
    shards = [axis for axis, placement in enumerate(placements) if not placement.is_replicate()]
    # FSDP2 cuts what tensor parallelism has cut before, although its mesh dimension comes first.
    for axis in sorted(shards, key=lambda axis: hasattr(placements[axis], "split_factor")):
        dim = placements[axis].dim
        chunk = math.ceil(size[dim] / sizes[axis])
        first = min(chunk * coordinate[axis], size[dim])
        start[dim] += first
        size[dim] = min(chunk, size[dim] - first)
    return Box(tuple(start), tuple(size))


def group_of(mesh: Any) -> "ProcessGroup":
    """The process group of all ranks of a mesh. A collective of theirs, the first time."""
    if mesh.ndim == 1:
        group: ProcessGroup = mesh.get_group()
        return group
    world = dist.group.WORLD
    assert world is not None
    if mesh.size() == world.size():
        return world
    ranks = tuple(sorted(mesh.mesh.flatten().tolist()))
    if (world, ranks) not in GROUPS:
        GROUPS[world, ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
    return GROUPS[world, ranks]


# Of meshes with several dimensions that are not all the world.
GROUPS: dict[Any, "ProcessGroup"] = {}
