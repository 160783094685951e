"""What a step is cut into: chunks of layers, in groups that are worked on together.

On accelerators, where every operation is a kernel launch, a group of chunks is as large as memory
allows. On a CPU groups are small enough for its caches; `cpu_blocks` says how they are worked on.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from largebatch.optim.base import Group
from largebatch.optim.layerwise.cpu_blocks import (
    PACK,
    PACKED_AT_MOST,
    STREAMED_TOGETHER,
    Pack,
    padded,
)
from largebatch.optim.math.tensors import (
    CPU_STRETCH,
    Tensors,
    compute_dtype,
    norm_in_stretches,
    on_device,
    squares_dtype,
    write,
)
from largebatch.optim.sharding.layout import Layout, Piece, local

Value = TypeVar("Value")

# Elements in a group of chunks that is worked on in the general way: on a CPU a few FP32 tensors of
# it stay in the cache, and each operation takes long against its start on all cores; on an
# accelerator it bounds the temporary memory of a step to a few GiB.
CPU_CHUNK_ELEMENTS = 1 << 20
DEVICE_CHUNK_ELEMENTS = 1 << 28

# Elements that may be packed where all packs have to be kept until the ranks have been heard.
KEPT_IN_PACKS = 1 << 22


class Way(Enum):
    """How the chunks of a group are worked on."""

    GENERAL = "by operations on lists of chunks, on any device"
    PACKED = "on a CPU, laid end to end"
    STREAMED = "on a CPU, block by block"


@dataclass(frozen=True)
class Chunk:
    """A stretch of one parameter's local tensor, within one layer."""

    param: Tensor
    place: int
    """Index into `StepPlan.params`."""
    layer: int
    """Index into `StepPlan.names`."""
    numel: int
    piece: Piece | None
    """None: the whole local tensor."""
    flat: slice | None
    """Of the piece laid out flat; None: all of it, in its own shape."""

    def of(self, tensor: Tensor) -> Tensor:
        """The chunk of a tensor shaped like the parameter's local one, a view."""
        if self.piece is not None:
            tensor = tensor.narrow(self.piece.dim, self.piece.start, self.piece.length)
        return tensor if self.flat is None else tensor.view(-1)[self.flat]


@dataclass
class ChunkGroup:
    """Chunks of one parameter group, device and dtype that are worked on together."""

    group: Group
    device: torch.device
    dtype: torch.dtype
    """Of the arithmetic: FP32, or FP64 for FP64 parameters."""
    contiguous: bool
    """Whether every chunk is contiguous in memory, and so are gradients and state cut like it."""
    way: Way = Way.GENERAL
    members: list[Chunk] = field(default_factory=list)
    numel: int = 0
    longest: int = 0
    """Number of elements in the longest chunk."""
    start: int = 0
    """Number of elements in the groups before it that are worked on in the same way and dtype."""

    def add(self, chunk: Chunk) -> None:
        self.members.append(chunk)
        self.numel += chunk.numel
        self.longest = max(self.longest, chunk.numel)

    def takes(self, chunk: Chunk) -> bool:
        limits = {
            Way.PACKED: PACK,
            Way.STREAMED: STREAMED_TOGETHER,
            Way.GENERAL: limit_of(self.device),
        }
        return self.numel + chunk.numel <= limits[self.way]

    @cached_property
    def pack(self) -> Pack:
        """How the chunks lie end to end; to be asked once all are there."""
        return Pack([chunk.of(local(chunk.param)).shape for chunk in self.members])

    @cached_property
    def states(self) -> dict[str, tuple[Tensor, list[Tensor]]]:
        """State of a pack's parameters that lies end to end, and its entries, by key."""
        return {}

    @cached_property
    def layers(self) -> list[int]:
        return [chunk.layer for chunk in self.members]

    @cached_property
    def whole_places(self) -> list[int] | None:
        """The members' places, where each is all of its parameter's local tensor; else None."""
        if all(chunk.piece is None and chunk.flat is None for chunk in self.members):
            return [chunk.place for chunk in self.members]
        return None

    def cut(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The chunks, one after the other, of local tensors that lie as `StepPlan.params`."""
        if self.whole_places is not None:
            return [tensors[place] for place in self.whole_places]
        return [chunk.of(tensors[chunk.place]) for chunk in self.members]

    def of_places(self, values: Sequence[Value]) -> list[Value]:
        """Of values by place, those of the members."""
        return [values[chunk.place] for chunk in self.members]

    def cut_each(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The chunks of as many tensors, each shaped like a member's parameter, local or not."""
        return [
            chunk.of(local(tensor)) for chunk, tensor in zip(self.members, tensors, strict=True)
        ]

    def of_layers(self, values: Tensor) -> Tensor:
        """A vector over all layers as one over the chunks, on their device and in their dtype."""
        first = self.layers[0]
        if self.layers == list(range(first, first + len(self.layers))):
            taken = values[first : first + len(self.layers)]
        elif values.device.type == "cpu":
            taken = values[self.layers]
        else:  # an index would have to be copied there
            taken = torch.stack([values[layer] for layer in self.layers])
        return taken.to(self.device, self.dtype)


def limit_of(device: torch.device) -> int:
    """Elements of a chunk group, in the general way."""
    return CPU_CHUNK_ELEMENTS if device.type == "cpu" else DEVICE_CHUNK_ELEMENTS


def chunks_of(
    param: Tensor, layout: Layout, place: int, first: int, *, whole: bool
) -> Iterable[Chunk]:
    """Yield this rank's chunks of a parameter's layers, whose first has index `first`.

    Args:
        place: of the parameter among those of the step.
        whole: leave a layer that is contiguous in one chunk, whatever its size.
    """
    tensor = local(param)
    limit = limit_of(tensor.device)
    for piece in (None,) if layout.pieces is None else layout.pieces:
        stretch = tensor if piece is None else tensor.narrow(piece.dim, piece.start, piece.length)
        layer, numel = first + (0 if piece is None else piece.layer), stretch.numel()
        if whole or numel <= limit or not (tensor.is_contiguous() and stretch.is_contiguous()):
            if numel:
                yield Chunk(param, place, layer, numel, piece, None)
            continue
        for start in range(0, numel, limit):
            end = min(start + limit, numel)
            yield Chunk(param, place, layer, end - start, piece, slice(start, end))


def chunk_groups_of(
    chunks: Iterable[tuple[Group, Chunk, Way]],
) -> list[ChunkGroup]:
    """Put the chunks in groups of one parameter group, device, dtype and way, of limited size."""
    chunk_groups: list[ChunkGroup] = []
    open_groups: dict[Any, ChunkGroup] = {}
    for group, chunk, way in chunks:
        tensor = local(chunk.param)
        key = (id(group), tensor.device, tensor.dtype, in_order(chunk), way)
        chunk_group = open_groups.get(key)
        if chunk_group is None or not chunk_group.takes(chunk):
            chunk_group = ChunkGroup(
                group, tensor.device, compute_dtype(tensor), in_order(chunk), way
            )
            chunk_groups.append(chunk_group)
            open_groups[key] = chunk_group
        chunk_group.add(chunk)
    ends: dict[Any, int] = {}
    for chunk_group in chunk_groups:
        alike = chunk_group.device, chunk_group.dtype, chunk_group.way
        chunk_group.start = ends.get(alike, 0)
        ends[alike] = chunk_group.start + padded(chunk_group.numel)
    return chunk_groups


def in_order(chunk: Chunk) -> bool:
    """Whether the chunk is contiguous, and cut from a contiguous tensor, as others like it are."""
    tensor = local(chunk.param)
    return tensor.is_contiguous() and chunk.of(tensor).is_contiguous()


def way_of(chunk: Chunk) -> Way:
    """How a CPU works on a chunk, of a group whose options allow it."""
    if not in_order(chunk):
        return Way.GENERAL
    return Way.PACKED if chunk.numel <= PACKED_AT_MOST else Way.STREAMED


def norms_of(group: ChunkGroup, chunks: Tensors) -> Tensor:
    """‖chunk‖₂ of each, a vector, finite where the chunk is: a square of 1e20 is beyond FP32.

    An accelerator adds squares up in FP64. A CPU, which is slow at that, does so only where FP32
    has overflowed, or where a chunk has no stretches: it adds up in sequence, which loses digits
    over many FP32 numbers, and so takes the norm of the norms of short stretches.
    """
    if group.device.type != "cpu" or not group.contiguous:
        wide = squares_dtype(group.device, group.dtype)
        return torch.stack([*torch._foreach_norm(chunks, 2, dtype=wide)])
    if group.longest <= CPU_STRETCH:
        norms = torch.stack([*torch._foreach_norm(chunks, 2, dtype=group.dtype)])
    else:
        norms = torch.stack([norm_in_stretches(chunk, group.dtype) for chunk in chunks])
    if group.dtype == torch.float64 or math.inf not in norms.tolist():
        return norms
    return torch.stack([*torch._foreach_norm(chunks, 2, dtype=torch.float64)])


def descend(
    group: ChunkGroup,
    weights: Tensors,
    params: Tensors,
    steps: Tensors,
    scale: float | Tensor,
    skip: Tensor | None,
) -> None:
    """w ← w - scale · step for every chunk, and the parameters with them; nothing where `skip`.

    Args:
        weights: in the chunk group's dtype.
        params: of which the weights are wider copies, or the weights themselves.
        scale: one number for all, or a vector with one for each chunk.
        skip: 0-d bool or None.
    """
    moved = weights if skip is None else [weight.clone() for weight in weights]
    if isinstance(scale, Tensor):
        scales = on_device(scale, group.device).to(group.dtype) if scale.dim() == 0 else scale
        each = [scales] * len(steps) if scale.dim() == 0 else scales.unbind()
        torch._foreach_addcmul_(moved, steps, each, value=-1)
    else:
        torch._foreach_add_(moved, steps, alpha=-scale)
    if skip is not None:
        write(weights, moved, skip)
    if weights[0].dtype != params[0].dtype:
        write(params, weights, skip)
