"""A step's plan: its layers, the chunks of those that have a gradient, and what ranks add up.

A step touches every element twice: to take the norms, and again once the trust ratios are known.
Where no rank has to be heard, a CPU makes the second pass over a group of chunks right after the
first, while they are in a cache; else all groups are passed over together, a *wave*. The plan
depends only on which parameters have gradients; it is made once and kept.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from largebatch.optim.base import Group
from largebatch.optim.layerwise.chunks import (
    KEPT_IN_PACKS,
    Chunk,
    ChunkGroup,
    Way,
    chunk_groups_of,
    chunks_of,
    way_of,
)
from largebatch.optim.math.tensors import compute_dtype, squares_dtype
from largebatch.optim.sharding.layout import Layout, Name, Reduction, local


@dataclass(frozen=True)
class GroupReduction:
    """What one process group adds up in a collective."""

    group: "dist.ProcessGroup"
    members: Tensor | None
    """The layers it is for; None: all of them."""
    factor: Tensor | None
    """For each of them 1, or 1 / ranks where ranks hold copies and their mean is meant; None: 1."""


@dataclass(frozen=True)
class Wave:
    """Chunk groups whose passes are made together."""

    groups: list[ChunkGroup]
    layer_of_chunk: Tensor | None
    """In the order of the groups; None: chunk i is layer i, and all are there."""
    is_whole: bool
    """Whether it is one group, each chunk of it a layer of which no other rank has anything."""


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
    waves: list[Wave]
    all_groups: Wave
    """Of all waves, in order."""
    reductions: list[GroupReduction]
    whole_layers: Tensor | None
    """Of the chunks of the waves of whole layers; None: chunk i is layer i, and all are there."""
    on_cpu: bool
    """Whether all parameters are on the host, which may read any value then."""
    stats_dtype: torch.dtype = torch.float32
    """Of norms and ratios as they are shown."""
    flats: list[Tensor] = field(default_factory=list)
    """Parameters that seem to hold several layers, without a layout bound to them."""

    @cached_property
    def chunks(self) -> list[Chunk]:
        """All chunks, in order."""
        return [chunk for chunk_group in self.all_groups.groups for chunk in chunk_group.members]

    @cached_property
    def numel(self) -> int:
        """Elements of all chunks."""
        return sum(chunk.numel for chunk in self.chunks)

    def squares(self, wave: Wave, norms: list[Tensor]) -> Tensor:
        """Local sum of squares of each layer, 0 for those that are not in the wave.

        Args:
            norms: of the chunks, a vector for each group, on whatever device, in FP32 or wider.

        Returns:
            A new vector.
        """
        whole = torch.zeros(len(self.names), dtype=self.dtype, device=self.device)
        if not norms:
            return whole
        values = torch.cat([norm.to(self.device, self.dtype) for norm in norms]).square_()
        if wave.layer_of_chunk is None:
            return values
        return whole.index_add_(0, wave.layer_of_chunk, values)

    def with_whole(
        self, found: list[tuple[Tensor, ...]], others: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, ...]:
        """Vectors over all layers of what the waves of whole layers have found.

        Args:
            found: vectors over the chunks of each such wave, in order.
            others: vectors over all layers, which hold for those in no such wave.
        """
        columns = [torch.cat([*column]) for column in zip(*found, strict=True)]
        if self.whole_layers is None:
            return tuple(columns)
        if others is None:
            others = tuple(column.new_zeros(len(self.names)) for column in columns)
        pairs = zip(others, columns, strict=True)
        return tuple(each.index_copy(0, self.whole_layers, column) for each, column in pairs)

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


def key_of(
    groups: Sequence[Group],
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    has_cpu_way: Callable[[Group], bool],
) -> tuple[object, ...]:
    """Return what a plan depends on; made in every step."""
    return (
        tuple([
            (id(group), len(group["params"]), group["norm_groups"], group["norm_dim"],
             has_cpu_way(group))
            for group in groups
        ]),
        tuple(map(id, params)),
        tuple([grad is None for grad in grads]),
        tuple([param.dtype for param in params]),
        tuple([param.device for param in params]),
        tuple(map(Tensor.size, params)),
        tuple(map(Tensor.stride, params)),  # of all: what lies in order decides how it is cut
    )  # fmt: skip


def build_step_plan(
    groups: Iterable[Group],
    layouts: Mapping[Tensor, Layout],
    has_cpu_way: Callable[[Group], bool],
) -> StepPlan:
    """Plan a step for the parameters that have a gradient now.

    Args:
        has_cpu_way: whether a group's options are such that a CPU may pack and stream.
    """
    names: list[Name] = []
    spans: list[tuple[Group, slice]] = []
    moved: list[int] = []
    params: list[tuple[Group, Tensor]] = []
    chunks: list[tuple[Group, Chunk, Way]] = []
    reduced: dict[str, list[tuple[Reduction, int]]] = {}
    on_cpu = all(local(param).device.type == "cpu" for param in layouts)
    for group in groups:
        start, own_way = len(names), on_cpu and has_cpu_way(group)
        for param in group["params"]:
            layout, first = layouts[param], len(names)
            layers = range(first, first + len(layout.layers))
            names += layout.layers
            for reduction in layout.reductions:
                entries = reduced.setdefault(reduction.group.group_name, [])
                entries += [(reduction, layer) for layer in layers]
            if param.grad is not None:
                moved += layers
                for chunk in chunks_of(param, layout, len(params), first, whole=own_way):
                    way = way_of(chunk) if own_way else Way.GENERAL
                    chunks.append((group, chunk, way))
                params.append((group, param))
        spans.append((group, slice(start, len(names))))
    device = local(next(iter(layouts))).device if layouts else torch.device("cpu")
    wide = any(compute_dtype(param) == torch.float64 for param in layouts)
    stats_dtype = torch.float64 if wide else torch.float32
    dtype = squares_dtype(device, stats_dtype)

    def wave_of(groups: list[ChunkGroup], *, is_whole: bool = False) -> Wave:
        return Wave(groups, index(layers_of(groups), len(names), device), is_whole)

    whole, rest = waves_of(chunks, has_reductions=bool(reduced))
    waves = [wave_of([each], is_whole=True) for each in whole]
    if rest or reduced:  # where others hold something of a layer, all take part
        waves.append(wave_of(rest))
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
        waves=waves,
        all_groups=wave_of([*whole, *rest]),
        reductions=[group_reduction(entries, len(names), device, dtype) for entries in ordered],
        whole_layers=index(layers_of(whole), len(names), device),
        on_cpu=on_cpu,
        stats_dtype=stats_dtype,
    )


def waves_of(
    chunks: list[tuple[Group, Chunk, Way]], *, has_reductions: bool
) -> tuple[list[ChunkGroup], list[ChunkGroup]]:
    """Put the chunks in groups: those that hold whole layers, of which no other rank has anything,
    and all others.
    """
    # Those of one length are neighbours.
    packed = sorted((e for e in chunks if e[2] is Way.PACKED), key=lambda entry: entry[1].numel)
    others = [entry for entry in chunks if entry[2] is not Way.PACKED]
    if has_reductions:  # packs are kept until the ranks have been heard
        ends = accumulate(chunk.numel for _, chunk, _ in packed)
        packed = [
            entry if end <= KEPT_IN_PACKS else (*entry[:2], Way.STREAMED)
            for entry, end in zip(packed, ends, strict=True)
        ]
        return [], chunk_groups_of([*packed, *others])
    groups = chunk_groups_of([*packed, *others])
    whole = [each for each in groups if each.way is not Way.GENERAL]
    for chunk_group in whole:
        chunk_group.start = 0  # each has the working memory to itself
    return whole, [each for each in groups if each.way is Way.GENERAL]


def layers_of(groups: list[ChunkGroup]) -> list[int]:
    return [layer for chunk_group in groups for layer in chunk_group.layers]


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


def index(members: list[int], length: int, device: torch.device) -> Tensor | None:
    """`members` as an index; None where they are 0, 1, …, length - 1 already."""
    return None if members == list(range(length)) else torch.tensor(members, device=device)
