"""`hydra/launcher=parsl`: from Hydra's job overrides to trials, and from their ends to its returns.

A trial is a process of its own (`python -m largebatch train …`), which composes its configuration
as a sweep's job: a crash of it, or of its node, leaves the sweep alive.
"""

import atexit
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, setup_globals
from omegaconf import DictConfig, OmegaConf, open_dict

from largebatch.common.errors import ConfigError, RunFailed, hydra_word
from largebatch.common.text import missing
from largebatch.conf.cluster_config import ClusterConfig, NodeConfig
from largebatch.distributed.walltime import end_of_job
from largebatch.launch.sweeps.backend import Backend
from largebatch.launch.sweeps.checks import checked, cluster_of
from largebatch.launch.sweeps.record import SweepRecord, Trial
from largebatch.launch.sweeps.scheduler import NodeHealth, Outcome, SweepProgress, TrialScheduler
from largebatch.launch.sweeps.settings import KEY, SweepSettings
from largebatch.launch.sweeps.slices import Slices, nodes_here
from largebatch.records.summary import objective

Compose = Callable[[list[str]], DictConfig]

# What each trial gets anew, or what concerns the sweep alone.
_NOT_PASSED_ON = (
    "hydra.launcher", "hydra/launcher", "hydra.sweep", "hydra/sweep", "hydra.run", "hydra.mode",
)  # fmt: skip


class TrialLauncher:
    """All batches of one sweep: the backend that they run on is held from the first to the last.
    `values` are those of hydra.launcher, `config` is the sweep's, `compose` gives that of one job.
    """

    def __init__(self, values: dict[str, Any], config: DictConfig, compose: Compose) -> None:
        self.settings = checked(values)
        self._config, self._compose = config, compose
        self._folder = Path(os.path.abspath(str(config.hydra.sweep.dir)))
        in_jobs = self.settings.shape == "jobs"
        self._end = end_of_job(None if in_jobs else self.settings.walltime)
        self._blame = NodeHealth()
        self._backend: Backend | None = None
        self._in_study = config.get("study") is not None

    def launch(self, jobs: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
        """Run the jobs; a return for each, in their order. ConfigError for another sweep in the
        folder, nodes or a cluster that do not fit; KeyboardInterrupt where it was stopped, and the
        same command resumes it.
        """
        setup_globals()
        trials = [self.trial(number, words) for number, words in enumerate(jobs, first)]
        with SweepRecord(self._folder) as record:
            if self._backend is None:
                cluster = cluster_of(self.settings, next(iter(self._config_dirs()), None))
                self._backend = make_backend(self.settings, cluster, record, self._folder)
                atexit.register(self._backend.close)
            if self.settings.dry_run:
                print(self._backend.show(trials[0]))
                print(f"# {len(trials)} jobs like this one would be submitted")
                raise SystemExit(0)
            conductor = TrialScheduler(
                trials, self._backend, record, self._blame, self.settings, self._end,
                SweepProgress(len(trials), silent=self._in_study),
            )  # fmt: skip
            try:
                outcomes = conductor.run()
            except BaseException:
                self._close()
                raise
        if len(outcomes) < len(trials):
            self._close()
            raise KeyboardInterrupt
        return [_returned(trial, outcomes[trial.name]) for trial in trials]

    def _close(self) -> None:
        if self._backend is not None:
            atexit.unregister(self._backend.close)
            self._backend.close()
            self._backend = None

    def _config_dirs(self) -> list[str]:
        """Those of --config-dir."""
        sources = self._config.hydra.runtime.config_sources
        return [source.path for source in sources if source.provider == "command-line"]

    def trial(self, number: int, words: Sequence[str]) -> Trial:
        """The trial of a job's overrides."""
        config = self._compose(list(words))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        name = str(OmegaConf.select(config, "hydra.sweep.subdir"))
        # As given: what a `${…}` in them stands for, a trial may not have yet.
        overrides: Any = OmegaConf.to_container(self._config.hydra.overrides.hydra)
        of_all = [
            word
            for word in map(str, overrides or ())
            if not word.lstrip("+~").startswith(_NOT_PASSED_ON)
        ]
        own = [word for word in words if not word.startswith("hydra.sweep.")]
        # That of this process, which a job of its own may not have.
        here = sys.executable if self.settings.shape != "jobs" else "python"
        program = [here if word == "python" else word for word in self.settings.command[:1]]
        command = [
            *program, *self.settings.command[1:],
            *(f"--config-dir={path}" for path in self._config_dirs()),
            "--multirun", *of_all, *own,
            "hydra/sweeper=largebatch_trial", f"hydra.sweeper.number={number}",
            f"hydra.sweep.dir={hydra_word(str(self._folder))}",
            f"hydra.sweep.subdir={hydra_word(name)}",
        ]  # fmt: skip
        return Trial(number, tuple(own), tuple(command), name, self._folder / name)


def make_backend(
    settings: SweepSettings, cluster: ClusterConfig | None, record: SweepRecord, folder: Path
) -> Backend:
    """Where trials run, by the settings' shape; ConfigError where it cannot be."""
    if settings.shape == "devices":
        try:
            import parsl  # noqa: F401 — a second of imports, and an extra that may not be there
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"hydra/launcher=parsl with {KEY}.shape={settings.shape} needs "
                f"{missing(error)}: pip install 'largebatch[parsl]'"
            ) from error
    if settings.shape == "jobs":
        from largebatch.launch.sweeps.jobs import Jobs

        assert cluster is not None
        return Jobs(cluster, settings, record, folder)
    nodes = nodes_here(settings.hostfile)
    if settings.shape == "nodes":
        return Slices(cluster or _plain(settings), nodes, settings.nodes_per_trial, folder)
    from largebatch.launch.sweeps.parsl_devices import Devices

    return Devices(cluster, settings, nodes, folder)


def _plain(settings: SweepSettings) -> ClusterConfig:
    """No cluster named: an mpiexec that takes -n, -ppn and -f, as MPICH's and Intel's do."""
    node = NodeConfig(ranks=settings.ranks_per_node or 1)
    nodes = settings.nodes_per_trial
    return ClusterConfig(name="this", scheduler="none", launcher="mpich", nodes=nodes, node=node)


def _returned(trial: Trial, outcome: Outcome) -> JobReturn:
    """As Hydra's sweepers take it: `return_value` is a number to make small, or raises why there is
    none.
    """
    returned = JobReturn(overrides=list(trial.words), working_dir=str(trial.folder))
    if outcome.summary is not None:
        returned.status, returned.return_value = JobStatus.COMPLETED, objective(outcome.summary)
    else:
        returned.status = JobStatus.FAILED
        returned.return_value = RunFailed(
            f"trial {trial.name}", outcome.why, outcome.status == "refused"
        )
    return returned
