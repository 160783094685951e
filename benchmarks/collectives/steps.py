"""What the ranks of `largebatch bench collectives` do: check values, then time, together.

Values come first, every element of every collective at every size, against sums known in closed
form; what came out wrong is not timed. The verdict goes through the store, not through the
collectives that it is about.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from largebatch.benchmarks.harness import in_processes, timed
from largebatch.distributed.mailbox import StoreMailbox
from largebatch.distributed.ranks import Ranks, free_port, meet, pick_device, process_group

PERIOD: Final = 16
"""Rank r's element i is (i + r) mod 16: sums stay exact in FP32 for a million ranks, and a piece
that comes from the wrong rank or lands in the wrong place shows."""
ELEMENT_BYTES: Final = 4
FEWEST_ROUNDS: Final = 3
WARM_UP_CALLS: Final = 2
MOST_CALLS: Final = 20
FULL_CALL_BYTES: Final = 2**20  # from this size on, a sample is one call
NOTE_SECONDS: Final = 10.0
VERDICT_SECONDS: Final = 300.0  # as long as torch's stores wait for a value


@dataclass(frozen=True)
class CollectiveJob:
    collectives: Sequence[str]
    sizes: Sequence[int]
    """In bytes, as nccl-tests counts them: the greater of what goes in and what comes out."""
    seconds: float
    device: str | None


@dataclass
class Measurement:
    """One collective at one size. `wrong` says how its values were wrong; "" where they are right.

    `seconds` holds a sample a round: of one call, on the rank that took longest.
    """

    collective: str
    ranks: int
    local_ranks: int
    nbytes: int
    backend: str
    device: str
    wrong: str = ""
    seconds: list[float] = field(default_factory=list)


def elements(first: int, count: int, rank: int, device: torch.device) -> Tensor:
    """Elements first … first + count - 1 of rank `rank`."""
    return ((torch.arange(first, first + count, device=device) + rank) % PERIOD).float()


def sums(first: int, count: int, ranks: int, device: torch.device) -> Tensor:
    """The same elements, added over all ranks: they run through all residues every 16 ranks."""
    whole, rest = divmod(ranks, PERIOD)
    every = PERIOD * (PERIOD - 1) // 2
    table = [whole * every + sum((i + r) % PERIOD for r in range(rest)) for i in range(PERIOD)]
    of_residue = torch.tensor(table, dtype=torch.float32, device=device)
    return of_residue[torch.arange(first, first + count, device=device) % PERIOD]


class TimedCall:
    """One collective at one size: its buffers, what it does, what must come out."""

    def __init__(self, name: str, nbytes: int, ranks: Ranks, device: torch.device) -> None:
        self.name = name
        share = -(-nbytes // (ELEMENT_BYTES * ranks.size))
        if name in ("all_reduce", "broadcast"):
            count = -(-nbytes // ELEMENT_BYTES)
            self.given = elements(0, count, ranks.rank, device)
            self.taken = self.given
            if name == "broadcast":
                self.wanted = elements(0, count, 0, device)
            else:
                self.wanted = sums(0, count, ranks.size, device)
        elif name == "all_gather":
            count = share * ranks.size
            self.given = elements(ranks.rank * share, share, ranks.rank, device)
            self.taken = torch.full((count,), -1.0, device=device)
            own = [elements(rank * share, share, rank, device) for rank in range(ranks.size)]
            self.wanted = torch.cat(own)
        else:
            count = share * ranks.size
            self.given = elements(0, count, ranks.rank, device)
            self.taken = torch.full((share,), -1.0, device=device)
            self.wanted = sums(ranks.rank * share, share, ranks.size, device)
        self.nbytes = count * ELEMENT_BYTES

    def __call__(self) -> None:
        COLLECTIVES[self.name](self.taken, self.given)

    def fault(self) -> str:
        """How the values are wrong; "" where every one is right."""
        wrong = (self.taken != self.wanted).nonzero().flatten()  # a NaN differs from all
        if not len(wrong):
            return ""
        first = int(wrong[0])
        return (
            f"{len(wrong):,} of {self.taken.numel():,} elements, the first is number {first:,}: "
            f"{self.taken[first].item():g} instead of {self.wanted[first].item():g}"
        )

    @property
    def calls(self) -> int:
        """Of a sample: small messages are done several times, so that the clock can tell."""
        return max(1, min(MOST_CALLS, FULL_CALL_BYTES // self.nbytes))


def _of_torch(name: str, older: str) -> Callable[[Tensor, Tensor], Any]:
    """torch has renamed them, and warns of the old names."""
    function: Callable[[Tensor, Tensor], Any] = getattr(dist, name, None) or getattr(dist, older)
    return function


COLLECTIVES: Final[dict[str, Callable[[Tensor, Tensor], Any]]] = {
    "all_reduce": lambda taken, given: dist.all_reduce(taken),
    "reduce_scatter": _of_torch("reduce_scatter_single", "reduce_scatter_tensor"),
    "all_gather": _of_torch("all_gather_single", "all_gather_into_tensor"),
    "broadcast": lambda taken, given: dist.broadcast(taken, 0),
}


def measure(ranks: Ranks, job: CollectiveJob) -> list[Measurement]:
    """Together with all other ranks; the same list on each of them."""
    device = pick_device(job.device, ranks)
    store = meet(ranks) or HashStore()
    with process_group(store, ranks, device):
        found: list[tuple[Measurement, TimedCall]] = []
        faults: list[str] = []
        for collective in job.collectives:
            for nbytes in job.sizes:
                call = TimedCall(collective, nbytes, ranks, device)
                measurement = Measurement(
                    collective, ranks.size, ranks.local_size, call.nbytes,
                    dist.get_backend(), str(device.type),
                )  # fmt: skip
                call()
                faults.append(call.fault())
                del call.wanted  # what was checked need not be kept for the timing
                found.append((measurement, call))
        mailbox = StoreMailbox(ranks, store, "largebatch/collectives")
        for (measurement, _), wrong in zip(found, verdicts(mailbox, faults), strict=True):
            measurement.wrong = wrong
        right = [(measurement, call) for measurement, call in found if not measurement.wrong]
        note(ranks, f"{len(right)} of {len(found)} collectives and sizes have the right values")
        time_calls(ranks, device, job.seconds, right)
        return [measurement for measurement, _ in found]


def verdicts(mailbox: StoreMailbox, faults: Sequence[str]) -> list[str]:
    """What all ranks found of each check, in the words of the first that found it wrong."""
    mailbox.post("faults", faults)
    if mailbox.ranks.is_first:
        told = []
        for found in zip(*mailbox.collect("faults").values(), strict=True):
            wrong = [f"rank {rank}: {fault}" for rank, fault in enumerate(found) if fault]
            others = f" (and {len(wrong) - 1} more ranks)" if len(wrong) > 1 else ""
            told.append(wrong[0] + others if wrong else "")
        mailbox.announce("verdicts", told)
    agreed: list[str] = mailbox.hear("verdicts", VERDICT_SECONDS)
    return agreed


def time_calls(
    ranks: Ranks,
    device: torch.device,
    seconds: float,
    right: Sequence[tuple[Measurement, TimedCall]],
) -> None:
    """Rounds over all collectives and sizes for `seconds`, FEWEST_ROUNDS at the least."""
    own: list[list[float]] = []
    began = noted = time.perf_counter()
    for _, call in right:
        call.given.zero_()  # sums of sums would grow without bound
        for _ in range(WARM_UP_CALLS):
            call()
    more = bool(right)
    while more:
        own.append([])
        for _, call in right:
            dist.barrier()
            own[-1].append(timed(lambda call=call: repeat(call), device) / call.calls)  # type: ignore[misc]
        if time.perf_counter() - noted > NOTE_SECONDS:
            noted = time.perf_counter()
            note(ranks, f"{len(own)} rounds in {noted - began:.0f} s of {seconds:g} s")
        late = torch.tensor(float(time.perf_counter() - began > seconds), device=device)
        dist.all_reduce(late, dist.ReduceOp.MAX)
        more = len(own) < FEWEST_ROUNDS or not late.item()
    if not right:
        return
    # A collective is over when the last rank is. FP32, which every device has: a relative 6e-8.
    longest = torch.tensor(own, dtype=torch.float32, device=device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    for (measurement, _), samples in zip(right, longest.t().tolist(), strict=True):
        measurement.seconds = samples


def repeat(call: TimedCall) -> None:
    for _ in range(call.calls):
        call()


def note(ranks: Ranks, text: str) -> None:
    if ranks.is_first:
        print(f"{ranks.size} ranks: {text}", file=sys.stderr, flush=True)


def work_as_rank(rank: int, size: int, port: int, job: CollectiveJob) -> list[dict[str, Any]]:
    """What a process that was started for it does."""
    torch.set_num_threads(1)
    found = measure(Ranks("nproc", rank, size, rank, size, "127.0.0.1", port), job)
    return [asdict(measurement) for measurement in found]


def measure_in_processes(size: int, job: CollectiveJob) -> list[Measurement]:
    """`measure` by `size` processes of this node, which are started for it and end with it."""
    first, *_ = in_processes(size, work_as_rank, size, free_port(), job)
    return [Measurement(**row) for row in first]
