"""Moves tensors between the ranks that hold parts of them and the ranks that work on them.

Second-order optimizers work on whole blocks of a gradient, while a rank may hold a few rows of it.
A block has one owner: the gradient's parts travel to it, and what the owner makes of the block
travels back to all that hold a part of the parameter. One collective each way for a process group,
whatever the number of tensors: `all_to_all_single` with split sizes, which gloo, nccl and xccl
have.

What travels, and how much, depends on the parameters alone, not on which of them have a gradient in
a step or on a rank: ranks that disagree about that still issue the same collectives. A vector to be
added up over all ranks travels along, and by it they come to agree.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from largebatch.optim.spread import Box, Spread, whole_box


@dataclass(frozen=True)
class Parcel:
    """A tensor, how it is spread, and who works on which block of it."""

    spread: Spread
    blocks: tuple[Box, ...]
    """Disjoint; together they are the tensor."""
    owners: tuple[int, ...]
    """The owner of each block, by its rank in the group."""


def whole(spread: Spread, owner: int) -> Parcel:
    """A tensor that is worked on in one."""
    return Parcel(spread, (whole_box(spread.shape),), (owner,))


@dataclass(frozen=True)
class Piece:
    """What of one block one member holds."""

    parcel: int
    block: int
    box: Box


@dataclass
class Way:
    """What this rank sends to and receives from every member, itself included, in one direction."""

    sends: list[list[Piece]]
    receives: list[list[Piece]]
    travels: bool
    """Whether any member sends anything to another; the same on every rank."""

    @cached_property
    def sends_sizes(self) -> list[int]:
        return [sum(piece.box.numel for piece in pieces) for pieces in self.sends]

    @cached_property
    def receives_sizes(self) -> list[int]:
        return [sum(piece.box.numel for piece in pieces) for pieces in self.receives]


class Exchange:
    """The way of some tensors, all spread over one process group, to their owners and back.

    Args:
        dtype: what travels, and what comes out; wide enough for all of the tensors.
        device: where the group's collectives take and leave tensors.

    Raises:
        ValueError: tensors of different groups.
    """

    def __init__(
        self,
        parcels: Sequence[Parcel],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.parcels = tuple(parcels)
        self.dtype, self.device = dtype, torch.device(device)
        groups = {id(parcel.spread.group): parcel.spread.group for parcel in parcels}
        if len(groups) > 1:
            raise ValueError("an exchange is over one process group, got tensors of several")
        self.group = next(iter(groups.values()), None)
        self.size = 1 if self.group is None else self.group.size()
        self.me = 0 if self.group is None else self.group.rank()
        self._gather, self._scatter = self._ways()

    def _ways(self) -> tuple[Way, Way]:
        empty: list[list[list[Piece]]] = [[[] for _ in range(self.size)] for _ in range(4)]
        to_owner, from_holder, to_holder, from_owner = empty
        for index, parcel in enumerate(self.parcels):
            boxes, copies = parcel.spread.boxes, parcel.spread.copies
            for number, (block, owner) in enumerate(zip(parcel.blocks, parcel.owners, strict=True)):
                mine = block.overlap(boxes[self.me])
                if mine is not None:
                    piece = Piece(index, number, mine)
                    from_owner[owner].append(piece)
                    # From the copy that the owner has a part of, which may be all of it.
                    if copies[owner] == copies[self.me]:
                        to_owner[owner].append(piece)
                if owner != self.me:
                    continue
                for member, box in enumerate(boxes):
                    theirs = block.overlap(box)
                    if theirs is not None:
                        piece = Piece(index, number, theirs)
                        to_holder[member].append(piece)
                        if copies[owner] == copies[member]:
                            from_holder[member].append(piece)
        sharded = any(parcel.spread.is_sharded for parcel in self.parcels)
        several = self.size > 1 and len(self.parcels) > 0
        return Way(to_owner, from_holder, sharded), Way(to_holder, from_owner, several)

    def to_owners(
        self, parts: Sequence[Tensor | None], sums: Tensor | None = None
    ) -> tuple[list[dict[int, Tensor]], Tensor | None]:
        """Every block that this rank owns, whole, from the parts that all ranks hold.

        Where the tensors are copies on every rank nothing has to travel but the sums.

        Args:
            parts: this rank's local part of each tensor; None stands for zeros.
            sums: a vector, as long on every rank, to be added up over all of them.

        Returns:
            For each tensor its blocks by their index, not to be written to; and the sums, of which
            every rank has the same bits.
        """

        def part_of(piece: Piece) -> Tensor | None:
            part, spread = parts[piece.parcel], self.parcels[piece.parcel].spread
            return None if part is None else piece.box.of(part, spread.boxes[self.me])

        found: list[dict[int, Tensor]] = [{} for _ in self.parcels]
        arrived, totals = self._carry(self._gather, part_of, sums)
        for piece, tensor in arrived:
            block = self.parcels[piece.parcel].blocks[piece.block]
            self._put(found[piece.parcel], piece.block, block, piece.box, tensor)
        return found, totals

    def to_holders(
        self, blocks: Sequence[Mapping[int, Tensor]], sums: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """This rank's local part of every tensor, from the blocks of all owners.

        Args:
            blocks: for each tensor the blocks that this rank owns, by index, shaped like them;
                one that is missing stands for zeros.
            sums: as for `to_owners`.

        Returns:
            The parts, not to be written to, and the sums.
        """

        def part_of(piece: Piece) -> Tensor | None:
            block, parcel = blocks[piece.parcel].get(piece.block), self.parcels[piece.parcel]
            return None if block is None else piece.box.of(block, parcel.blocks[piece.block])

        held = [parcel.spread.boxes[self.me] for parcel in self.parcels]
        found: list[dict[int, Tensor]] = [{} for _ in self.parcels]
        arrived, totals = self._carry(self._scatter, part_of, sums)
        for piece, tensor in arrived:
            self._put(found[piece.parcel], 0, held[piece.parcel], piece.box, tensor)
        parts = [
            one[0] if one else torch.zeros(box.size, dtype=self.dtype, device=self.device)
            for box, one in zip(held, found, strict=True)
        ]
        return parts, totals

    def _put(self, found: dict[int, Tensor], key: int, whole: Box, box: Box, part: Tensor) -> None:
        """Lay a part, which has the box `box`, into the tensor of the box `whole`."""
        if box == whole:
            found[key] = part
            return
        if key not in found:
            found[key] = torch.zeros(whole.size, dtype=self.dtype, device=self.device)
        box.of(found[key], whole).copy_(part)

    def _carry(
        self, way: Way, part_of: Callable[[Piece], Tensor | None], sums: Tensor | None
    ) -> tuple[list[tuple[Piece, Tensor]], Tensor | None]:
        """All pieces that this rank receives, its own too, and the sums: at most one collective."""
        arrived = [
            (piece, self._zeros(piece) if part is None else part.to(self.device, self.dtype))
            for piece in way.receives[self.me]
            for part in (part_of(piece),)
        ]
        if self.group is None or (sums is None and not way.travels):
            return arrived, sums
        header = 0 if sums is None else sums.numel()
        sent = [header + size for size in way.sends_sizes]
        received = [header + size for size in way.receives_sizes]
        sent[self.me] = received[self.me] = 0
        outbox = torch.zeros(sum(sent), dtype=self.dtype, device=self.device)
        for slot, pieces in zip(torch.split(outbox, sent), way.sends, strict=True):
            if slot.numel() == 0:
                continue
            if sums is not None:
                slot[:header].copy_(sums)
            start = header
            for piece in pieces:
                part, end = part_of(piece), start + piece.box.numel
                if part is not None:
                    slot[start:end].view(piece.box.size).copy_(part)
                start = end
        inbox = torch.empty(sum(received), dtype=self.dtype, device=self.device)
        dist.all_to_all_single(inbox, outbox, received, sent, group=self.group)
        headers = []
        for member, slot in enumerate(torch.split(inbox, received)):
            if member == self.me:
                headers += [] if sums is None else [sums.to(self.device, self.dtype)]
                continue
            headers += [] if sums is None else [slot[:header]]
            start = header
            for piece in way.receives[member]:
                end = start + piece.box.numel
                arrived.append((piece, slot[start:end].view(piece.box.size)))
                start = end
        # In the order of the ranks on every one of them: the same bits everywhere.
        return arrived, torch.stack(headers).sum(dim=0) if headers else None

    def _zeros(self, piece: Piece) -> Tensor:
        return torch.zeros(piece.box.size, dtype=self.dtype, device=self.device)
