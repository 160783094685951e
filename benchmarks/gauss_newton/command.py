"""`largebatch bench gauss_newton STUDY`: how few steps a layer-wise method could need.

Solves every layer's Gauss-Newton block at every step, at each batch size of a study, with rate and
damping searched as that study searches an optimizer's: the same grid, seeds, trials and budget. A
measuring instrument: a step costs what a hundred of an optimizer do.
After Abreu et al. 2025, https://arxiv.org/abs/2510.09378, whose layers are solved by an optimizer
within the optimizer; here by conjugate gradients.
"""

import argparse
import csv
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch

from largebatch.benchmarks.gauss_newton.training import Asked, run_to_target
from largebatch.benchmarks.harness import check
from largebatch.common.errors import ConfigError, format_config_error
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
    """How far each block is solved."""

    tolerance: float
    most_products: int


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
    parser.add_argument("--workers", type=int, default=-1, help="default: one a core")
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    try:
        check(0 < options.tolerance < 1, "--tolerance", "above 0 and below 1", options.tolerance)
        check(options.products >= 1, "--products", "1 or more", options.products)
        solver = Solver(options.tolerance, options.products)
        config, task = configured(options.overrides)
        search = SearchOfAll(config, task, solver)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
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
    print(f"{len(search.results)} runs in {duration(seconds)} on {workers} cores")
    if options.out is not None:
        search.write(options.out / ORACLE)
        print(options.out / ORACLE)
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


class SearchOfAll:
    """The search of rate and damping at each batch size of a study.

    Args:
        task: its name.
    """

    def __init__(self, config: TrainConfig, task: str, solver: Solver) -> None:
        assert config.study is not None
        self._config, self._task, self._solver = config, task, solver
        self._study = config.study
        self.protocol = Protocol(config.study, {METHOD: OWN}, config.budget.samples)
        self.results: dict[tuple[int, Setting, int], Result] = {}
        """By batch size, setting and seed: a run that was cut may be made again, to its end."""

    def run(self, pool: Executor) -> None:
        """Make what is asked, until all points are searched and reported."""
        running: dict[Future[Result], StudyJob] = {}
        while True:
            for job in self.protocol.ask():
                running[pool.submit(made, self._config, self._asked(job))] = job
            if not running:
                return
            for ended in wait(running, return_when=FIRST_COMPLETED).done:
                self._take(running.pop(ended), ended.result())

    def _asked(self, job: StudyJob) -> Asked:
        values = self._values(job.trial.setting)
        return Asked(
            batch_size=job.batch_size, lr=values["lr"], damping=values["damping"],
            seed=job.trial.seed, most_steps=job.trial.give_up_steps,
            tolerance=self._solver.tolerance, most_products=self._solver.most_products,
        )  # fmt: skip

    def _take(self, job: StudyJob, result: Result) -> None:
        self.results[job.batch_size, job.trial.setting, job.trial.seed] = result
        self.protocol.tell(job, result)
        steps = "no target" if result.steps is None else f"{result.steps:.2f} steps"
        told = f"{self._words(job.trial.setting)}, seed {job.trial.seed}: {steps}"
        print(f"{job.batch_size:>8,}  {told}", file=sys.stderr, flush=True)

    def _values(self, setting: Setting) -> Mapping[str, float]:
        return self.protocol.values(METHOD, setting)

    def _words(self, setting: Setting) -> str:
        return ", ".join(f"{name} {value:.3g}" for name, value in self._values(setting).items())

    def told(self) -> Iterator[str]:
        """A line a point: its steps, what was chosen, whether a better rate may lie outside."""
        found = intervals(self._chosen())
        points = {one.batch_size: one for one in found[METHOD].points} if found else {}
        for (_, size), search in sorted(self.protocol.searches.items()):
            if search.chosen is None:
                yield f"{size:>8,}  missed by every setting"
                continue
            edge = ", at the edge of the rates tried" if any(search.open_sides) else ""
            steps = with_interval(points[size].steps)
            told = f"{self._words(search.chosen)}, {search.num_trials} runs{edge}"
            yield f"{size:>8,}  {steps}: {told}"

    def _chosen(self) -> Iterator[SeedSteps]:
        for (size, setting, seed), result in self.results.items():
            if self._is_chosen(size, setting, seed):
                yield SeedSteps(METHOD, size, seed, result.steps, self._values(setting)["lr"])

    def _is_chosen(self, size: int, setting: Setting, seed: int) -> bool:
        seeds = self._study.report_seeds or self._study.select_seeds
        return setting == self.protocol.searches[METHOD, size].chosen and seed in seeds

    def write(self, path: Path) -> None:
        """A row a run, by batch size, setting and seed."""
        target = str(self._config.target.aim)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS.split(","))
            for (size, setting, seed), result in sorted(self.results.items()):
                chosen, values = self._is_chosen(size, setting, seed), self._values(setting)
                row = (METHOD, size, values["lr"], values["damping"], seed, result.steps, chosen)
                writer.writerow([cell(value) for value in (*row, self._task, target)])


def _begin(parent: int) -> None:
    """Set a worker up, which ends when the process that started it does."""
    die_with_parent({"LARGEBATCH_PARENT": str(parent)})
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # products of small chances: half of a small batch's time


def made(config: TrainConfig, asked: Asked) -> Result:
    return run_to_target(config, _task(tuple(sorted(config.task.items()))), asked)


@cache
def _task(node: tuple[tuple[str, Any], ...]) -> Task:
    task: Task = build(dict(node), "task")
    return task
