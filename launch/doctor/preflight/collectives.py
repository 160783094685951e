"""Every collective that training uses, checked by value: small whole numbers whose sum is exact in
any order, so that a result is right or wrong and never nearly right.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
import torch.distributed as dist

# Their names in torch from 2.13 on, and before.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Around 1 MiB oneCCL changes its algorithm, by its own rules and by ALCF's.
SIZES: Final[dict[str, tuple[int, ...]]] = {
    "fast": (1 << 10, 2 << 20),
    "full": (1 << 10, 1 << 20, 2 << 20, 64 << 20),
}
TINY: Final = (1, 8, 64)
"""Elements: messages that libraries send by a protocol of their own."""
GROUPS: Final = ("", "the ranks of a node", "one rank of each node")
"""Groups: all ranks, and those that sharded training makes."""
MOST_TO_ALL: Final = 1024
"""Ranks below which all_to_all is tried: on xccl it is a message from each to each."""
_SUMMED: Final = 128
"""Ranks that add to one element in bf16: 128 ones and every partial sum are exact in 8 bits."""


class Collectives:
    """What training calls, among the ranks of `group` (None: all). A test overrides a method to
    break it on one rank.
    """

    group: "dist.ProcessGroup | None" = None

    def settle(self, device: torch.device) -> None:
        """Wait until this rank's own device has done all it was given."""
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        dist.all_reduce(tensor, group=self.group)

    def all_gather(self, output: torch.Tensor, given: torch.Tensor) -> None:
        _all_gather(output, given, group=self.group)

    def reduce_scatter(self, output: torch.Tensor, given: torch.Tensor) -> None:
        _reduce_scatter(output, given, group=self.group)

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """From the rank `source` of the group."""
        dist.broadcast(tensor, group=self.group, group_src=source)

    def all_to_all(self, output: torch.Tensor, given: torch.Tensor) -> None:
        dist.all_to_all_single(output, given)

    def barrier(self) -> None:
        dist.barrier()

    def exchange(self, peer: int, output: torch.Tensor, given: torch.Tensor) -> None:
        """Send `given` to `peer` and receive `output` from it."""
        ways = [dist.P2POp(dist.isend, given, peer), dist.P2POp(dist.irecv, output, peer)]
        for work in dist.batch_isend_irecv(ways):
            work.wait()


@dataclass(frozen=True)
class CollectiveTrial:
    """One collective on one dtype and size, among one of `GROUPS`: `num_bytes` are about those of
    the whole vector, `num_elements` exactly its, where it is tiny.
    """

    collective: str
    dtype: str = ""
    num_bytes: int = 0
    num_elements: int = 0
    among: str = ""

    def __str__(self) -> str:
        if not self.dtype:
            return self.collective
        mebi, kibi = self.num_bytes >> 20, self.num_bytes >> 10
        size = f"{mebi} MiB" if mebi else f"{kibi} KiB"
        if self.num_elements:
            size = f"{self.num_elements} element{'s' * (self.num_elements > 1)}"
        return f"{self.collective} {self.dtype} {size}{f' ({self.among})' * bool(self.among)}"


def trials(mode: str, among: str = "", all_to_all: bool = False) -> list[CollectiveTrial]:
    """What `mode` tries among all ranks, or in groups of them, small before large; `all_to_all`,
    which few optimizers use, where it is asked for.
    """
    sizes = [(0, count) for count in TINY] + [(num_bytes, 0) for num_bytes in SIZES[mode]]
    if among:  # what differs is the way, not the arithmetic
        sizes = [sizes[0], (max(SIZES["fast"]), 0)]
    kinds = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")
    return [
        *[CollectiveTrial("barrier")] * (not among),
        *(
            CollectiveTrial(kind, dtype, *size, among)
            for size in sizes
            for kind in (*kinds, *["all_to_all"] * all_to_all)
            for dtype in DTYPES
        ),
    ]


def members(among: str, rank: int, rows: Sequence[Sequence[int]]) -> list[int]:
    """The ranks that `rank` tries collectives with, of `rows`, the ranks of each node; none where
    that is no group of its own.
    """
    if not among:
        return sorted(rank for row in rows for rank in row)
    own = next(row for row in rows if rank in row)
    place = own.index(rank)
    found = list(own) if among == GROUPS[1] else [row[place] for row in rows if place < len(row)]
    return found if 1 < len(found) < sum(map(len, rows)) else []


@dataclass
class Problem:
    """Input and right answer of one trial on this rank."""

    given: torch.Tensor
    right: torch.Tensor
    source: int = 0


def problem(trial: CollectiveTrial, rank: int, size: int, device: torch.device) -> Problem:
    """What this rank puts in, and what has to come out."""
    dtype = DTYPES[trial.dtype]
    width = torch.empty((), dtype=dtype).element_size()
    # Three more than a round number: remainders are where ring and halving go wrong.
    whole = trial.num_elements or max(1, trial.num_bytes // width) + 3
    # Of each rank.
    part = max(1, (trial.num_elements or trial.num_bytes // width) // size)
    everyone = torch.arange(size)
    if trial.collective == "all_reduce":
        index = torch.arange(whole)
        return _on(device, dtype, term(rank, index, size, trial.dtype), total(index, size, trial))
    if trial.collective == "reduce_scatter":
        index = torch.arange(part * size)
        mine = index[rank * part : (rank + 1) * part]
        return _on(device, dtype, term(rank, index, size, trial.dtype), total(mine, size, trial))
    if trial.collective == "all_gather":
        return _on(device, dtype, letters(rank, 0, part), letters(everyone, 0, part))
    if trial.collective == "all_to_all":
        return _on(device, dtype, letters(rank, everyone, part), letters(everyone, rank, part))
    source = size - 1  # not rank 0, from which a broken broadcast is right most often
    right = letters(source, 0, whole)
    given = right if rank == source else torch.full_like(right, -1)
    found = _on(device, dtype, given, right)
    found.source = source
    return found


def _on(
    device: torch.device, dtype: torch.dtype, given: torch.Tensor, right: torch.Tensor
) -> Problem:
    return Problem(given.to(dtype).to(device), right.to(dtype).to(device))


def run(trial: CollectiveTrial, problem: Problem, collectives: Collectives) -> torch.Tensor:
    """Do it; returns what came out, which is to equal `problem.right`."""
    given = problem.given
    if trial.collective == "all_reduce":
        collectives.all_reduce(given)
        return given
    if trial.collective == "broadcast":
        collectives.broadcast(given, problem.source)
        return given
    output = torch.full_like(problem.right, -1)
    getattr(collectives, trial.collective)(output, given)
    return output


def mistake(found: torch.Tensor, right: torch.Tensor) -> str | None:
    """The first wrong element in words; None where all are right. Waits for the device."""
    wrong = found != right  # NaN is wrong too
    if not bool(wrong.any()):
        return None
    first = int(wrong.nonzero()[0])
    return (
        f"{int(wrong.sum()):,} of {right.numel():,} elements are wrong, the first is element "
        f"{first}: {float(found[first]):g} instead of {float(right[first]):g}"
    )


def term(rank: int, index: torch.Tensor, size: int, dtype: str) -> torch.Tensor:
    """What `rank` adds to the elements `index` of a sum."""
    scale = 2 ** (index % 3)  # so that a shifted chunk is a wrong one
    if dtype == "float32":
        # At most 98,304 ranks x 37 x 4 < 2^24: exact.
        return (rank % 37 + 1) * scale
    # Only every n-th rank adds to an element, so that at most _SUMMED ones meet there.
    stride = -(-size // _SUMMED)
    return torch.where(index % stride == rank % stride, scale, 0)


def total(index: torch.Tensor, size: int, trial: CollectiveTrial) -> torch.Tensor:
    """The sum of `term` over all ranks, without adding them up element by element."""
    scale = 2 ** (index % 3)
    if trial.dtype == "float32":
        return sum_of_ranks(size) * scale
    stride = -(-size // _SUMMED)
    # How many ranks r < size have r % stride == index % stride.
    return ((size - 1 - index % stride) // stride + 1) * scale


@cache
def sum_of_ranks(size: int) -> int:
    return sum(rank % 37 + 1 for rank in range(size))


def letters(sender: int | torch.Tensor, receiver: int | torch.Tensor, length: int) -> torch.Tensor:
    """What `sender` writes to `receiver`: 0 to 126, exact in bf16 too. One after the other where
    there are many of one of them.
    """
    first = torch.as_tensor(sender * 31 + receiver * 17).reshape(-1, 1)
    return ((first + torch.arange(length)) % 127).flatten()
