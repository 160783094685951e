"""The rounds of a redistribution, which every rank plans for itself.

Blocks follow one another through the rounds in the order of the tensors. How much of them a round
takes depends on what all ranks know alike, so that all of them cut alike, and is such that no rank
sends or receives more than `limit` elements in a hop, a larger block or shard aside.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from largebatch.optim.sharding.placement import Box, Placement, SubGroup, whole_box

FEWEST: Final = 1 << 21
"""Elements of a round that are worth no cutting: 8 MiB of FP32."""

MOST: Final = 1 << 24
"""Elements of a round, whatever owners have: 64 MiB of FP32."""


@dataclass(frozen=True)
class ShardedTensor:
    """A tensor, its placement, and the owners of its blocks."""

    placement: Placement
    blocks: tuple[Box, ...]
    """Disjoint; together they are the tensor."""
    owners: tuple[int, ...]
    """The owner of each block, by its rank in the group."""


def whole(placement: Placement, owner: int) -> ShardedTensor:
    """Return a tensor with one block, which is all of it."""
    return ShardedTensor(placement, (whole_box(placement.shape),), (owner,))


@dataclass(frozen=True)
class Slice:
    """The part of one block that one member holds."""

    tensor: int
    block: int
    box: Box


To = tuple[int, Slice]
"""A piece, and the rank in a line that it goes to or comes from."""


@dataclass(frozen=True)
class Round:
    """Some blocks, as one rank sees them. The same order holds on every rank.

    Ranks are those in `within`, or in `across` for `shared`.
    """

    within: SubGroup | None
    """Whom parts are exchanged with; None: with nobody."""
    across: SubGroup | None
    """To whom the tensors that arrived by `within` are passed on; None: to nobody."""
    to_owner: list[To] = field(default_factory=list)
    from_holder: list[To] = field(default_factory=list)
    to_holder: list[To] = field(default_factory=list)
    from_owner: list[To] = field(default_factory=list)
    shared: list[To] = field(default_factory=list)
    """All that this rank's boxes have of the blocks, by who has it first."""


def limit_of(tensors: Sequence[ShardedTensor]) -> int:
    """Elements in a round: twice what the owner of most has to give, within `FEWEST` and `MOST`."""
    shares: Counter[int] = Counter()
    for tensor in tensors:
        for block, owner in zip(tensor.blocks, tensor.owners, strict=True):
            shares[owner] += block.numel
    return min(max(2 * max(shares.values(), default=0), FEWEST), MOST)


def rounds_of(tensors: Sequence[ShardedTensor], me: int, limit: int) -> list[Round]:
    """Return all rounds of some tensors that lie over one group, for its rank `me`."""
    routes: dict[tuple[int, ...], list[int]] = {}
    for index, tensor in enumerate(tensors):
        placement = tensor.placement
        lines = (id(line and line.group) for line in (placement.within, placement.across))
        routes.setdefault(tuple(lines), []).append(index)
    found = []
    for indices in routes.values():
        route = Route(tensors, indices, me)
        found += [route.round(blocks) for blocks in cut(tensors, indices, limit)]
    return found


def cut(
    tensors: Sequence[ShardedTensor], indices: Sequence[int], limit: int
) -> Iterator[list[tuple[int, int]]]:
    """Yield the blocks of some tensors, by tensor and number, in rounds."""
    blocks: list[tuple[int, int]] = []
    owned: Counter[int] = Counter()  # by owner: what it gives in the round, to all copies
    held = within = 0  # the most that a member holds, of the tensors before and of this one
    placements = [tensors[index].placement for index in indices]
    # A shard may well go in one: it is this rank's own share of the model.
    limit = max([limit, *(placement.largest for placement in placements if placement.is_sharded)])
    for index in indices:
        tensor, placement = tensors[index], tensors[index].placement
        held, within = held + min(within, placement.largest), 0
        fan = placement.num_copies if placement.across is None else 1
        for number, (block, owner) in enumerate(zip(tensor.blocks, tensor.owners, strict=True)):
            size = block.numel
            gives, holds = owned[owner] + fan * size, held + min(within + size, placement.largest)
            if blocks and max(gives, holds) > limit:
                yield blocks
                blocks, held, within = [], 0, 0
                owned.clear()
            blocks.append((index, number))
            owned[owner] += fan * size
            within += size
    if blocks:
        yield blocks


class Route:
    """The way of tensors that are spread over the same lines, seen by the rank `me`."""

    def __init__(self, tensors: Sequence[ShardedTensor], indices: Sequence[int], me: int) -> None:
        self._tensors, self._me = tensors, me
        placement = tensors[indices[0]].placement
        self._across, self._within = placement.across, placement.within
        if (
            placement.across is None and placement.group is not None
        ):  # those of all copies, directly
            self._within = SubGroup(placement.group, range(placement.group.size()))
        members = [me] if self._within is None else self._within.members
        self._rank_in = {member: rank for rank, member in enumerate(members)}
        own, across = placement.copies[me], [] if self._across is None else self._across.members
        self._near = [m for m in members if self._across is None or placement.copies[m] == own]
        self._of_copy = {placement.copies[member]: rank for rank, member in enumerate(across)}

    def round(self, blocks: Sequence[tuple[int, int]]) -> Round:
        found = Round(self._within, self._across)
        for index, number in blocks:
            tensor = self._tensors[index]
            block, owner = tensor.blocks[number], tensor.owners[number]
            boxes, copies = tensor.placement.boxes, tensor.placement.copies
            mine = block.overlap(boxes[self._me])
            if mine is not None:
                self._hold(found, Slice(index, number, mine), owner, copies)
            if owner == self._me:
                for member in self._near:
                    theirs = block.overlap(boxes[member])
                    if theirs is not None:
                        to = self._rank_in[member], Slice(index, number, theirs)
                        found.to_holder.append(to)
                        # From the copy that the owner has a part of, which may be all of it.
                        if copies[owner] == copies[member]:
                            found.from_holder.append(to)
        return found

    def _hold(self, found: Round, piece: Slice, owner: int, copies: Sequence[int]) -> None:
        """Note a piece that is this rank's own."""
        is_near = copies[owner] == copies[self._me]
        if self._across is None or is_near:
            found.from_owner.append((self._rank_in[owner], piece))
        if is_near:
            found.to_owner.append((self._rank_in[owner], piece))
        if self._across is not None:
            found.shared.append((self._of_copy[copies[owner]], piece))
