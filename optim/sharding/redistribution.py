"""Moves tensors between the ranks that hold parts of them and the ranks that work on them.

Second-order optimizers work on whole blocks of a gradient, while a rank may hold a few rows of it.
A block has one owner: the gradient's parts travel to it, and what the owner makes of the block
travels back to all that hold a part of the parameter. Both in rounds of bounded size
(`sharding.rounds`): what a rank has in hand does not grow with the number of ranks.

A round has at most two hops. Within one copy of the tensor, the owner's, parts travel by
`all_to_all_single`. From there to the other copies likewise, as long as owners do not repeat
themselves too much; else as a sum of bit patterns, to which all but one rank add zeros. A sum over
tens of thousands of ranks is what every library is fast at, it asks for no equal shares, and as
whole numbers it keeps each bit, those of -0.0 and NaN too.

What travels, and how much, depends on the parameters alone, not on which of them have a gradient in
a step or on a rank: ranks that disagree about that still issue the same collectives. A vector to be
summed over all ranks goes ahead in an all-reduce, by which the ranks agree.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Final, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from largebatch.optim.sharding.layout import Name
from largebatch.optim.sharding.placement import Box, SubGroup
from largebatch.optim.sharding.rounds import Round, ShardedTensor, Slice, To, limit_of, rounds_of

Arrived = tuple[Slice, Tensor]

FEW: Final = 64
"""Ranks that send to each of the others; among more, that many messages take too long."""


class Redistribution:
    """Moves tensors that lie over one process group to the owners of their blocks and back.

    Args:
        dtype: what travels, and what comes out, FP32 or FP64; wide enough for all of the tensors.
        device: where the group's collectives take and leave tensors.

    Raises:
        ValueError: tensors of different groups.
    """

    def __init__(
        self,
        tensors: Sequence[ShardedTensor],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.tensors = tuple(tensors)
        self.dtype, self.device = dtype, torch.device(device)
        groups = {id(tensor.placement.group): tensor.placement.group for tensor in tensors}
        if len(groups) > 1:
            raise ValueError("an exchange is over one process group, got tensors of several")
        self.group = next(iter(groups.values()), None)
        self.me = 0 if self.group is None else self.group.rank()
        self.limit = limit_of(self.tensors)
        self.rounds = rounds_of(self.tensors, self.me, self.limit)

    def to_owners(
        self, parts: Sequence[Tensor | None], sums: Tensor | None = None
    ) -> tuple[list[dict[int, Tensor]], Tensor | None]:
        """Return every block that this rank owns, whole, from the parts that all ranks hold.

        Where the tensors are copies on every rank nothing has to travel but the sums.

        Args:
            parts: this rank's local part of each tensor; None stands for zeros.
            sums: a vector, as long on every rank, to be added up over all of them.

        Returns:
            For each tensor its blocks by their index, not to be written to; and the sums, with the
            same bits on every rank.
        """
        totals = self._add_up(sums)

        def part_of(piece: Slice) -> Tensor | None:
            part, placement = parts[piece.tensor], self.tensors[piece.tensor].placement
            return None if part is None else piece.box.of(part, placement.boxes[self.me])

        found: list[dict[int, Tensor]] = [{} for _ in self.tensors]
        for one in self.rounds:
            for piece, part in self._swap(one.within, one.to_owner, one.from_holder, part_of):
                block, blocks = self.tensors[piece.tensor].blocks[piece.block], found[piece.tensor]
                if piece.box == block:
                    blocks[piece.block] = part
                    continue
                if piece.block not in blocks:
                    blocks[piece.block] = self._zeros(block)
                piece.box.of(blocks[piece.block], block).copy_(part)
        return found, totals

    def to_holders(
        self, blocks: Sequence[Mapping[int, Tensor]], sums: Tensor | None = None
    ) -> tuple[Iterator[Arrived], Tensor | None]:
        """Return the pieces of this rank's part of every tensor, from the blocks of all owners.

        They arrive one after another, those of a tensor together, and only while they are taken:
        every rank has to take all of them, before it begins another collective of the group.

        Args:
            blocks: for each tensor the blocks that this rank owns, by index, shaped like them;
                one that is missing stands for zeros.
            sums: as for `to_owners`.

        Returns:
            The pieces, not to be written to nor kept, and the sums.
        """
        return self._pieces(blocks), self._add_up(sums)

    def joined(self, pieces: Iterable[Arrived]) -> Iterator[tuple[int, Tensor]]:
        """Yield this rank's part of each tensor with its index, from the pieces of `to_holders`."""
        boxes = [tensor.placement.boxes[self.me] for tensor in self.tensors]
        part, missing = torch.empty(0), 0
        for piece, tensor in pieces:
            held = boxes[piece.tensor]
            if piece.box == held:
                yield piece.tensor, tensor
                continue
            if missing == 0:
                part, missing = self._zeros(held), held.numel
            piece.box.of(part, held).copy_(tensor)
            missing -= piece.box.numel
            if missing == 0:  # before the next arrives: this one is not to be kept
                yield piece.tensor, part
        for index, held in enumerate(boxes):
            if held.numel == 0:
                yield index, self._zeros(held)

    def _pieces(self, blocks: Sequence[Mapping[int, Tensor]]) -> Iterator[Arrived]:
        def part_of(piece: Slice) -> Tensor | None:
            block, tensor = blocks[piece.tensor].get(piece.block), self.tensors[piece.tensor]
            return None if block is None else piece.box.of(block, tensor.blocks[piece.block])

        needs = [sum(piece.box.numel for _, piece in one.shared) for one in self.rounds]
        room = torch.empty(max(needs, default=0), dtype=self.dtype, device=self.device)
        for one, need in zip(self.rounds, needs, strict=True):
            near = self._swap(one.within, one.to_holder, one.from_owner, part_of)
            yield from (
                near if one.across is None else self._share(one, one.across, near, room[:need])
            )

    def _add_up(self, sums: Tensor | None) -> Tensor | None:
        if self.group is None or sums is None:
            return sums
        totals = sums.to(self.device, self.dtype, copy=True)
        dist.all_reduce(totals, group=self.group)
        return totals

    def _swap(
        self,
        line: SubGroup | None,
        sends: Sequence[To],
        receives: Sequence[To],
        part_of: Callable[[Slice], Tensor | None],
    ) -> Iterator[Arrived]:
        """What this rank receives in a line, its own too: one collective, or none for one rank."""
        size, me = (1, 0) if line is None else (line.group.size(), line.group.rank())
        sent, received = sizes(sends, size, me), sizes(receives, size, me)
        inbox = torch.empty(sum(received), dtype=self.dtype, device=self.device)
        if line is not None and size > 1:
            outbox = torch.zeros(sum(sent), dtype=self.dtype, device=self.device)
            ends = [0, *accumulate(sent)]
            for rank, piece in sends:
                if rank != me:
                    fill(slot_of(outbox, ends, rank, piece), part_of(piece))
            dist.all_to_all_single(inbox, outbox, received, sent, group=line.group)
            del outbox
        ends = [0, *accumulate(received)]
        for rank, piece in receives:
            if rank != me:
                yield piece, slot_of(inbox, ends, rank, piece)
                continue
            part = part_of(piece)
            yield (
                piece,
                self._zeros(piece.box) if part is None else part.to(self.device, self.dtype),
            )

    def _share(
        self, one: Round, across: SubGroup, near: Iterable[Arrived], room: Tensor
    ) -> Iterator[Arrived]:
        """All pieces of this rank's boxes, from those that each copy has: at most one collective,
        but for a block larger than a round.

        Args:
            room: for all of them.
        """
        have = {(piece.tensor, piece.block): part for piece, part in near}

        def part_of(piece: Slice) -> Tensor | None:
            return have.get((piece.tensor, piece.block))

        if not one.shared:
            return
        size, me = across.group.size(), across.group.rank()
        loads: Counter[int] = Counter()
        for rank, piece in one.shared:
            loads[rank] += piece.box.numel
        # An all-reduce sends twice what there is. The same on all ranks of the line: they have the
        # same boxes.
        if size <= FEW and (size - 1) * max(loads.values()) <= 2 * room.numel():
            mine = [piece for rank, piece in one.shared if rank == me]
            sends = [(rank, piece) for rank in range(size) for piece in mine]
            yield from self._swap(across, sends, one.shared, part_of)
            return
        room.zero_()
        ends = [0]
        for rank, piece in one.shared:
            slot = slot_of(room, ends, 0, piece)
            if rank == me:
                fill(slot, part_of(piece))
        have.clear()
        whole = torch.int64 if self.dtype == torch.float64 else torch.int32
        for stretch in torch.split(room, self.limit):
            dist.all_reduce(stretch.view(whole), group=across.group)
        ends = [0]
        for _, piece in one.shared:
            yield piece, slot_of(room, ends, 0, piece)

    def _zeros(self, box: Box) -> Tensor:
        return torch.zeros(box.size, dtype=self.dtype, device=self.device)


def sizes(pieces: Iterable[To], num_ranks: int, me: int) -> list[int]:
    """How many elements go to each rank, or come from it, this one aside."""
    found = [0] * num_ranks
    for rank, piece in pieces:
        if rank != me:
            found[rank] += piece.box.numel
    return found


def slot_of(box: Tensor, ends: list[int], rank: int, piece: Slice) -> Tensor:
    """The next place for a piece of a rank's, from `ends[rank]` on, which moves."""
    start = ends[rank]
    ends[rank] = start + piece.box.numel
    return box[start : ends[rank]].view(piece.box.size)


def fill(slot: Tensor, part: Tensor | None) -> None:
    if part is not None:
        slot.copy_(part)


class Unit(Protocol):
    """What one rank of a work group works on: a layer."""

    @property
    def name(self) -> Name: ...
    @property
    def dtype(self) -> torch.dtype: ...


Layer = TypeVar("Layer", bound=Unit)


class WorkGroup(Generic[Layer]):
    """Layers that lie over the same ranks; one rank owns each part of the work. `dtype` is FP32, or
    FP64 if any layer needs it, `device` that of all collectives; with `group` None this process
    works alone.
    """

    def __init__(
        self, layers: Sequence[Layer], tensors: Sequence[ShardedTensor], device: torch.device
    ) -> None:
        self.layers = list(layers)
        wide = any(layer.dtype == torch.float64 for layer in self.layers)
        self.dtype = torch.float64 if wide else torch.float32
        self.device = device
        self.redistribution = Redistribution(tensors, self.dtype, device)

    @property
    def group(self) -> "dist.ProcessGroup | None":
        return self.redistribution.group

    @property
    def size(self) -> int:
        """Number of ranks."""
        return 1 if self.group is None else self.group.size()

    @property
    def names(self) -> list[Name]:
        return [layer.name for layer in self.layers]
