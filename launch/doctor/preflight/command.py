"""The preflight: the first thing of a job, by all its ranks, before any compute is spent.

    connect to rank 0  ->  each rank's facts  ->  the process group  ->  every collective by value
    ->  nodes timed in pairs  ->  one verdict, on rank 0, heard by all

It ends within a few times `timeout_seconds` whatever hangs: then rank 0 has named who does not
answer, and the process ends, since nothing else ends a collective on XPU.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

from largebatch.common.text import first_line
from largebatch.distributed.mailbox import StoreMailbox
from largebatch.launch.doctor import checks
from largebatch.launch.doctor.findings import Finding, error, found_from, merged
from largebatch.launch.doctor.host import Host, HostFacts
from largebatch.launch.doctor.preflight import speed
from largebatch.launch.doctor.preflight.watch import PreflightWatch, Stage, format_ranks, hang, lost

if TYPE_CHECKING:
    import torch

    from largebatch.distributed.ranks import Ranks
    from largebatch.launch.doctor.preflight.collectives import Collectives, CollectiveTrial

MODES: Final = ("full", "fast", "off")
_SECONDS: Final = {"fast": 60.0, "full": 180.0}


def seconds_for(mode: str, size: int) -> float:
    """The time-out of each part in a world of `size` ranks: their start spreads with their number
    (194 s at 49,152 ranks on Aurora, as users of ezpz have measured it).
    """
    return _SECONDS[mode] + size / 100


@dataclass
class Verdict:
    """What all ranks together have found: the same on each of them."""

    findings: list[Finding]
    measured: dict[str, Any] = field(default_factory=dict)
    """On rank 0: seconds of each collective, GB/s of each node."""
    code: int = 0
    """What `report` returned: the exit code, where this is a command."""
    mailbox: StoreMailbox | None = None
    """A run in the same processes keeps it until its ranks have connected anew, since the store is
    rank 0's."""


def preflight(
    facts: HostFacts,
    ranks: "Ranks",
    mode: str,
    *,
    report: Callable[[Verdict], int],
    host: Host | None = None,
    collectives: "Collectives | None" = None,
    device: "torch.device | None" = None,
    timeout_seconds: float | None = None,
    all_to_all: bool = False,
) -> Verdict:
    """Check this world of more than one rank; every rank has to call it, before its own process
    group is made. Prints nothing. Unreachable where this rank cannot reach rank 0, or no longer.

    Args:
        mode: "fast" (seconds) or "full" (larger messages, more pairs; about a minute).
        report: called on rank 0 with the verdict; returns the exit code. Where a rank hangs it is
            called from another thread, and all processes end with that code.
        device: whose backend is tried; None: the accelerator where there is one.
        timeout_seconds: of each part; None: `seconds_for` this world.
        all_to_all: try this collective too, in worlds that are small enough for it.
    """
    seconds = timeout_seconds or seconds_for(mode, ranks.size)
    mailbox = StoreMailbox.connect(ranks, seconds)
    return _PreflightRun(
        facts, ranks, mode, seconds, mailbox, host or Host(), report, all_to_all, collectives,
        device,
    ).run()  # fmt: skip


@dataclass
class _PreflightRun:
    facts: HostFacts
    ranks: "Ranks"
    mode: str
    seconds: float
    mailbox: StoreMailbox
    host: Host
    report: Callable[[Verdict], int]
    all_to_all: bool
    collectives: "Collectives | None"
    device: "torch.device | None"
    arrived: dict[int, dict[str, Any]] = field(default_factory=dict)
    """On rank 0: what each rank has read and found by itself."""
    rows: list[list[int]] = field(default_factory=list)
    """The ranks of each node, and below the nodes' names."""
    nodes: list[str] = field(default_factory=list)
    result: dict[str, Any] = field(
        default_factory=lambda: {"wrong": [], "seconds": {}, "pairs": []}
    )
    """This rank's own: what was wrong, what failed, how long things took."""

    def run(self) -> Verdict:
        positions = self._arrive()
        if positions is None:
            return self._conclude(self._absent())
        self.rows, self.nodes = positions["rows"], positions["nodes"]
        with PreflightWatch(self.seconds, self._late) as watch:
            self._try_all(watch)
            watch.next("telling rank 0")
            self.mailbox.post("result", self.result)
        if not self.ranks.is_first:
            return self._conclude([])
        answers = self.mailbox.collect("result", self.seconds)
        rates = self._rates(answers)
        measured = {"collective_seconds": answers[0]["seconds"], "node_gb_per_second": rates}
        return self._conclude(self._judge(answers, rates), measured)

    def _arrive(self) -> dict[str, Any] | None:
        """Send all facts to rank 0; return the ranks of each node, None where ranks are missing."""
        own = [asdict(finding) for finding in checks.of_one(self.facts)]
        self.mailbox.post("arrived", {"facts": checks.thin(self.facts), "found": own})
        if self.ranks.is_first:
            self.arrived = self.mailbox.collect("arrived", self.seconds)
            positions = None
            if len(self.arrived) == self.ranks.size:
                held = checks.by_node(self._world())
                rows = [[facts.rank for facts in row] for row in held.values()]
                positions = {"rows": rows, "nodes": list(held)}
            self.mailbox.announce("positions", positions)
            return positions
        heard: dict[str, Any] | None = self.mailbox.hear("positions", 2 * self.seconds)
        return heard

    def _try_all(self, watch: PreflightWatch) -> None:
        from largebatch.distributed.groups import make_group
        from largebatch.distributed.ranks import pick_device, process_group
        from largebatch.launch.doctor.preflight import collectives

        calls = self.collectives or collectives.Collectives()
        with ExitStack() as stack:
            try:
                watch.next("taking its device")
                device = self.device or pick_device(None, self.ranks)
                calls.settle(device)
                watch.next("making the process group")
                watch.enter()
                stack.enter_context(process_group(self.mailbox.group_store(), self.ranks, device))
                for among in collectives.GROUPS:
                    ranks = collectives.members(among, self.ranks.rank, self.rows)
                    if among:
                        watch.next(f"making a group of {among}")
                        calls.settle(device)
                        watch.enter()
                        calls.group = make_group(ranks) if ranks else None
                    few = self.ranks.size < collectives.MOST_TO_ALL
                    to_all = self.all_to_all and few and not among
                    for trial in collectives.trials(self.mode, among, to_all):
                        watch.next(str(trial))
                        if ranks:
                            self._try(trial, ranks, watch, calls, device)
                calls.group = None
                self._race(watch, calls, device)
            except Exception as error:  # whatever a backend raises is a result
                # Before the group ends, which makes the others fail too.
                self.result["failed_as"] = self.mailbox.count("failed")
                message = f"{type(error).__name__}: {first_line(error)}"
                self.result["failed"] = f"{watch.stage.name}: {message}"

    def _try(
        self,
        trial: "CollectiveTrial",
        ranks: list[int],
        watch: PreflightWatch,
        calls: "Collectives",
        device: "torch.device",
    ) -> None:
        from largebatch.launch.doctor.preflight.collectives import mistake, problem, run

        if trial.collective == "barrier":
            calls.settle(device)
            self.mailbox.count("barrier")
            watch.enter()
            calls.barrier()
            # All leave it at one moment, which is when clocks can be compared.
            self.result["clock"] = self.host.clock()
            before = self.mailbox.count("barrier", 0)
            if before < self.ranks.size:
                self.result["wrong"].append(
                    f"barrier: open after {before:,} of {self.ranks.size:,} ranks"
                )
            return
        posed = problem(trial, ranks.index(self.ranks.rank), len(ranks), device)
        calls.settle(device)
        watch.enter()
        started = time.perf_counter()
        found = run(trial, posed, calls)
        calls.settle(device)
        if self.ranks.is_first:
            self.result["seconds"][str(trial)] = time.perf_counter() - started
        if wrong := mistake(found, posed.right):
            self.result["wrong"].append(f"{trial}: {wrong}")

    def _race(self, watch: PreflightWatch, calls: "Collectives", device: "torch.device") -> None:
        """Exchanges between pairs of nodes, all pairs of a round at once."""
        if len(self.nodes) < speed.FEWEST_NODES:
            return
        node = next(n for n, row in enumerate(self.rows) if self.ranks.rank in row)
        local_rank = self.rows[node].index(self.ranks.rank)
        for number, pairs in enumerate(speed.partners(len(self.nodes), speed.ROUNDS[self.mode]), 1):
            watch.next(f"timing nodes in pairs, round {number}")
            calls.settle(device)
            watch.enter()
            calls.barrier()
            peer = speed.peer_in(pairs, node, local_rank, self.rows)
            num_bytes = speed.NUM_BYTES[self.mode]
            taken = None if peer is None else speed.seconds_with(peer, num_bytes, device, calls)
            self.result["pairs"].append(taken)

    def _late(self, stage: Stage) -> None:
        """This rank hangs: tell where, let rank 0 say who is to blame, and end the process."""
        grace = max(2.0, self.seconds / 2)
        code = 1
        try:
            other = self.mailbox.reconnect()
            other.post("late", asdict(stage))
            if self.ranks.is_first:
                code = self._find_fault(other, grace).code
            else:
                code = self._heard(other, 2 * grace + self.seconds).code
        except Exception as error:
            if self.ranks.local_rank == 0:
                print(f"largebatch doctor: {error}; it hangs at {stage.name}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _find_fault(self, other: StoreMailbox, grace: float) -> Verdict:
        size = self.ranks.size
        answers = other.collect("result", 0)
        late = other.collect(
            "late",
            grace,
            lambda: other.num_posted("late") + other.num_posted("result") >= size,
        )
        answers |= other.collect("result", 0)
        stages = {rank: Stage(**row) for rank, row in late.items()}
        # A rank that has sent its result waits for the others, which is no fault.
        stages |= {rank: Stage(1 << 30, "the verdict", True) for rank in answers}
        found = [
            *hang(stages, size, self._node_of, self.seconds),
            *self._failures(answers),
            *self._of_arrived(),
        ]
        return self._announce(other, Verdict(merged(found)))

    def _judge(
        self, answers: Mapping[int, dict[str, Any]], rates: Mapping[str, float]
    ) -> list[Finding]:
        missing = [rank for rank in range(self.ranks.size) if rank not in answers]
        found = self._failures(answers)
        if missing:
            found.append(lost(missing, self._node_of, f"has not answered for {self.seconds:g} s"))
        for rank, result in answers.items():
            if "clock" in result and "clock" in answers.get(0, {}):
                offset = result["clock"] - answers[0]["clock"]
                self.arrived[rank]["facts"]["clock_offset_seconds"] = offset
        return [*found, *speed.slow_nodes(rates), *self._of_arrived()]

    def _failures(self, answers: Mapping[int, dict[str, Any]]) -> list[Finding]:
        found = []
        wrong = {rank: result["wrong"][0] for rank, result in answers.items() if result["wrong"]}
        if wrong:
            found.append(
                error(
                    "collective-wrong",
                    f"{wrong[min(wrong)]} ({format_ranks(sorted(wrong))} of {self.ranks.size:,} "
                    "ranks)",
                    "training would go on with wrong gradients, and nothing would say so",
                    "try another algorithm (CCL_ALLREDUCE_SCALEOUT=direct, ring, rabenseifner); "
                    "leave the node out where one alone is wrong",
                    self._some(wrong),
                )
            )
        failed = {rank: result for rank, result in answers.items() if "failed" in result}
        if failed:
            first = min(failed, key=lambda rank: failed[rank]["failed_as"])
            same = [rank for rank in failed if failed[rank]["failed"] == failed[first]["failed"]]
            found.append(
                error(
                    "collective-failed",
                    f"rank {first} (the first of {len(failed):,}) at {failed[first]['failed']}",
                    "the run would fail there too; that others fail after it is often its echo",
                    "look up the message, and at the node; leave it out if it stays the first",
                    self._some(same),
                )
            )
        return found

    def _some(self, ranks: Iterable[int]) -> tuple[str, ...]:
        """Their nodes, if these are the fewer: what most nodes show is no node's fault."""
        nodes = tuple(dict.fromkeys(self._node_of(rank) for rank in ranks))
        return nodes if 2 * len(nodes) < len(self.nodes) else ()

    def _absent(self) -> list[Finding]:
        missing = [rank for rank in range(self.ranks.size) if rank not in self.arrived]
        return [
            lost(missing, self._node_of, f"has not come within {self.seconds:g} s"),
            *self._of_arrived(),
        ] if self.ranks.is_first else []  # fmt: skip

    def _of_arrived(self) -> list[Finding]:
        own = [found_from(row) for result in self.arrived.values() for row in result["found"]]
        return [*own, *checks.together(self._world())]

    def _world(self) -> list[HostFacts]:
        return [HostFacts(**result["facts"]) for result in self.arrived.values()]

    def _node_of(self, rank: int) -> str:
        """A rank's node; for one that never came, by its place in the hostfile."""
        if rank in self.arrived:
            return str(self.arrived[rank]["facts"]["node"])
        named, per_node = self.facts.nodes_expected, self.ranks.local_size
        index = rank // per_node
        return named[index] if index < len(named) else f"the node of rank {rank}"

    def _rates(self, answers: Mapping[int, dict[str, Any]]) -> dict[str, float]:
        timed = {rank: result["pairs"] for rank, result in answers.items() if result["pairs"]}
        if not timed or any("failed" in result for result in answers.values()):
            return {}
        rounds = speed.partners(len(self.nodes), speed.ROUNDS[self.mode])
        return speed.rates(rounds, self.nodes, timed, self.rows, speed.NUM_BYTES[self.mode])

    def _conclude(self, findings: list[Finding], measured: dict[str, Any] | None = None) -> Verdict:
        """Rank 0's verdict, on every rank."""
        if self.ranks.is_first:
            return self._announce(self.mailbox, Verdict(merged(findings), measured or {}))
        return self._heard(self.mailbox, 3 * self.seconds)

    def _heard(self, mailbox: StoreMailbox, seconds: float) -> Verdict:
        word = mailbox.hear("verdict", seconds)
        mailbox.count("heard")
        found = [found_from(row) for row in word["findings"]]
        return Verdict(found, code=word["code"], mailbox=mailbox)

    def _announce(self, mailbox: StoreMailbox, verdict: Verdict) -> Verdict:
        verdict.code, verdict.mailbox = self.report(verdict), mailbox
        rows = [asdict(finding) for finding in verdict.findings]
        mailbox.announce("verdict", {"findings": rows, "code": verdict.code})
        # The store ends with this process: first the others read it.
        deadline = time.monotonic() + 2 + self.ranks.size / 10_000
        present = len(self.arrived) - 1
        while mailbox.count("heard", 0) < present and time.monotonic() < deadline:
            time.sleep(0.01)
        return verdict
