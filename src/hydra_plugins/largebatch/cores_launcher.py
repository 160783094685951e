"""Hydra's door to `hydra/launcher=cores`: jobs side by side on this machine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class CoresLauncherConf:
    """Attributes:
    n_jobs: jobs at a time; -1: as many as there are cores, -2: all but one.
    """

    _target_: str = "hydra_plugins.largebatch.cores_launcher.CoresLauncher"
    n_jobs: int = -1


ConfigStore.instance().store(
    group="hydra/launcher", name="cores", node=CoresLauncherConf, provider="largebatch"
)


class CoresLauncher(Launcher):
    """Runs jobs in worker processes, each making one after another."""

    def __init__(self, n_jobs: int) -> None:
        self._n_jobs = n_jobs
        self.num_workers: int | None = None  # once jobs are launched
        self._workers: Any = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.config, self.hydra_context = config, hydra_context
        self._task_function = task_function

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        return self._launch(job_overrides, initial_job_idx)

    def launch_growing(
        self,
        job_overrides: Sequence[Sequence[str]],
        initial_job_idx: int,
        more: Callable[[int], Sequence[Sequence[str]]],
    ) -> Sequence[JobReturn]:
        """Launch jobs, and with each that has succeeded those that `more` returns for its place.
        What is returned leaves out how they were configured.
        """
        return self._launch(job_overrides, initial_job_idx, more=more, brief=True)

    def _launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int, *, brief: bool = False,
        **more: Any,
    ) -> Sequence[JobReturn]:  # fmt: skip
        # Hydra imports its plugins at every start: what they stand on comes only when it is used.
        from largebatch.launch.sweeps.workers import Sweep, Workers, num_workers

        if self._workers is None:
            self.num_workers = num_workers(self._n_jobs)
            self._workers = Workers(self.num_workers)
        sweep = Sweep(self.hydra_context, self.config, self._task_function, brief)
        returned: Sequence[JobReturn] = self._workers.launch(
            sweep, job_overrides, initial_job_idx, **more
        )
        return returned
