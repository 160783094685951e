"""`largebatch checkpoint ls|verify|export|universal RUN`: what a run has saved, and what can be
made of it.
"""

import argparse
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from largebatch.common.text import byte_size, missing, say
from largebatch.records import Fields, printable
from largebatch.records.checkpoints import is_name, listed, samples_of
from largebatch.records.fields import moment, text, whole
from largebatch.records.names import CHECKPOINTS
from largebatch.records.outcomes import ExitCode
from largebatch.train.checkpoints.files import STATE, UNIVERSAL, problem, read_state, size_of


def main(arguments: list[str]) -> int:
    """Run `largebatch checkpoint ARGUMENTS`; returns the exit code."""
    options = parser().parse_args(arguments)
    act: Callable[[argparse.Namespace], int] = options.act
    try:
        return act(options)
    except ModuleNotFoundError as error:
        say(
            f"checkpoint {options.verb} needs {missing(error)}: pip install "
            f"'largebatch[{'deepspeed' if error.name == 'deepspeed' else 'train'}]'"
        )
    except (OSError, ValueError) as error:
        say(printable(error))
    return ExitCode.REFUSED


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        "largebatch checkpoint",
        description="What a run has saved. RUN is its folder, or one of its checkpoints.",
        epilog="exit codes: 0; 1 a checkpoint is broken (verify); 2 refused",
    )
    verbs = result.add_subparsers(dest="verb", required=True, metavar="ls|verify|export|universal")

    def verb(name: str, act: Callable[[argparse.Namespace], int], does: str) -> Any:
        made = verbs.add_parser(name, help=does, description=does)
        made.add_argument("run", type=Path, metavar="RUN")
        made.set_defaults(act=act)
        return made

    verb("ls", ls, "list the checkpoints, by sizes whole or broken, and which resume=auto takes")
    verb("verify", verify, "read every byte of every checkpoint, and compare")
    made = verb("export", export, "write the model's weights as one safetensors file")
    made.add_argument("file", type=Path, metavar="FILE.safetensors")
    made = verb(
        "universal", universal, "convert a DeepSpeed ZeRO checkpoint for worlds of any size"
    )
    made.add_argument(
        "--workers",
        type=_workers,
        default=min(4, os.cpu_count() or 1),
        help="processes that read shards (default: %(default)s)",
    )
    return result


def _workers(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def ls(options: argparse.Namespace) -> int:
    """One line a checkpoint."""
    checkpoints = those_of(options.run)
    problems = {path: problem(path, "size") or universal_problem(path) for path in checkpoints}
    taken, refusal = resumed_from(checkpoints[0].absolute().parents[1])
    rows = [("samples", "step", "saved", "size", "by", "ranks", "")]
    for path in checkpoints:
        about = _about(path)
        state = "whole" if problems[path] is None else f"broken: {problems[path]}"
        if (path / UNIVERSAL).exists():
            state += ", and converted for worlds of any size"
        if taken is not None and path.name == taken.name:
            state += "  <- resume=auto"
        rows.append((str(samples_of(path)), *about, state))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[:6], widths, strict=True)]
        print(printable("  ".join((*cells, row[6])).rstrip()))
    if refusal:
        print(printable(f"resume=auto takes none: {refusal}"))
    return 0


def resumed_from(run: Path) -> tuple[Path | None, str]:
    """The checkpoint that `resume=auto` takes, or why it takes none."""
    from largebatch.records.record import check_unfinished
    from largebatch.train.checkpoints.resume import check_complete

    try:
        check_complete(run)
        check_unfinished(run)
    except ValueError as error:
        return None, str(error)
    return next((path for path in reversed(listed(run)) if problem(path) is None), None), ""


def _about(checkpoint: Path) -> tuple[str, str, str, str, str]:
    """Step, time, size, engine and ranks of a checkpoint that may be broken."""
    try:
        state = Fields(read_state(checkpoint), f"{checkpoint / STATE}")
        size = byte_size(size_of(checkpoint))
    except (OSError, ValueError):
        return "?", "?", "?", "?", "?"
    steps = state.find_inside("progress").find("steps", whole())
    saved = state.find_inside("saved_by")
    engine, zero = saved.find("kind", text) or "dcp", saved.find("zero_stage", whole())
    if zero is not None:
        engine += f" ZeRO-{zero}"
    at = saved.find("time", moment) or (checkpoint / STATE).stat().st_mtime
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
    world = saved.find("world", whole(1))
    for what in state.problems:
        say(printable(what))
    return _or_unknown(steps), stamp, size, engine, _or_unknown(world)


def _or_unknown(value: int | None) -> str:
    return "?" if value is None else str(value)


def verify(options: argparse.Namespace) -> int:
    """Read all; exit code 1 where something is not what was written."""
    checkpoints, broken = those_of(options.run), 0
    for path in checkpoints:
        begun = time.perf_counter()
        what = problem(path, "full") or universal_problem(path, "full")
        if what is None:
            size = size_of(path)
            rate = size / (time.perf_counter() - begun) / 1e9
            print(f"{path.name}: whole ({byte_size(size)}, {rate:.2f} GB/s)", flush=True)
        else:
            broken += 1
            print(printable(f"{path.name}: broken: {what}"), flush=True)
    return ExitCode.FAILED if broken else 0


def export(options: argparse.Namespace) -> int:
    """The weights of the last good checkpoint, or of the one that is named."""
    from largebatch.train.checkpoints.export import export as write

    checkpoint = one_of(options.run)
    size = write(checkpoint, options.file)
    print(f"{options.file}: the weights of {checkpoint.name}, {byte_size(size)}")
    return 0


def universal(options: argparse.Namespace) -> int:
    """Convert the last good checkpoint, or the one that is named."""
    from largebatch.train.checkpoints.deepspeed import convert

    checkpoint = one_of(options.run)
    made = convert(checkpoint, options.workers)
    files = sum(path.is_file() for path in made.rglob("*"))  # for those who pay for each
    size = byte_size(size_of(made))
    print(f"{made}: resume=auto finds it in a world of any size ({size} in {files} files)")
    return 0


def universal_problem(checkpoint: Path, verify: str = "size") -> str | None:
    """What is wrong with the converted one in a checkpoint; None: nothing, or there is none."""
    found = checkpoint / UNIVERSAL
    what = problem(found, verify) if found.exists() else None
    return None if what is None else f"{UNIVERSAL}: {what}"


def those_of(run: Path) -> list[Path]:
    """The checkpoints of a run, or the one that is named."""
    if is_name(run.name) and run.is_dir():
        return [run]
    found = listed(run)
    if not found:
        raise ValueError(
            f"there are no checkpoints in {run / CHECKPOINTS}: give the folder of a run that was "
            "trained with checkpoint.every_samples, or one of its checkpoints"
        )
    return found


def one_of(run: Path) -> Path:
    """The checkpoint that is named, or the last good one of a run."""
    checkpoints = those_of(run)
    for path in reversed(checkpoints):
        what = problem(path)
        if what is None:
            return path
        say(f"passed by {path.name}: {what}")
    raise ValueError(f"no checkpoint in {run} is whole")
