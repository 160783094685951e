"""A preflight by real gloo ranks, each on a fake node of its own, one of them at fault."""

import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import forked
import torch
import torch.distributed as dist

from largebatch.distributed.ranks import Ranks, meet, process_group
from largebatch.launch.doctor.findings import exit_code
from largebatch.launch.doctor.host import Folder, Host, collect
from largebatch.launch.doctor.preflight import collectives as preflight_collectives
from largebatch.launch.doctor.preflight import speed as preflight_speed
from largebatch.launch.doctor.preflight.collectives import Collectives
from largebatch.launch.doctor.preflight.command import Verdict, preflight

NEVER = 600.0


class Steady(Collectives):
    """One machine is no network between nodes: each exchange takes 30 ms by itself."""

    seconds = 0.03

    def exchange(self, peer: int, output: torch.Tensor, given: torch.Tensor) -> None:
        time.sleep(self.seconds)
        super().exchange(peer, output, given)


class WrongResult(Steady):
    """Rank 2's own copy of the sum is off by one in one element."""

    def all_reduce(self, tensor: torch.Tensor) -> None:
        super().all_reduce(tensor)
        if dist.get_rank() == 2 and tensor.dtype == torch.bfloat16:
            tensor[-1] += 1


class WrongGift(Steady):
    """What rank 2 adds to a reduce-scatter is not what it should be, so that all are wrong."""

    def reduce_scatter(self, output: torch.Tensor, given: torch.Tensor) -> None:
        super().reduce_scatter(output, given + (dist.get_rank() == 2))


class DroppedRank(Steady):
    """Rank 1's part of an all-gather never leaves it: the others have zeros there."""

    def all_gather(self, output: torch.Tensor, given: torch.Tensor) -> None:
        super().all_gather(output, given * (dist.get_rank() != 1))


class WrongTiny(Steady):
    """A sum of eight elements is divided on the way, as means have been."""

    def all_reduce(self, tensor: torch.Tensor) -> None:
        super().all_reduce(tensor)
        if tensor.numel() == 8:
            tensor /= 2


class WrongGroup(Steady):
    """Among all ranks all is well; in rank 1's groups its part of an all-gather never leaves it."""

    def all_gather(self, output: torch.Tensor, given: torch.Tensor) -> None:
        super().all_gather(output, given * (self.group is None or dist.get_rank() != 1))


class OpenBarrier(Steady):
    """A barrier that lets everybody through, and a rank that comes late."""

    late = False

    def settle(self, device: torch.device) -> None:
        if not self.late and dist.is_initialized() and dist.get_rank() == 1:
            self.late = True
            time.sleep(0.5)

    def barrier(self) -> None:
        pass


class StuckDevice(Steady):
    """Rank 1's device never answers, some way into the collectives."""

    calls = 0

    def settle(self, device: torch.device) -> None:
        self.calls += 1
        if self.calls > 6 and dist.get_rank() == 1:
            time.sleep(NEVER)


class StuckInside(Steady):
    """Rank 1 makes its call, which never returns."""

    def all_gather(self, output: torch.Tensor, given: torch.Tensor) -> None:
        if dist.get_rank() == 1:
            time.sleep(NEVER)
        super().all_gather(output, given)


class Killed(Steady):
    """Rank 2 dies in the middle."""

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        if dist.get_rank() == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        super().broadcast(tensor, source)


class Stopped(Steady):
    """Rank 2 stands still, with its connections open: it cannot even say where it is."""

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        if dist.get_rank() == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        super().broadcast(tensor, source)


class SlowNode(Steady):
    """Rank 3's exchanges take ten times as long."""

    def exchange(self, peer: int, output: torch.Tensor, given: torch.Tensor) -> None:
        self.seconds = 0.3 if dist.get_rank() == 3 else 0.03
        super().exchange(peer, output, given)


class Raises(Steady):
    """The backend refuses on rank 1, before it has sent anything."""

    def all_to_all(self, output: torch.Tensor, given: torch.Tensor) -> None:
        if dist.get_rank() == 1:
            raise RuntimeError("No VNIs available")
        super().all_to_all(output, given)


@dataclass
class Flight:
    """What came of it."""

    findings: list[dict[str, Any]]
    measured: dict[str, Any]
    heard: list[list[str] | None]
    """The codes of the verdict on each rank; None on a rank that was ended, or never began."""
    exit_codes: list[int | None]
    seconds: float

    @property
    def codes(self) -> list[str]:
        return [finding["code"] for finding in self.findings]


def quiet_port() -> int:
    """A free port below those that the system gives away: a rank that calls before rank 0 listens
    could be given the very port that it calls, and would reach itself.
    """
    for port in random.Random().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError("no free port between 20000 and 32000")


def fly(
    collectives: type[Collectives],
    folder: Path,
    size: int = 4,
    present: Sequence[int] | None = None,
    timeout_seconds: float = 20.0,
    clocks: Sequence[float] = (),
    sizes: Sequence[int] = (1 << 10,),
    per_node: int = 1,
) -> Flight:
    """A world of `size` ranks of which only those `present` are started.

    Args:
        per_node: ranks a node.
        clocks: seconds that each rank's clock is fast by.
        sizes: of the messages, in bytes.
    """
    port = quiet_port()
    fast = list(clocks) or [0.0] * size
    more = (port, collectives, folder, timeout_seconds, sizes, per_node)
    started = time.monotonic()
    processes = [
        forked.Popen(partial(fly_rank, rank, size, fast[rank], *more))
        for rank in (range(size) if present is None else present)
    ]
    codes: list[int | None] = []
    deadline = started + 600
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, deadline - time.monotonic()))
        if len(codes) == 0:
            seconds = time.monotonic() - started
            # Rank 0 is done, and the others have heard it or have been ended; a rank that
            # stands still never ends by itself.
            deadline = time.monotonic() + 2
        codes.append(process.returncode)
        if process.returncode is None:
            process.kill()
            process.wait()
    verdict = json.loads((folder / "verdict.json").read_text(encoding="utf-8"))
    heard = []
    for rank in range(size):
        path = folder / f"rank{rank}.json"
        heard.append(json.loads(path.read_text(encoding="utf-8")) if path.exists() else None)
    return Flight(verdict["findings"], verdict["measured"], heard, codes, seconds)


def fly_rank(
    rank: int,
    size: int,
    fast_by: float,
    port: int,
    collectives: type[Collectives],
    folder: Path,
    timeout_seconds: float,
    sizes: Sequence[int],
    per_node: int,
) -> None:
    torch.set_num_threads(1)
    # torch's store asks for its clients' names; a name server that is silent is not the subject.
    os.environ["RES_OPTIONS"] = "timeout:1 attempts:1"
    preflight_collectives.SIZES["fast"] = tuple(sizes)
    preflight_speed.NUM_BYTES["fast"] = 1 << 16
    ranks = Ranks("nproc", rank, size, rank % per_node, per_node, "127.0.0.1", port)
    host = Host(
        environment={},
        node=lambda: f"n{rank // per_node}",
        ranks=lambda: ranks,
        nofile=lambda: (1 << 20, 1 << 20),
        # A machine that plays several nodes has cores and an address for each.
        affinity=lambda: frozenset({rank}),
        resolve=lambda host: ["10.0.0.1"],
        is_here=lambda address: True,
        reverse_seconds=lambda address: 0.0,
        addresses=lambda: {"hsn0": "10.0.0.1"},
        disk=lambda path: Folder(str(path), 1 << 40),
        clock=lambda: time.time() + fast_by,
    )

    def report(verdict: Verdict) -> int:
        rows = [asdict(finding) for finding in verdict.findings]
        text = json.dumps({"findings": rows, "measured": verdict.measured})
        (folder / "verdict.json").write_text(text, encoding="utf-8")
        return exit_code(verdict.findings)

    verdict = preflight(
        collect(host, folder),
        ranks,
        "fast",
        report=report,
        host=host,
        collectives=collectives(),
        device=torch.device("cpu"),
        timeout_seconds=timeout_seconds,
        all_to_all=True,
    )
    codes = [finding.code for finding in verdict.findings]
    (folder / f"rank{rank}.json").write_text(json.dumps(codes), encoding="utf-8")
    if verdict.code == 0:
        train_afterwards(ranks)
    raise SystemExit(verdict.code)


def train_afterwards(ranks: Ranks) -> None:
    """The run that follows in the same process meets at the same place."""
    one = torch.ones(1)
    with process_group(meet(ranks), ranks, one.device):
        dist.all_reduce(one)
    assert one.item() == ranks.size
