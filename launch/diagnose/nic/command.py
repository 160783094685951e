"""`largebatch nic record|report`: what the network interfaces of the nodes counted during a run."""

import argparse
import math
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from largebatch.launch.diagnose.nic.counters import IMPORTANT, list_counters
from largebatch.records import printable

FOLDER = "nic"
"""Of a run's folder, where its records are."""


def main(arguments: Sequence[str]) -> int:
    """Record until a signal, or report; return the exit code, 2 for options that are refused."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        if options.command == "record":
            return record(options)
        return report(options)
    except (ValueError, OSError) as error:
        print(f"largebatch nic: {error}", file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "largebatch nic", description=__doc__, epilog="exit codes: 0 done; 2 refused"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser(
        "record",
        help="sample the counters of this node until SIGTERM or SIGINT",
        description="Sample the counters of this node's network interfaces; one a node, beside "
        "the run: mpiexec -n NODES --ppn 1 largebatch nic record --out RUN/nic &",
    )
    add = recording.add_argument
    add("--out", type=Path, required=True, metavar="FOLDER",
        help="of the records, nic-NODE.jsonl: RUN/nic")  # fmt: skip
    add("--every", type=float, default=10.0, metavar="SECONDS", help="default: %(default)g")
    add("--seconds", type=float, default=math.inf, help="to record (default: until stopped)")
    add("--only", choices=("important", "all"), default="important",
        help="important: those that tell of waiting, repeating and losing (default)")  # fmt: skip
    add("--root", type=Path, default=Path("/"), help="above sys/ and run/ (default: %(default)s)")
    add("--node", default=socket.gethostname().partition(".")[0], help="default: %(default)s")
    reporting = commands.add_parser("report", help="what they say, in words and as nic.png")
    reporting.add_argument("folder", type=Path, help="a run's folder, or one of records")
    reporting.add_argument("--out", type=Path, metavar="FILE", help="default: FOLDER/nic.png")
    return parser


def record(options: argparse.Namespace) -> int:
    """Sample in even steps of time; a sample that takes longer than a step skips some."""
    from largebatch.launch.diagnose.nic.record import Recorder

    for option in ("every", "seconds"):
        if not getattr(options, option) > 0:
            raise ValueError(f"--{option} must be > 0 seconds, got {getattr(options, option)}")
    if "/" in options.node or not options.node:
        raise ValueError(f"--node must be a name without /, got {options.node!r}")
    counters = list_counters(options.root, None if options.only == "all" else IMPORTANT)
    if not counters:
        raise ValueError(
            f"{options.root} has no counters in sys/class/cxi/cxi*/device/telemetry or "
            "run/cxi/cxi*: this is no node with Slingshot interfaces, or --root is another tree"
        )
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"nic-{options.node}.jsonl"
    recorder = Recorder(path, options.node, counters, options.every)
    line = f"recording {len(counters):,} counters every {options.every:g} s into {path}"
    print(f"largebatch nic: {line}", flush=True)
    begun = time.monotonic()
    took, failures = [], 0
    try:
        while not stop.is_set() and time.monotonic() - begun < options.seconds:
            try:
                took.append(recorder.sample())
            except OSError as error:  # a full disk: the next sample may find room
                failures += 1
                if failures == 1:
                    print(f"largebatch nic: {path}: {error}; going on", file=sys.stderr)
            if len(took) == 1:
                say_unreadable(recorder.unreadable, len(counters))
            past = time.monotonic() - begun
            left = min(options.every - past % options.every, max(0.0, options.seconds - past))
            stop.wait(left)
    finally:
        recorder.close()
    if took:
        line = f"{len(took)} samples of {len(counters):,} counters in {path}: "
        line += f"{recorder.bytes_written / len(took):,.0f} bytes and "
        line += f"{1e3 * statistics.median(took):.1f} ms a sample"
        print(f"largebatch nic: {line}")
    return 0 if took else 1


def say_unreadable(reasons: dict[str, int], total: int) -> None:
    for reason, count in reasons.items():
        line = f"{count:,} of {total:,} counters cannot be read ({reason}); going on without them"
        print(f"largebatch nic: {line}", file=sys.stderr)


def report(options: argparse.Namespace) -> int:
    """Words to standard output, the picture beside the records."""
    from largebatch.common.figures import DPI
    from largebatch.launch.diagnose.nic.picture import nic_figure
    from largebatch.launch.diagnose.nic.report import format_survey
    from largebatch.launch.diagnose.nic.survey import read_survey
    from largebatch.launch.diagnose.run_times import read_steps

    folder: Path = options.folder
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: name a run's, or one of nic-NODE.jsonl files")
    problems: list[str] = []
    survey, steps = read_survey(folder, problems), read_steps(folder, problems)
    for problem in problems:
        print(f"largebatch nic: {printable(problem)}", file=sys.stderr)
    if survey is None:
        raise ValueError(
            f"{folder} holds no nic-NODE.jsonl, nor does {folder / FOLDER}: record them during the "
            f"run, with largebatch nic record --out {folder / FOLDER}"
        )
    for line in format_survey(survey, steps):
        print(printable(line))
    out = options.out or folder / "nic.png"
    nic_figure(survey, steps).savefig(out, dpi=DPI)
    print(f"picture: {out}")
    return 0
