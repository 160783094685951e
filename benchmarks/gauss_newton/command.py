"""`largebatch bench gauss_newton STUDY`: how few steps a layer-wise method could need.

Solves every layer's Gauss-Newton block at every step, at each batch size of a study, with rate and
damping searched as that study searches an optimizer's: the same grid, seeds, trials and budget. A
measuring instrument: a step costs what a hundred of an optimizer do.
After Abreu et al. 2025, https://arxiv.org/abs/2510.09378, whose layers are solved by an optimizer
within the optimizer; here by conjugate gradients.
"""

import argparse
import csv
import hashlib
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from largebatch.benchmarks.gauss_newton.training import Asked, run_to_target
from largebatch.benchmarks.harness import check
from largebatch.common.errors import ConfigError, format_config_error
from largebatch.common.files import write_whole
from largebatch.common.text import duration
from largebatch.conf.build import build
from largebatch.conf.config import TrainConfig, typed
from largebatch.conf.sweep_config import STEPS
from largebatch.distributed.ranks import die_with_parent
from largebatch.launch.sweeps.workers import num_workers
from largebatch.study.floor import COLUMNS, ORACLE
from largebatch.study.labels import cell
from largebatch.study.page.words import with_interval
from largebatch.study.protocol.protocol import Protocol, StudyJob
from largebatch.study.protocol.search import Result, Setting
from largebatch.study.statistics.intervals import intervals
from largebatch.study.statistics.table import SeedSteps
from largebatch.train.tasks import Task

METHOD: Final = "Gauss-Newton by layers"
OWN: Final = {"lr": 0.5, "damping": 0.3}
"""Where the search begins."""


@dataclass(frozen=True)
class Solver:
    """Of what samples each block is made, and how far it is solved."""

    tolerance: float
    most_products: int
    curvature_samples: int


def main(arguments: Sequence[str]) -> int:
    """`largebatch bench gauss_newton`; 0, or 2 where an option or a study cannot be."""
    parser = argparse.ArgumentParser(prog="largebatch bench gauss_newton", description=__doc__)
    parser.add_argument("overrides", nargs="+", help="study=NAME, and overrides of it")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"of the study: for {ORACLE}")
    parser.add_argument(
        "--tolerance", type=float, default=0.03, help="of a solve's residual (%(default)g)"
    )
    parser.add_argument(
        "--products", type=int, default=60, help="with a block at most, in a solve (%(default)s)"
    )
    parser.add_argument(
        "--curvature-samples", type=int, default=4096,
        help="of a batch, at most, that its blocks are made of (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=-1, help="default: one a core")
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    try:
        check(0 < options.tolerance < 1, "--tolerance", "above 0 and below 1", options.tolerance)
        check(options.products >= 1, "--products", "1 or more", options.products)
        samples = options.curvature_samples
        check(samples >= 1, "--curvature-samples", "1 or more", samples)
        solver = Solver(options.tolerance, options.products, samples)
        path = None if options.out is None else options.out / ORACLE
        search = SearchOfAll(*configured(options.overrides), solver, path)
        workers = num_workers(options.workers)
        spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        with ProcessPoolExecutor(workers, spawn, _begin, (os.getpid(),)) as pool:
            search.run(pool)
    except (ConfigError, OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print("   batch  steps with 95% interval")
    for line in search.told():
        print(line)
    seconds = time.perf_counter() - begin
    print(f"{len(search.runs)} runs in {duration(seconds)} on {workers} cores")
    if path is not None:
        print(path)
    return 0


def configured(overrides: Sequence[str]) -> tuple[TrainConfig, str]:
    """The study that is named, with this method in the place of its optimizers; its task's name.

    Raises:
        ConfigError: no study of steps to a loss.
    """
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException
    from omegaconf import open_dict
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_module("largebatch.conf", version_base="1.3"):
            composed = compose("train", list(overrides), return_hydra_config=True)
            task = str(composed.hydra.runtime.choices["task"])
            with open_dict(composed):
                del composed["hydra"]
            config = typed(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(format_config_error(error)) from error
    aim = config.target.aim
    counts_steps = config.study is not None and config.study.protocol == STEPS
    if not counts_steps or aim is None or aim.metric != "loss":
        raise ConfigError(
            "bench gauss_newton counts the steps of a study to a loss: name one, as in "
            "study=second_order"
        )
    assert config.study is not None
    study = replace(
        config.study, optimizers=[METHOD], search=["lr", "damping"], rules=[], rule_batches=[]
    )
    return replace(config, study=study), task


class KnownRun(NamedTuple):
    """Steps that were allowed, steps to the target, the last evaluation loss."""

    most_steps: int
    steps: float | None
    loss: float


Place = tuple[int, float, float, int]
"""Batch size, rate, damping and seed of a run, as the file has them."""


class SearchOfAll:
    """The search of rate and damping at each batch size of a study.

    Args:
        task: its name.
        path: of a file that is brought up to date after each run, and whose runs are not made
            again; None: none is kept.

    Raises:
        ValueError: the file is of another study or solver.
    """

    def __init__(self, config: TrainConfig, task: str, solver: Solver, path: Path | None) -> None:
        assert config.study is not None
        self._config, self._task, self._solver = config, task, solver
        self._study = config.study
        self.protocol = Protocol(config.study, {METHOD: OWN}, config.budget.samples)
        self._path = path
        self.runs = {} if path is None else known_runs(path, self._identity)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def run(self, pool: Executor) -> None:
        """Make what is asked and not known, until all points are searched and reported."""
        running: dict[Future[Result], StudyJob] = {}
        while True:
            while jobs := self.protocol.ask():
                for job in jobs:
                    known = self._known(job)
                    if known is None:
                        running[pool.submit(made, self._config, self._asked(job))] = job
                    else:
                        self.protocol.tell(job, known)
            if self._path is not None:
                write_whole(self._path, "".join(self._lines()))
            if not running:
                return
            for ended in wait(running, return_when=FIRST_COMPLETED).done:
                self._take(running.pop(ended), ended.result())

    def _known(self, job: StudyJob) -> Result | None:
        """What is known of a job; None where its run is not there, or gave up too early."""
        run = self.runs.get(self._place(job.batch_size, job.trial.setting, job.trial.seed))
        most = job.trial.give_up_steps
        if run is None or (run.steps is None and run.loss < math.inf and run.most_steps < most):
            return None
        return Result(None if run.steps is None or run.steps > most else run.steps, run.loss)

    def _asked(self, job: StudyJob) -> Asked:
        values = self._values(job.trial.setting)
        return Asked(
            batch_size=job.batch_size, lr=values["lr"], damping=values["damping"],
            seed=job.trial.seed, most_steps=job.trial.give_up_steps, **asdict(self._solver),
        )  # fmt: skip

    def _take(self, job: StudyJob, result: Result) -> None:
        place = self._place(job.batch_size, job.trial.setting, job.trial.seed)
        self.runs[place] = KnownRun(job.trial.give_up_steps, result.steps, result.loss)
        self.protocol.tell(job, result)
        steps = "no target" if result.steps is None else f"{result.steps:.2f} steps"
        told = f"{self._words(job.trial.setting)}, seed {job.trial.seed}: {steps}"
        print(f"{job.batch_size:>8,}  {told}", file=sys.stderr, flush=True)

    def _place(self, size: int, setting: Setting, seed: int) -> Place:
        values = self._values(setting)
        return size, float(cell(values["lr"])), float(cell(values["damping"])), seed

    def _values(self, setting: Setting) -> Mapping[str, float]:
        return self.protocol.values(METHOD, setting)

    def _words(self, setting: Setting) -> str:
        return ", ".join(f"{name} {value:.3g}" for name, value in self._values(setting).items())

    def told(self) -> Iterator[str]:
        """A line a point: its steps, what was chosen, whether a better rate may lie outside."""
        rows = [
            SeedSteps(METHOD, size, seed, self.runs[size, lr, damping, seed].steps, lr)
            for size, lr, damping, seed in self._chosen()
        ]
        found = intervals(rows)
        points = {one.batch_size: one for one in found[METHOD].points} if found else {}
        for (_, size), search in sorted(self.protocol.searches.items()):
            if search.chosen is None:
                yield f"{size:>8,}  missed by every setting"
                continue
            edge = ", at the edge of the rates tried" if any(search.open_sides) else ""
            steps = with_interval(points[size].steps)
            told = f"{self._words(search.chosen)}, {search.num_trials} runs{edge}"
            yield f"{size:>8,}  {steps}: {told}"

    def _chosen(self) -> set[Place]:
        """The runs that points are made of."""
        return {
            self._place(size, search.chosen, seed)
            for (_, size), search in self.protocol.searches.items()
            for seed in self._study.report_seeds or self._study.select_seeds
            if search.chosen is not None
        }

    def _lines(self) -> Iterator[str]:
        """A row a run; which are chosen as far as is known."""
        yield f"{COLUMNS}\n"
        target, chosen = str(self._config.target.aim), self._chosen()
        for place, run in sorted(self.runs.items()):
            known = (run.steps, place in chosen, self._task, target, run.most_steps, run.loss)
            row = (METHOD, *place, *known, self._identity)
            yield ",".join(map(cell, row)) + "\n"

    @property
    def _identity(self) -> str:
        """What all runs of a file share, as a hash."""
        shared = [self._config.task, self._config.model, self._config.evaluation.growth]
        text = json.dumps([*shared, asdict(self._solver)], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def known_runs(path: Path, identity: str) -> dict[Place, KnownRun]:
    """The runs of a file; none where there is no file.

    Raises:
        ValueError: it is of another study or solver, or no file of this benchmark's.
    """
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if any(row.get("identity") != identity for row in rows):
        raise ValueError(
            f"{path} holds runs of another study, model or solver: take another --out, or delete it"
        )
    found = {}
    for row in rows:
        place = int(row["batch_size"]), float(row["lr"]), float(row["damping"]), int(row["seed"])
        steps = float(row["steps"]) if row["steps"] else None
        found[place] = KnownRun(int(row["most_steps"]), steps, float(row["loss"]))
    return found


def _begin(parent: int) -> None:
    """Set a worker up, which ends when the process that started it does."""
    os.setsid()  # as a sweep's workers: Ctrl-C is the first process's to answer
    die_with_parent({"LARGEBATCH_PARENT": str(parent)})
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # products of small chances: half of a small batch's time


def made(config: TrainConfig, asked: Asked) -> Result:
    return run_to_target(config, _task(tuple(sorted(config.task.items()))), asked)


@cache
def _task(node: tuple[tuple[str, Any], ...]) -> Task:
    task: Task = build(dict(node), "task")
    return task
