"""Where else a run's lines go, beside its own metrics.jsonl."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Logger(Protocol):
    def log(self, line: Mapping[str, Any]) -> None:
        """One recorded line."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run's summary, however the run ended."""


class NoLogger:
    """metrics.jsonl is all there is."""

    def log(self, line: Mapping[str, Any]) -> None:
        del line

    def finish(self, summary: Mapping[str, Any]) -> None:
        del summary


class Wandb:
    """Weights & Biases, in the run's folder: offline unless WANDB_API_KEY is set.

    Args:
        folder: the run's folder; its name is the run's.
        group: runs of one study or sweep share it.
        config: the resolved configuration.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], project: str, group: str | None = None
    ) -> None:
        import wandb

        online = bool(os.environ.get("WANDB_API_KEY"))
        self._run = wandb.init(
            project=project,
            group=group,
            name="/".join(folder.parts[-3:]),
            dir=folder,
            config=dict(config),
            mode="online" if online else "offline",
            settings=wandb.Settings(silent=True),
        )

    def log(self, line: Mapping[str, Any]) -> None:
        self._run.log(dict(line), step=line["step"])

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=int(summary["status"] == "failed"))
