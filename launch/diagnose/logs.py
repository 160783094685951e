"""What a batch job's output says of ranks and nodes that died."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from largebatch.common.text import and_more
from largebatch.launch import node_faults
from largebatch.launch.diagnose.causes import Cause

NAMES: Final = ("*.log", "*.out", "*.err", "*.o[0-9]*", "*.e[0-9]*", "logs*/**/*.log")
LONGEST: Final = 2000  # characters of a line that are looked at
SHOWN: Final = 160
MOST_KEPT: Final = 32  # matches of a pattern that are kept as evidence


@dataclass(frozen=True)
class Pattern:
    """A sentence in the output: what `tells` it is an expression, whose groups `rank` and `signal`
    say more, or that `node` finds one in the line, which it speaks against.
    """

    tells: re.Pattern[str] | None
    weight: int
    what: str
    do: str
    node: Callable[[str], str | None] = lambda line: None


LEAVE_OUT: Final = (
    "leave these nodes out of the next job, resume=auto (cluster.spares with cluster.restarts does "
    "so within a job)"
)

PATTERNS: Final = (
    Pattern(
        None, 96, "Nodes reported broken hardware", LEAVE_OUT + "; tell the site's support",
        node_faults.hardware,
    ),
    Pattern(
        None, 95, "The launcher lost nodes: they no longer answered it", LEAVE_OUT + "; where "
        "nodes come back, PALS_PING_PERIOD=240 and PALS_RPC_TIMEOUT=240 let it wait longer",
        node_faults.lost,
    ),
    Pattern(
        re.compile(r"shepherd(?: on \S+)? died(?: from signal (?P<signal>\d+))?"), 94,
        "The launcher's daemon on a node was killed", LEAVE_OUT + "; signal 9 on one node is "
        "mostly its hardware [others' jobs on Aurora], on many their memory that ran out, or the "
        "job's time", node_faults.shepherd,
    ),
    Pattern(
        node_faults.DIED, 92,
        "Ranks died from a signal", "9: killed, mostly for memory; 6: aborted, see the lines "
        "above; 11: a crash in native code; 15: ended by the launcher after another's death",
        node_faults.died,
    ),
    Pattern(
        None, 85, "Network interfaces reported errors with other nodes",
        LEAVE_OUT + ", if one is named by many", node_faults.peer,
    ),
    Pattern(
        re.compile(
            r"[Oo]ut ?[Oo]f ?[Mm]emory|OUT_OF_(?:DEVICE|HOST)_MEMORY|oom-kill|Killed process"
        ), 87, "Memory ran out", "a smaller engine.micro_batch_size, or sharding (engine=fsdp)",
    ),
    Pattern(
        re.compile(r"Event Queue overflow", re.I), 80,
        "The network interface's event queue ran over", "greater FI_CXI_DEFAULT_CQ_SIZE and "
        "FI_CXI_OFLOW_BUF_SIZE, FI_CXI_RX_MATCH_MODE=hybrid",
        lambda line: next(iter(node_faults.nodes_in(line)), None),
    ),
    Pattern(
        re.compile(r"No VNIs available"), 80,
        "The launcher found no virtual network left", "mpiexec --no-vni",
    ),
    Pattern(
        re.compile(r"Too many open files"), 80,
        "A process ran out of file descriptors", "ulimit -n in the job's script, before mpiexec",
    ),
    Pattern(
        re.compile(r"PBS: job killed: walltime|CANCELLED AT .* DUE TO TIME LIMIT"), 78,
        "The job's time was over", "checkpoint.every_minutes, and resume=auto in the next job",
    ),
    Pattern(
        re.compile(r"Connection closed by peer|Connection reset by peer"), 50,
        "Connections were closed by the other side: mostly because a rank there had died before",
        "look for what died first; this is the echo",
    ),
)  # fmt: skip


@dataclass
class Match:
    evidence: list[str] = field(default_factory=list)
    count: int = 0
    named: dict[str, dict[str, None]] = field(
        default_factory=lambda: {"nodes": {}, "ranks": {}, "signals": {}}
    )


def find_logs(run: Path, given: Sequence[Path]) -> list[Path]:
    """Output that the run's folder holds, and what is given; ValueError where that is not there."""
    found: dict[Path, None] = {}
    for path in (run, *given):
        if path.is_file():
            found[path] = None
        elif path.is_dir():
            files = (file for name in NAMES for file in sorted(path.glob(name)))
            found |= dict.fromkeys(file for file in files if file.is_file())
        elif path is not run:
            raise ValueError(f"--log must be a file or a folder that is there, got {path}")
    return list(found)


def read_logs(files: Sequence[Path], problems: list[str]) -> list[Cause]:
    """A cause for each sentence that is known, from all files together."""
    matches = [Match() for _ in PATTERNS]
    for path in files:
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                number, begins = 1, True
                while line := file.readline(LONGEST):  # of a longer one the rest is passed by
                    if begins:
                        _take(matches, line, f"{path.name}:{number}")
                    begins = line.endswith("\n")
                    number += begins
        except OSError as error:
            problems.append(f"{path} cannot be read: {error.strerror}")
    return [
        _cause(pattern, match)
        for pattern, match in zip(PATTERNS, matches, strict=True)
        if match.count
    ]


def _take(matches: list[Match], line: str, place: str) -> None:
    for pattern, match in zip(PATTERNS, matches, strict=True):
        found_here = [] if pattern.tells is None else [*pattern.tells.finditer(line)]
        if pattern.tells is not None and not found_here:
            continue
        node = pattern.node(line)
        if not found_here and node is None:
            continue
        match.count += 1
        if len(match.evidence) < MOST_KEPT:
            match.evidence.append(f"{place}: {line.strip()[:SHOWN]}")
        if node is not None:
            match.named["nodes"][node] = None
        for found in found_here:
            groups = found.groupdict()
            for group, name in (("rank", "ranks"), ("rank2", "ranks"), ("signal", "signals")):
                if groups.get(group):
                    match.named[name][groups[group]] = None


def _cause(pattern: Pattern, match: Match) -> Cause:
    named = "; ".join(f"{name} {and_more([*of], 8)}" for name, of in match.named.items() if of)
    times = f" ({match.count} times)" if match.count > 1 else ""
    what = f"{pattern.what}{': ' * bool(named)}{named}{times}."
    nodes = tuple(match.named["nodes"])
    return Cause(pattern.weight, what, pattern.do, tuple(match.evidence), nodes)
