"""A study as Hydra's sweeper sees it: from the composed configuration to the report."""

import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from largebatch.common.errors import ConfigError, SweepFailed
from largebatch.common.loading import load_matplotlib
from largebatch.conf.config import typed
from largebatch.conf.sweep_config import LOSS, STEPS, StudyConfig
from largebatch.records.target import Target
from largebatch.study.costs import StudyCost, add_cost
from largebatch.study.forks import may_fork
from largebatch.study.protocol.conduct import (
    Launch,
    More,
    conduct,
    in_rounds,
    owned,
    tie_workers_to_this_process,
)
from largebatch.study.protocol.identity import check_grid, check_identity
from largebatch.study.protocol.questions import question_of
from largebatch.study.report import StudyReport, print_report, write_report

Compose = Callable[[list[str]], DictConfig]


def sweep(
    arguments: list[str], *, config: DictConfig, compose: Compose, launcher: Launcher
) -> StudyReport:
    """Conduct the study of `config` and write its report.

    Raises:
        ConfigError: a study that cannot be run as asked.
    """
    begin = time.perf_counter()
    composed = _without_hydra(config)
    shared = typed(composed)
    if shared.study is None:
        raise ConfigError("hydra/sweeper=largebatch_study needs a study: study=bytes or your own")
    _refuse_sweeps(arguments)
    _check_target(shared.study, shared.target.aim)
    optimizers = {
        name: typed(_without_hydra(compose([*arguments, f"optim={name}"]))).optim
        for name in shared.study.optimizers
    }
    protocol = question_of(shared.study, optimizers, shared.budget.samples, shared.lr)
    folder = Path(str(config.hydra.sweep.dir))
    with owned(folder):
        check_identity(folder, _identity(composed, optimizers))
        check_grid(folder, shared.study)
        tie_workers_to_this_process()
        cost, conducted = StudyCost(), time.perf_counter()
        count = conduct(protocol, folder, arguments, _launch_by(launcher), cost.take)
        workers = getattr(launcher, "num_workers", None)
        if workers is not None:
            cost.worker_seconds = workers * (time.perf_counter() - conducted)
        if cost.runs:
            add_cost(folder, cost)
        load_matplotlib()
        report = write_report(folder, forked=may_fork())
    print_report(report)
    found = f", {count['found']} were there" if count["found"] else ""
    print(f"study took {time.perf_counter() - begin:.0f} s ({count['made']} runs made{found})")
    if said := cost.in_words():
        print(said)
    print(f"report: {os.path.relpath(report.html)}")
    return report


def _check_target(study: StudyConfig, target: Target | None) -> None:
    if study.protocol == STEPS and target is None:
        raise ConfigError(
            "a study counts steps to a target: give target.loss, or target.metric and target.value"
        )
    if study.protocol == LOSS and target is not None:
        raise ConfigError(
            f"study.protocol={LOSS} spends its budgets whole, and a run ends at its target: set "
            f"target.loss=null and target.metric=null, got {target}"
        )


def _launch_by(launcher: Launcher) -> Launch:
    """Run jobs, and those that follow from them as each ends where the launcher can, else a round
    at a time.
    """
    num_launched = 0

    def check(returned: Sequence[JobReturn]) -> None:
        nonlocal num_launched
        num_launched += len(returned)
        failures = [run._return_value for run in returned if run.status == JobStatus.FAILED]
        if failures:
            raise SweepFailed(failures, len(returned))

    grow = getattr(launcher, "launch_growing", None)

    def launch(jobs: list[list[str]], more: More) -> None:
        assert grow is not None
        check(grow(jobs, num_launched, more))

    def launch_round(jobs: list[list[str]]) -> None:
        check(launcher.launch(jobs, initial_job_idx=num_launched))

    return in_rounds(launch_round) if grow is None else launch


def _without_hydra(config: DictConfig) -> DictConfig:
    return OmegaConf.create({key: config._get_node(key) for key in config if key != "hydra"})


def _refuse_sweeps(arguments: list[str]) -> None:
    for override in OverridesParser.create().parse_overrides(arguments):
        if override.is_sweep_override():
            raise ConfigError(
                f"a study chooses its own values, got {override.input_line}: use study.optimizers, "
                "study.batch_sizes, study.select_seeds and study.report_seeds, as lists like "
                "[0,1,2]"
            )


def _identity(composed: DictConfig, optimizers: dict[str, Any]) -> dict[str, Any]:
    """What all runs of the study share, and must keep sharing for its folder to be one study."""
    node = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(node, dict)
    # A study sets these for each run; more of them may be asked for later.
    for name in ("study", "optim", "scaling", "seed", "logger"):
        del node[name]
    del node["batch"]["size"], node["target"]["give_up_samples"]
    versions = {name: version(name) for name in ("torch", "numpy")}
    return {
        "config": node,
        "versions": versions | {"python": platform.python_version()},
    } | {f"optim={name}": optim for name, optim in optimizers.items()}
