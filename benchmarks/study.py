"""`largebatch bench study`: what a study takes beside its training steps, run in a bare loop.

A small study is made by its command, with one worker; the bare loop makes as many steps of each of
its optimizers and batch sizes in this process. Both in turn, with one thread. OVERRIDES are those
of `largebatch sweep study=…`, for another study than the usual one.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from largebatch.benchmarks import harness
from largebatch.benchmarks.harness import add_options, against, run
from largebatch.common.files import read_json
from largebatch.conf.build import build
from largebatch.conf.config import typed
from largebatch.records.names import CONFIG, SUMMARY
from largebatch.study.costs import StudyCost, read_cost
from largebatch.train.tasks import Task
from largebatch.train.transfer.coordinates import ShortRun

USUAL: Final = (
    "study=bytes", "study.optimizers=[adamw,lamb]", "study.batch_sizes=[64,512,4096]",
    "study.report_seeds=[2,3,4]", "study.rules=[]",
)  # fmt: skip
REFERENCE: Final = "steps in a bare loop"
STEPS: Final = 60
"""That are timed of each optimizer and batch size, after a tenth as many."""

FORMULAS: Final = {
    "processor": "median over the rounds of processor seconds: of the command with all it starts, "
    "or of the bare loop; a part of the study by its share of a worker's seconds",
    "ratio": f"median over the rounds of its processor seconds by those of the {REFERENCE}; then "
    "its quartiles",
    "start and end": "the command's seconds before its worker begins and after it has ended",
}

Steps = Mapping[Path, int]
"""By a run of an optimizer at a batch size, the steps of all such runs."""


@dataclass(frozen=True)
class Made:
    """A study that was made.

    Attributes:
        processor: seconds of all its processes.
        cost: what its folder says of its runs.
    """

    seconds: float
    processor: float
    cost: StudyCost


def main(arguments: Sequence[str]) -> int:
    """`largebatch bench study`; 0, or 2 where an option cannot be."""
    parser = argparse.ArgumentParser(prog="largebatch bench study", description=__doc__)
    usual = " ".join(USUAL)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDES", help=f"(default: {usual})")
    add_options(parser, 120.0)
    words = parser.parse_args(arguments).overrides or USUAL
    return run(parser, arguments, partial(measure, words), show)


def measure(words: Sequence[str], device: torch.device, seconds: float) -> dict[str, Any]:
    """Make the study again and again, and its steps."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, harness.progress_bar() as begin:
        note = begin("study", seconds)
        first = Path(name, "first")
        note(0.0, "warm-up, study")
        made(words, first)
        steps = steps_of(first)
        loops = {folder: prepared(folder) for folder in steps}
        samplers: dict[str, Any] = {
            "study": partial(made_anew, words),
            REFERENCE: partial(bare_seconds, steps, loops),
        }
        found = harness.run_rounds(samplers, seconds, note, num_warm_up=0)
    bare: list[float] = found[REFERENCE]
    rows = {
        part: against([seconds_of(study)[part] for study in found["study"]], bare)
        for part in seconds_of(found["study"][0])
    }
    return harness.head_of("study", device, FORMULAS) | {
        "overrides": list(words),
        "cost": asdict(found["study"][-1].cost),
        "wall_seconds": statistics.median(study.seconds for study in found["study"]),
        "rows": {REFERENCE: against(bare, bare)} | rows,
    }


def made_anew(words: Sequence[str]) -> Made:
    with tempfile.TemporaryDirectory() as name:
        return made(words, Path(name, "study"))


def made(words: Sequence[str], folder: Path) -> Made:
    """Make a study in a folder, by its command.

    Raises:
        RuntimeError: it fails.
    """
    command = [sys.executable, "-m", "largebatch", "sweep", *words]
    command += ["hydra.launcher.n_jobs=1", f"hydra.sweep.dir={folder}"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cost = read_cost(folder)
    if done.returncode or cost is None:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr}")
    worked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Made(seconds, worked, cost)


def seconds_of(study: Made) -> dict[str, float]:
    """Processor seconds of the parts of a study, and of all."""
    cost = study.cost
    worker = cost.seconds if cost.worker_seconds is None else cost.worker_seconds
    walls = {
        "its steps": cost.seconds - cost.evaluation_seconds - cost.record_seconds,
        "evaluations": cost.evaluation_seconds,
        "records": cost.record_seconds,
        "between runs": worker - cost.seconds,
        "start and end": study.seconds - worker,
    }
    parts = {part: study.processor * wall / study.seconds for part, wall in walls.items()}
    return parts | {"study": study.processor}


def steps_of(folder: Path) -> Steps:
    """The steps of all runs of a study, by the run of the least rate of their kind."""
    total: Counter[tuple[str, int]] = Counter()
    least: dict[tuple[str, int], tuple[float, Path]] = {}
    for path in folder.rglob(SUMMARY):
        summary = read_json(path)
        kind = summary["optimizer"], summary["batch_size"]
        total[kind] += summary["steps"]
        one = summary["lr"], path.parent
        least[kind] = min(least.get(kind, one), one)
    return {run: total[kind] for kind, (_, run) in least.items()}


def prepared(run: Path) -> ShortRun:
    """What a run trains, in this process."""
    loaded = OmegaConf.load(run / CONFIG)
    assert isinstance(loaded, DictConfig)
    config = typed(loaded)
    task: Task = build(config.task, "task")
    return ShortRun(config, task, read_json(run / SUMMARY)["batch_size"])


def bare_seconds(steps: Steps, loops: Mapping[Path, ShortRun]) -> float:
    """Processor seconds of all steps, from those of a few of each kind."""
    total = 0.0
    for folder, count in steps.items():
        loop = loops[folder]
        for _ in range(STEPS // 10):
            loop.step()
        began = time.process_time()
        for _ in range(STEPS):
            loop.step()
        total += (time.process_time() - began) / STEPS * count
    return total


def show(record: dict[str, Any], console: Console) -> None:
    """Print the table."""
    harness.show_head(record, console, "one worker of one thread")
    runs, wall = record["cost"]["runs"], record["wall_seconds"]
    title = f"{' '.join(record['overrides'])}: {runs} runs, {wall:.0f} s"
    shown = harness.make_table(title, "", ("processor s", "ratio", "quartiles"))
    for name, row in record["rows"].items():
        low, high = row["ratio_quartiles"]
        shown.add_row(name, f"{row['seconds']:.1f}", f"{row['ratio']:.2f}", f"{low:.2f}-{high:.2f}")
    console.print(shown)
