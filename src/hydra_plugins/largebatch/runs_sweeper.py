"""Hydra's door to sweeps that survive their runs: its basic sweeper, all of whose jobs are made."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override


@dataclass
class RunsSweeperConf:
    _target_: str = "hydra_plugins.largebatch.runs_sweeper.RunsSweeper"
    max_batch_size: int | None = None
    params: dict[str, str] | None = None


ConfigStore.instance().store(
    group="hydra/sweeper", name="largebatch_runs", node=RunsSweeperConf, provider="largebatch"
)


class RunsSweeper(BasicSweeper):
    """Every combination of the values given, all of them made, whichever fail."""

    def sweep(self, arguments: list[str]) -> Any:
        # Hydra imports its plugins at every start: what they stand on comes only when it is used.
        from largebatch.train.sweeps import EveryRun

        assert self.config is not None
        assert self.launcher is not None
        assert self.hydra_context is not None
        self._every_run = EveryRun(self.config, self.launcher, self.hydra_context.config_loader)
        self.launcher = self._every_run
        with self._every_run:
            return super().sweep(arguments)

    @staticmethod
    def split_arguments(
        overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        from largebatch.common.errors import ConfigError

        for override in overrides:
            if override.is_discrete_sweep() and not any(override.sweep_string_iterator()):
                raise ConfigError(
                    f"{override.input_line} has no values, so there is no run to be made"
                )
        return BasicSweeper.split_arguments(overrides, max_batch_size)

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        self._every_run.check(batch)
