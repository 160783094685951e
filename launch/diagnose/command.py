"""`largebatch explain`: why a run stopped or slowed, in words, from what its folder holds.

It reads the summary, the record of the steps, the heartbeat, events of the guard, what
`largebatch watch` heard from the ranks, what `largebatch nic` recorded, and the batch job's output.
Any of them may be missing. It measures nothing and asks nobody.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from largebatch.launch.diagnose.causes import Cause, in_order
from largebatch.launch.diagnose.logs import find_logs, read_logs
from largebatch.launch.diagnose.network import read_network
from largebatch.launch.diagnose.nic.survey import read_survey
from largebatch.launch.diagnose.ranks import read_reports
from largebatch.launch.diagnose.run import ending, read_run
from largebatch.launch.diagnose.run_times import read_steps
from largebatch.records import printable
from largebatch.records.names import EVENTS, HEARTBEAT, METRICS, SUMMARY, WATCH

SOURCES: Final = (SUMMARY, METRICS, HEARTBEAT, EVENTS, WATCH, "nic")


def main(arguments: Sequence[str]) -> int:
    """Print the causes, the likeliest first; returns the exit code, 2 where there is no run."""
    parser = argparse.ArgumentParser(
        "largebatch explain",
        description="Why a run stopped or slowed: which rank, collective, node or counter.",
        epilog="exit codes: 0 explained, also where nothing unusual was found; 2 refused",
    )
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument(
        "--log", type=Path, action="append", default=[], metavar="PATH",
        help="output of the batch job, or a folder of it, beside what the run's folder holds",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(arguments)
    try:
        causes, looked_at, problems = explain(options.run, options.log, time.time())
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    if options.json:
        found = {"looked_at": looked_at, "causes": [asdict(cause) for cause in causes]}
        print(json.dumps(found | {"problems": problems}, indent=1))
        return 0
    print(printable(ending(options.run, time.time())))
    for number, cause in enumerate(causes, 1):
        print(f"\n{number}. {cause}")
    if not causes:
        print("\nNothing unusual found.")
    if problems:
        print("\nDamaged, and left out:")
        for problem in problems:
            print(f"   {printable(problem)}")
    print(f"\nLooked at: {printable(', '.join(looked_at))}.")
    missing = [name for name in SOURCES if name not in looked_at]
    if missing:
        print(f"Not there: {', '.join(missing)}.")
    return 0


def explain(
    run: Path, logs: Sequence[Path], now: float
) -> tuple[list[Cause], list[str], list[str]]:
    """The causes, the likeliest first, the names of what was looked at, and what of it is damaged.
    ValueError where `run` holds no run, or a log is not there.
    """
    if run.exists() and not run.is_dir():
        raise ValueError(f"{run} is no folder: name a run's, its hydra.run.dir")
    looked_at = [name for name in SOURCES if (run / name).exists()]
    files = find_logs(run, logs)
    if not looked_at and not files:
        raise ValueError(
            f"{run} holds no run: name the folder that has {METRICS} and {HEARTBEAT}, its "
            "hydra.run.dir"
        )
    problems: list[str] = []
    steps = read_steps(run, problems)
    causes = read_run(run, now, problems)
    causes += read_reports(run, problems)
    causes += read_network(run, read_survey(run, problems), steps)
    causes += read_logs(files, problems)
    looked_at += [str(path) for path in files]
    return in_order(causes), looked_at, list(dict.fromkeys(problems))
