"""Hydra's door to a study: composes, launches, and leaves the rest to `largebatch.study`."""

from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


@dataclass
class StudySweeperConf:
    _target_: str = "hydra_plugins.largebatch.study_sweeper.StudySweeper"


ConfigStore.instance().store(
    group="hydra/sweeper", name="largebatch_study", node=StudySweeperConf, provider="largebatch"
)


class StudySweeper(Sweeper):
    """Asks the study's protocol for jobs until it is done; any Hydra launcher runs them."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.config, self.hydra_context = config, hydra_context
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        # Hydra imports its plugins at every start: what they stand on comes only when it is used.
        from largebatch.study.protocol.sweep import sweep
        from largebatch.train.trackers.study import log_study

        report = sweep(
            arguments,
            config=self.config,
            compose=lambda overrides: self.hydra_context.config_loader.load_sweep_config(
                self.config, overrides
            ),
            launcher=self.launcher,
        )
        pictures = {name: path for name, path in report.pictures.items() if path.suffix == ".png"}
        node = OmegaConf.to_container(self.config.logger, resolve=True)
        assert isinstance(node, dict)
        log_study(node, report.html.parent, pictures, report.tables)
        return report
