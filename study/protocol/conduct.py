"""Conducts a study in a folder: run what the protocol asks and the folder lacks, then report.

The records are the only memory: a study that was interrupted, or killed, resumes from them.
"""

import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from largebatch.common.errors import ConfigError
from largebatch.common.files import lock, lock_or_warn
from largebatch.records import RecordError, read_fields
from largebatch.records.fields import number, number_or_none, optional, whole
from largebatch.records.names import CHECKPOINTS, METRICS, SUMMARY
from largebatch.records.outcomes import UNFINISHED
from largebatch.records.record import telling, words_of
from largebatch.records.summary import status
from largebatch.study.decisions import write_decisions
from largebatch.study.protocol.progress import StudyProgress
from largebatch.study.protocol.questions import Job, Question
from largebatch.study.protocol.search import Result

LOCK: Final = ".lock"

More = Callable[[int], list[list[str]]]
"""Takes the place of a job that has ended, counted over all, and returns the jobs that follow."""
Launch = Callable[[list[list[str]], More], None]
"""Runs each list of overrides as a job, several at a time, and those that follow; raises where one
failed."""


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """The folder, for one study at a time; the ownership dies with this process.

    Raises:
        ConfigError: another study is running in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as handle:
        if not lock_or_warn(handle.fileno(), folder):
            raise ConfigError(
                f"another study is running in {folder}; wait for it, or choose another folder with "
                "hydra.sweep.dir=…"
            )
        yield


def conduct(
    protocol: Question, folder: Path, arguments: Sequence[str], launch: Launch,
    ended: Callable[[Path], None] = lambda run: None,
) -> dict[str, int]:  # fmt: skip
    """Run the protocol to its end in `folder`; returns how many runs were made and how many found.

    A point is asked again as soon as its own trials are in, whatever else runs.

    Args:
        arguments: overrides that every job shares.
        ended: is told the folder of each run that was made.
    """
    count = {"made": 0, "found": 0}
    launched: list[Job] = []

    def next_jobs() -> list[list[str]]:
        """What is asked and not there; what is there is told at once, and more is asked."""
        new: list[Job] = []
        while jobs := protocol.ask():
            for job in jobs:
                result = finished(folder, job)
                if result is None:
                    new.append(job)
                else:
                    count["found"] += 1
                    protocol.tell(job, result)
        for job in new:
            make_room(folder / job.folder, [*arguments, *job.overrides])
        launched.extend(new)
        progress.launched(new)
        write_decisions(folder, protocol.decisions())
        return [[*arguments, *job.overrides] for job in new]

    def more(place: int) -> list[list[str]]:
        job = launched[place]
        protocol.tell(job, result_of(folder, job))
        ended(folder / job.folder)
        count["made"] += 1
        progress.ended(job)
        return next_jobs()

    with StudyProgress(protocol, folder) as progress:
        if jobs := next_jobs():  # all others follow from these
            with progress.watching():
                launch(jobs, more)
        progress.show()
    return count


def in_rounds(launch: Callable[[list[list[str]]], None]) -> Launch:
    """Launch with what runs a batch of jobs to its end before it takes another."""

    def launch_rounds(jobs: list[list[str]], more: More) -> None:
        first = 0
        while jobs:
            launch(jobs)
            ended, first = range(first, first + len(jobs)), first + len(jobs)
            jobs = [new for place in ended for new in more(place)]

    return launch_rounds


def finished(folder: Path, job: Job) -> Result | None:
    """The result of `job`'s run once it has ended; None where there is none, or that of another.

    Seeds that join a study move its best scores: a run that is there may have given up too early
    for the new one, and a rule may have scaled from another learning rate.
    """
    try:
        summary = read_fields(folder / job.folder / SUMMARY)
        ended = summary.take("status", status)
        base_lr = summary.take("base_lr", number)
        most = summary.take("give_up_samples", optional(whole()))
        steps = summary.take("steps_to_target", optional(whole(1)))
        between = summary.find("steps_to_target_interpolated", number_or_none)
        loss = _or_infinite(summary.take("eval_loss", number_or_none))
        if ended == "diverged":  # whatever it was evaluated at before
            loss = math.inf
        result = Result(steps if between is None else between, loss)
    except FileNotFoundError:
        return None
    except RecordError as error:
        print(f"largebatch: {error}: this run is made again", file=sys.stderr)
        return None
    gave_up = ended == "exhausted" and most is not None and most < job.most_samples
    if ended in UNFINISHED or gave_up or base_lr != job.lr:
        return None
    return result


def _or_infinite(loss: float | None) -> float:
    return math.inf if loss is None else loss


def make_room(folder: Path, words: Sequence[str]) -> None:
    """Discard a run that is there, but for one that was cut off with checkpoints, which is resumed.

    A worker of a killed study ends within a moment of it, but may still be writing: its lock tells.
    """
    metrics = folder / METRICS
    if not metrics.exists():
        return
    with metrics.open("a") as handle:
        while lock(handle.fileno()) is False:
            time.sleep(0.1)
    same = telling(words_of(folder) or ()) == telling(words)
    if not same or not any((folder / CHECKPOINTS).glob("samples-*")):
        checkpoints = folder / CHECKPOINTS
        if checkpoints.is_symlink():  # they are elsewhere
            shutil.rmtree(checkpoints.resolve(), ignore_errors=True)
        shutil.rmtree(folder)


def result_of(folder: Path, job: Job) -> Result:
    """What a job's record says.

    Raises:
        KeyboardInterrupt: it has none, or it was interrupted.
    """
    result = finished(folder, job)
    if result is None:
        raise KeyboardInterrupt(f"{folder / job.folder} did not end")
    return result


def tie_workers_to_this_process() -> None:
    """Have processes started from here on end when this one does: see `die_with_parent`."""
    os.environ["LARGEBATCH_PARENT"] = str(os.getpid())
