"""`largebatch study status DIR`: how far the study in a folder is, what it took, what is left.

Reads records alone, while the study runs or after. Exit code 0, or 2 and one sentence on stderr
where the folder holds no study.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from largebatch.common.text import duration
from largebatch.records import RecordError
from largebatch.records.outcomes import ExitCode


def main(argv: Sequence[str]) -> int:
    """Run `largebatch study …`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="largebatch study", description="a study in a folder")
    commands = parser.add_subparsers(dest="command", required=True)
    status = commands.add_parser("status", help="done, running, left; cost so far and to come")
    status.add_argument("folder", type=Path, help="the folder of a study")
    folder = parser.parse_args(argv).folder
    from largebatch.study.protocol.status import read_status

    try:
        found = read_status(folder)
    except FileNotFoundError:
        print(
            f"largebatch study: {folder} holds no study (no study.json): name the folder that "
            "`largebatch sweep study=…` wrote, studies/bytes for one",
            file=sys.stderr,
        )
        return ExitCode.REFUSED
    except (RecordError, ValueError) as error:
        print(f"largebatch study: {error}", file=sys.stderr)
        return ExitCode.REFUSED
    print(f"{folder}: {found.fraction:.0%} by cost, {'running' if found.is_running else 'at rest'}")
    for row in found.rows:
        print(
            f"  {row.optimizer:12} {row.points_done} of {row.points} points, {row.done} runs done, "
            f"{row.running} running, {row.wanted} more asked for now; {duration(row.seconds)} spent"
        )
    left = "" if found.seconds_left is None else f", about {duration(found.seconds_left)} to come"
    print(f"  in all {found.done} runs, {duration(found.seconds)} of runs so far{left}")
    return ExitCode.DONE
