"""Sweeps of runs: what one of them returns to Hydra, and that all of them are made.

A sweep resumes in its folder: runs that have ended are passed by, others are resumed or begun. So
the same command makes what is missing, whatever ended the last one.
"""

import json
import math
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf, open_dict

from largebatch.common.errors import ConfigError, RunFailed, SweepFailed
from largebatch.common.text import common_words, say, terminal_width
from largebatch.conf.yaml_text import to_yaml
from largebatch.records import find_fields
from largebatch.records.names import SUMMARY
from largebatch.records.outcomes import UNFINISHED
from largebatch.records.summary import in_words, line_of_sweep, status
from largebatch.train.checkpoints.resume import check_same

TRACEBACK: Final = "traceback.txt"
MULTIRUN: Final = "multirun.yaml"

PLANNED: Final = "LARGEBATCH_SWEEP"
"""The variable in which a sweep tells the processes of its runs how many these are."""


def shown_folder() -> str:
    """Return this run's folder as the user would type it, whatever Hydra has made the current."""
    settings = HydraConfig.get()
    return os.path.relpath(settings.runtime.output_dir, settings.runtime.cwd)


def planned_sweep() -> dict[str, Any] | None:
    """Return how many `runs` this run's sweep has and which words all have in `common`; None
    outside a sweep of given runs.
    """
    told = os.environ.get(PLANNED)
    return None if told is None else json.loads(told)


def line_of(summary: Mapping[str, Any]) -> str:
    """Return how this run ended; in a sweep with which it is, and what sets it apart."""
    planned, settings, folder = planned_sweep(), HydraConfig.get(), Path(shown_folder())
    if planned is None:
        return in_words(summary, folder)
    own = [word for word in settings.overrides.task if word not in planned["common"]]
    width = terminal_width(sys.stdout)
    return line_of_sweep(settings.job.num + 1, planned["runs"], own, summary, folder, width)


def failure_of(error: Exception) -> RunFailed:
    """Return what a sweep makes of an error that has ended this run, or kept it from beginning."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    if isinstance(error, ConfigError):
        if not any(folder.iterdir()):
            folder.rmdir()
        return RunFailed(shown_folder(), str(error), refused=True)
    (folder / TRACEBACK).write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    why = " ".join(f"{type(error).__name__}: {error}".split())
    return RunFailed(shown_folder(), f"{why} (see {os.path.join(shown_folder(), TRACEBACK)})")


def reported(error: RunFailed) -> RunFailed:
    """Print the failure at once: the sweep may last for hours yet."""
    say(error)
    return error


def _written_at(path: Path) -> int:
    """Nanoseconds; 0 where it is not there."""
    return path.stat().st_mtime_ns if path.exists() else 0


class EveryRun(Launcher):
    """A launcher whose failures do not end the sweep: they are raised when all runs were tried."""

    def __init__(self, config: DictConfig, launcher: Launcher, loader: ConfigLoader) -> None:
        self.config, self._launcher, self._loader = config, launcher, loader
        self._folder = Path(str(config.hydra.sweep.dir))
        self._multirun = self._folder / MULTIRUN
        self._before = self._multirun.read_bytes() if self._multirun.exists() else None
        self._failures: list[BaseException] = []
        self._num_runs = 0
        self._words: list[list[str]] = []
        """The overrides of every run."""
        self._ended: dict[Path, int] = {}
        """Summaries of runs that had ended before, and when each was written."""

    def setup(self, **parts: Any) -> None:
        """The launcher within has been set up."""

    def check(self, batch: Sequence[Sequence[str]]) -> None:
        """Compose the runs of a batch, and refuse a folder that holds those of another sweep."""
        for number, overrides in enumerate(batch, len(self._words)):
            config = self._loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = number
            folder = self._folder / str(config.hydra.sweep.subdir)
            if folder.exists():
                self._note_ended(folder / SUMMARY)
                HydraConfig.instance().set_config(config)
                with open_dict(config):
                    del config["hydra"]
                self._check_one(folder, to_yaml(OmegaConf.to_container(config, resolve=True)))
        self._words += map(list, batch)
        told = {"runs": len(self._words), "common": sorted(common_words(self._words))}
        os.environ[PLANNED] = json.dumps(told)

    def _note_ended(self, path: Path) -> None:
        summary = find_fields(path, [])
        if summary is not None and summary.find("status", status) not in (None, *UNFINISHED):
            self._ended[path] = _written_at(path)

    def _check_one(self, folder: Path, config: str) -> None:
        try:
            check_same(folder, config)
        except ConfigError:
            if self._before is not None:
                self._multirun.write_bytes(self._before)
            raise

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        returned = self._launcher.launch(job_overrides, initial_job_idx)
        for run in returned:
            self._num_runs += 1
            if run.status == JobStatus.FAILED:
                self._failures.append(run._return_value)
                run.status, run.return_value = JobStatus.COMPLETED, math.inf
        return returned

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        os.environ.pop(PLANNED, None)
        if error is None and self._failures:
            raise SweepFailed(self._failures, self._num_runs)
        passed = sum(_written_at(path) == at for path, at in self._ended.items())
        if error is None and passed == self._num_runs > 0:
            print(f"all {passed} runs have ended already; their records are in {self._folder}")
