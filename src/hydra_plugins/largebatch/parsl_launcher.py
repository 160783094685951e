"""Hydra's door to sweeps over an allocation: `hydra/launcher=parsl`, and the sweeper of a trial."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, run_job
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from largebatch.launch.sweeps.settings import SweepSettings


@dataclass
class ParslLauncherConf(SweepSettings):
    _target_: str = "hydra_plugins.largebatch.parsl_launcher.ParslLauncher"


@dataclass
class TrialSweeperConf:
    _target_: str = "hydra_plugins.largebatch.parsl_launcher.TrialSweeper"
    number: int = 0


_TRAIN = SweepSettings().command
_store = ConfigStore.instance().store
_store(group="hydra/launcher", name="parsl", node=ParslLauncherConf, provider="largebatch")
_store(group="hydra/sweeper", name="largebatch_trial", node=TrialSweeperConf, provider="largebatch")


class ParslLauncher(Launcher):
    """Runs each job as a process of its own, somewhere on an allocation or in a job of its own."""

    def __init__(self, **values: Any) -> None:
        self._values, self._launcher = values, None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        # Another process runs the task, by hydra.launcher.command.
        own = task_function.__module__.startswith("largebatch.")
        if not own and list(self._values["command"]) == _TRAIN:
            from largebatch.common.errors import ConfigError

            name = getattr(task_function, "__qualname__", type(task_function).__qualname__)
            raise ConfigError(
                f"hydra/launcher=parsl runs hydra.launcher.command, which is {' '.join(_TRAIN)}, "
                f"and not this app's {name}: give the app's command as hydra.launcher.command="
                "[python,app.py] (it must leave a summary.json in its folder), or use "
                "hydra/launcher=cores, which runs any task on this machine"
            )
        self.config, self.hydra_context = config, hydra_context

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        # Hydra imports its plugins at every start: what they stand on comes only when it is used.
        from largebatch.launch.sweeps.launcher import TrialLauncher

        if self._launcher is None:
            self._launcher = TrialLauncher(
                self._values,
                self.config,
                lambda words: self.hydra_context.config_loader.load_sweep_config(
                    self.config, words
                ),
            )
        return self._launcher.launch(job_overrides, initial_job_idx)


class TrialSweeper(Sweeper):
    """One job of a sweep, in this process: what ParslLauncher has another process do."""

    def __init__(self, number: int) -> None:
        self._number = number

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.config, self.hydra_context = config, hydra_context
        self._task_function = task_function

    def sweep(self, arguments: list[str]) -> Any:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, arguments)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = self._number
        return run_job(
            hydra_context=self.hydra_context,
            task_function=self._task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        ).return_value
