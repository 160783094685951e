"""TensorBoard."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from largebatch.common.errors import ConfigError
from largebatch.common.mappings import flattened
from largebatch.common.text import missing
from largebatch.train.trackers.base import Labels, sectioned


class TensorBoard:
    """TensorBoard's files, in `tensorboard/` of the run's folder: `tensorboard --logdir RUNS`
    shows all below RUNS. Samples are its steps; what a resumed run makes again is shown once.

    Args as of `Wandb`.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], labels: Labels) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"logger=tensorboard needs the package {missing(error)}: "
                "pip install 'largebatch[trackers]', or use logger=jsonl"
            ) from error

        self._writer: Any = None
        self._open = SummaryWriter
        self._folder, self._told = folder / "tensorboard", labels.flat() | flattened(config)

    def log(self, line: Mapping[str, Any]) -> None:
        if self._writer is None:  # where a resumed run begins is known with its first line
            self._writer = self._open(self._folder, purge_step=line["samples"])
            rows = [f"| {key} | {value} |" for key, value in self._told.items()]
            table = "\n".join(["| key | value |", "|---|---|", *rows])
            self._writer.add_text("config", table, line["samples"])
        for key, value in sectioned(line).items():
            self._writer.add_scalar(key, value, line["samples"])

    def finish(self, summary: Mapping[str, Any]) -> None:
        del summary
        if self._writer is not None:
            self._writer.close()
