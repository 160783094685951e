"""How a step's work is cut: its layers, and their chunks in groups.

A step touches every element twice: to take the norms, and again once the trust ratios are known. On
a CPU both go over groups of chunks small enough to stay in the cache through all operations; on
accelerators, where every operation is a kernel launch, a group is as large as memory allows. The
cut depends only on which parameters have gradients; it is made once and kept.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from largebatch.optim.base import Group
from largebatch.optim.math.tensors import (
    CPU_STRETCH,
    Tensors,
    compute_dtype,
    norm_in_stretches,
    on_device,
    squares_dtype,
    write,
)
from largebatch.optim.sharding.layout import Layout, Name, Piece, Reduction, local

# Elements in a group of chunks: on a CPU a few FP32 tensors of it stay in the cache, and each
# operation takes long against its start on all cores; on an accelerator it bounds the temporary
# memory of a step to a few GiB.
CPU_CHUNK_ELEMENTS = 1 << 20
DEVICE_CHUNK_ELEMENTS = 1 << 28


@dataclass(frozen=True)
class Chunk:
    """A stretch of one parameter's local tensor, within one layer."""

    param: Tensor
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
    members: list[Chunk] = field(default_factory=list)
    numel: int = 0
    longest: int = 0
    """Number of elements in the longest chunk."""
    start: int = 0
    """Number of elements in the groups before it of the same device and dtype."""

    def add(self, chunk: Chunk) -> None:
        self.members.append(chunk)
        self.numel += chunk.numel
        self.longest = max(self.longest, chunk.numel)

    def takes(self, chunk: Chunk) -> bool:
        limit = CPU_CHUNK_ELEMENTS if self.device.type == "cpu" else DEVICE_CHUNK_ELEMENTS
        return self.numel + chunk.numel <= limit

    def cut(self, tensor_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """The chunks, one after the other, of the tensors that `tensor_of` gives for parameters."""
        return [chunk.of(tensor_of(chunk.param)) for chunk in self.members]

    def of_layers(self, values: Tensor) -> Tensor:
        """A vector over all layers as one over the chunks, on their device and in their dtype."""
        first, last = self.members[0].layer, self.members[-1].layer
        if last - first + 1 == len(self.members) == len({chunk.layer for chunk in self.members}):
            taken = values[first : last + 1]
        else:
            taken = torch.stack([values[chunk.layer] for chunk in self.members])
        return taken.to(self.device, self.dtype)


@dataclass(frozen=True)
class GroupReduction:
    """What one process group adds up in a collective."""

    group: "dist.ProcessGroup"
    members: Tensor | None
    """The layers it is for; None: all of them."""
    factor: Tensor | None
    """For each of them 1, or 1 / ranks where ranks hold copies and their mean is meant; None: 1."""


@dataclass
class StepPlan:
    """All layers of an optimizer, and the chunks of those that have a gradient now.

    Vectors over layers have the same length on every rank, and so have the collectives.
    """

    names: list[Name]
    groups: list[tuple[Group, slice]]
    """Each parameter group with its layers."""
    device: torch.device
    dtype: torch.dtype
    moved: list[int]
    """The layers of parameters that have a gradient."""
    params: list[tuple[Group, Tensor]]
    """The parameters that have a gradient, whether or not anything of them is held here."""
    owners: tuple[Tensor, ...]
    """All parameters, kept alive so that no other takes the identity of one."""
    chunk_groups: list[ChunkGroup]
    reductions: list[GroupReduction]
    layer_of_chunk: Tensor | None
    """In the order of the chunk groups; None: chunk i is layer i."""
    stats_dtype: torch.dtype = torch.float32
    """Of norms and ratios as they are shown."""
    flats: list[Tensor] = field(default_factory=list)
    """Parameters that seem to hold several layers, without a layout bound to them."""

    def squares(self, norms: list[Tensor]) -> Tensor:
        """Local sum of squares of each layer, from the norms of all chunks, in order.

        The norms may lie on several devices and are FP32 or wider; the result is a new vector.
        """
        whole = torch.zeros(len(self.names), dtype=self.dtype, device=self.device)
        if not norms:
            return whole
        if len({(norm.device, norm.dtype) for norm in norms}) > 1:
            norms = [norm.to(self.device, self.dtype) for norm in norms]
        values = torch.stack(norms).to(self.device, self.dtype).square_()
        if self.layer_of_chunk is None:
            return values
        return whole.index_add_(0, self.layer_of_chunk, values)

    def complete(self, sums: Tensor, flag: Tensor | None = None) -> Tensor:
        """The local sums of each layer summed over ranks: one collective for each process group.

        Args:
            sums: shape (layers, …).
            flag: 0-d, travels along: non-zero afterwards, on every rank, where it was so on any.
        """
        for reduction in self.reductions:
            part = sums if reduction.members is None else sums[reduction.members]
            sent = part.reshape(-1)
            if flag is not None:
                sent = torch.cat([sent, flag.to(sent).reshape(1)])
            dist.all_reduce(sent, group=reduction.group)
            if flag is not None:
                flag.copy_(sent[-1])
                sent = sent[:-1]
            part = sent.view(part.shape)
            if reduction.factor is not None:
                part = part * reduction.factor.view(-1, *[1] * (part.dim() - 1))
            sums = (
                part if reduction.members is None else sums.index_copy(0, reduction.members, part)
            )
        return sums


def build_step_plan(groups: Iterable[Group], layouts: Mapping[Tensor, Layout]) -> StepPlan:
    """Plan a step for the parameters that have a gradient now."""
    names: list[Name] = []
    spans: list[tuple[Group, slice]] = []
    moved: list[int] = []
    params: list[tuple[Group, Tensor]] = []
    chunks: list[tuple[Group, Chunk]] = []
    reduced: dict[str, list[tuple[Reduction, int]]] = {}
    for group in groups:
        start = len(names)
        for param in group["params"]:
            layout, first = layouts[param], len(names)
            layers = range(first, first + len(layout.layers))
            names += layout.layers
            for reduction in layout.reductions:
                entries = reduced.setdefault(reduction.group.group_name, [])
                entries += [(reduction, layer) for layer in layers]
            if param.grad is not None:
                moved += layers
                params.append((group, param))
                chunks += [(group, chunk) for chunk in chunks_of(param, layout, first)]
        spans.append((group, slice(start, len(names))))
    chunk_groups = chunk_groups_of(chunks)
    device = local(next(iter(layouts))).device if layouts else torch.device("cpu")
    wide = any(compute_dtype(param) == torch.float64 for param in layouts)
    stats_dtype = torch.float64 if wide else torch.float32
    dtype = squares_dtype(device, stats_dtype)
    layer_of_chunk = [chunk.layer for chunk_group in chunk_groups for chunk in chunk_group.members]
    # Sums before means, so that a mean is over copies of a sum that is complete.
    ordered = sorted(reduced.values(), key=lambda entries: any(r.mean for r, _ in entries))
    return StepPlan(
        names=names,
        groups=spans,
        device=device,
        dtype=dtype,
        moved=moved,
        params=params,
        owners=tuple(layouts),
        chunk_groups=chunk_groups,
        reductions=[group_reduction(entries, len(names), device, dtype) for entries in ordered],
        layer_of_chunk=index(layer_of_chunk, len(names), device),
        stats_dtype=stats_dtype,
    )


def group_reduction(
    entries: list[tuple[Reduction, int]], num_layers: int, device: torch.device, dtype: torch.dtype
) -> GroupReduction:
    """One collective for the layers that are reduced over one process group."""
    group = entries[0][0].group
    factors = [1 / group.size() if reduction.mean else 1.0 for reduction, _ in entries]
    return GroupReduction(
        group=group,
        members=index([layer for _, layer in entries], num_layers, device),
        factor=None if set(factors) == {1.0} else torch.tensor(factors, device=device, dtype=dtype),
    )


def chunks_of(param: Tensor, layout: Layout, first: int) -> Iterable[Chunk]:
    """Yield this rank's chunks of a parameter's layers, whose first has index `first`."""
    tensor = local(param)
    limit = CPU_CHUNK_ELEMENTS if tensor.device.type == "cpu" else DEVICE_CHUNK_ELEMENTS
    for piece in (None,) if layout.pieces is None else layout.pieces:
        stretch = tensor if piece is None else tensor.narrow(piece.dim, piece.start, piece.length)
        layer, numel = first + (0 if piece is None else piece.layer), stretch.numel()
        if numel <= limit or not (tensor.is_contiguous() and stretch.is_contiguous()):
            if numel:
                yield Chunk(param, layer, numel, piece, None)
            continue
        for start in range(0, numel, limit):
            end = min(start + limit, numel)
            yield Chunk(param, layer, end - start, piece, slice(start, end))


def chunk_groups_of(chunks: Iterable[tuple[Group, Chunk]]) -> list[ChunkGroup]:
    """Put the chunks in groups of one parameter group, device and dtype, of limited size."""
    chunk_groups: list[ChunkGroup] = []
    open_groups: dict[Any, ChunkGroup] = {}
    for group, chunk in chunks:
        tensor = local(chunk.param)
        key = (id(group), tensor.device, tensor.dtype, in_order(chunk))
        chunk_group = open_groups.get(key)
        if chunk_group is None or not chunk_group.takes(chunk):
            chunk_group = ChunkGroup(group, tensor.device, compute_dtype(tensor), in_order(chunk))
            chunk_groups.append(chunk_group)
            open_groups[key] = chunk_group
        chunk_group.add(chunk)
    ends: dict[Any, int] = {}
    for chunk_group in chunk_groups:
        chunk_group.start = ends.get((chunk_group.device, chunk_group.dtype), 0)
        ends[chunk_group.device, chunk_group.dtype] = chunk_group.start + chunk_group.numel
    return chunk_groups


def in_order(chunk: Chunk) -> bool:
    """Whether the chunk is contiguous, and cut from a contiguous tensor, as others like it are."""
    tensor = local(chunk.param)
    return tensor.is_contiguous() and chunk.of(tensor).is_contiguous()


def index(members: list[int], length: int, device: torch.device) -> Tensor | None:
    """`members` as an index; None where they are 0, 1, …, length - 1 already."""
    return None if members == list(range(length)) else torch.tensor(members, device=device)


def norms_of(group: ChunkGroup, chunks: Tensors) -> Tensors:
    """‖chunk‖₂ of each, finite where the chunk is: a square of 1e20 is beyond FP32.

    An accelerator adds squares up in FP64. A CPU, which is slow at that, does so only where FP32
    has overflowed, or where a chunk has no stretches: it adds up in sequence, which loses digits
    over many FP32 numbers, and so takes the norm of the norms of short stretches.
    """
    if group.device.type != "cpu" or not group.contiguous:
        return torch._foreach_norm(chunks, 2, dtype=squares_dtype(group.device, group.dtype))
    if group.longest <= CPU_STRETCH:
        norms: Tensors = torch._foreach_norm(chunks, 2, dtype=group.dtype)
    else:
        norms = [norm_in_stretches(chunk, group.dtype) for chunk in chunks]
    if group.dtype == torch.float64 or math.inf not in torch.stack([*norms]).tolist():
        return norms
    return torch._foreach_norm(chunks, 2, dtype=torch.float64)


def descend(
    group: ChunkGroup, weights: Tensors, steps: Tensors, scale: float | Tensor, skip: Tensor | None
) -> None:
    """w ← w - scale · step for every chunk, and the parameters with them; nothing where `skip`.

    Args:
        weights: what `_weights` gave, in the chunk group's dtype.
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
    if weights[0].dtype != group.members[0].param.dtype:
        write(group.cut(local), weights, skip)
