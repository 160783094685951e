"""What gloo ranks do in the tests of the exchange: tensors to their owners and back."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist
from gloo_ranks import Outcome
from parity_layouts import mesh_of
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor import Placement as DTensorPlacement

from largebatch.optim.sharding import redistribution as redistribution_code
from largebatch.optim.sharding import rounds as exchange_rounds
from largebatch.optim.sharding.placement import Box, Placement, placement_of
from largebatch.optim.sharding.redistribution import Redistribution
from largebatch.optim.sharding.rounds import ShardedTensor

SHAPES = ((7, 3), (1, 4), (5,), (2, 3, 4), ())


@dataclass(frozen=True)
class Case:
    """Tensors of SHAPES, counted through, spread like this; blocks of at most two rows."""

    layout: str
    missing: int | None = None
    """The rank that has none of the parts."""
    most: int = exchange_rounds.MOST
    """Elements in a round."""
    few: int = redistribution_code.FEW
    """Ranks that send to each of the others, copy to copy."""

    def __str__(self) -> str:
        return f"{self.layout}/{self.missing}/{self.most}/{self.few}"


def spread_tensors(layout: str) -> list[Tensor]:
    size = dist.get_world_size() if dist.is_initialized() else 1
    tensors, first = [], 1
    for shape in SHAPES:
        numel = torch.Size(shape).numel()
        tensors.append(torch.arange(first, first + numel).float().view(shape))
        first += numel
    if layout in ("plain", "group"):
        return tensors
    mesh = (
        mesh_of((2, size // 2), ("a", "b")) if layout in MESHES_OF_TWO else mesh_of((size,), ("a",))
    )
    return [
        distribute_tensor(tensor, mesh, placements_of(layout, tensor), src_data_rank=None)
        for tensor in tensors
    ]


MESHES_OF_TWO = ("hsdp", "twice")


def placements_of(layout: str, tensor: Tensor) -> list[DTensorPlacement]:
    """Shards of the first dimension; of the last one for "columns"; scalars are replicated."""
    if tensor.dim() == 0:
        return [Replicate()] * (2 if layout in MESHES_OF_TWO else 1)
    return {
        "fsdp": [Shard(0)],
        "columns": [Shard(tensor.dim() - 1)],
        "replicated": [Replicate()],
        "hsdp": [Replicate(), Shard(0)],
        "twice": [Shard(0), Shard(tensor.dim() - 1)],
    }[layout]


def blocks_of_two(shape: tuple[int, ...]) -> tuple[Box, ...]:
    if not shape:
        return (Box((), ()),)
    rest = shape[1:]
    return tuple(
        Box((start, *(0 for _ in rest)), (min(2, shape[0] - start), *rest))
        for start in range(0, shape[0], 2)
    )


def sharded_tensor(tensor: Tensor, layout: str, shift: int) -> ShardedTensor:
    group = dist.group.WORLD if layout == "group" else None
    placement: Placement = placement_of(tensor, "name", group)
    size = 1 if placement.group is None else placement.group.size()
    blocks = blocks_of_two(placement.shape)
    return ShardedTensor(
        placement, blocks, tuple((shift + number) % size for number in range(len(blocks)))
    )


def carry(case: Case) -> Outcome:
    """Every tensor to the owners of its blocks, doubled by them, and back to all holders."""
    with (
        mock.patch.object(exchange_rounds, "MOST", case.most),
        mock.patch.object(redistribution_code, "FEW", case.few),
    ):
        return carry_by(case)


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """How many collectives begin meanwhile, by name, and the most elements put into one."""
    found = {"all_to_all_single": 0, "all_reduce": 0, "most": 0}

    def count(name: str, tensor: Tensor) -> None:
        found[name] += 1
        found["most"] = max(found["most"], tensor.numel())

    to_all, reduce = dist.all_to_all_single, dist.all_reduce
    with ExitStack() as stack:

        def swapped(inbox: Tensor, outbox: Tensor, *rest: object, **more: object) -> None:
            count("all_to_all_single", outbox)
            to_all(inbox, outbox, *rest, **more)  # type: ignore[arg-type]

        def reduced(tensor: Tensor, *rest: object, **more: object) -> None:
            count("all_reduce", tensor)
            reduce(tensor, *rest, **more)  # type: ignore[arg-type]

        stack.enter_context(mock.patch.object(dist, "all_to_all_single", swapped))
        stack.enter_context(mock.patch.object(dist, "all_reduce", reduced))
        yield found


def carry_by(case: Case) -> Outcome:
    tensors = spread_tensors(case.layout)
    redistribution = Redistribution(
        [sharded_tensor(t, case.layout, number) for number, t in enumerate(tensors)]
    )
    parts = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    rank = dist.get_rank() if dist.is_initialized() else 0
    sums = torch.tensor([rank + 1.0, 0.1])
    given = [None] * len(parts) if case.missing == rank else parts
    before = [part.clone() for part in parts]
    with counted() as to_owners:
        blocks, gathered_sums = redistribution.to_owners(given, sums)
    doubled = [{n: 2 * block for n, block in own.items()} for own in blocks]
    with counted() as to_holders:
        pieces, scattered_sums = redistribution.to_holders(doubled, sums)
        arrived = dict(redistribution.joined((piece, part.clone()) for piece, part in pieces))
    back = [arrived[index] for index in range(len(parts))]
    negative = [{n: torch.full_like(block, -0.0) for n, block in own.items()} for own in blocks]
    zeros = dict(redistribution.joined(redistribution.to_holders(negative)[0])).values()
    return {
        "parts": parts,
        "unchanged": all(torch.equal(a, b) for a, b in zip(before, parts, strict=True)),
        "owned": [set(own) for own in blocks],
        "owners": [tensor.owners for tensor in redistribution.tensors],
        "blocks": [{n: block.clone() for n, block in own.items()} for own in blocks],
        "back": [part.clone() for part in back],
        "sums": (gathered_sums, scattered_sums),
        "to_owners": to_owners,
        "to_holders": to_holders,
        "negative zeros": all(bool(part.signbit().all()) for part in zeros),
    }
