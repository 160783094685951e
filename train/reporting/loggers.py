"""Where else a run's lines go, beside its own metrics.jsonl.

A logger is a guest: whatever it raises once the run has begun is reported once, and the run
continues without it.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from largebatch.common.errors import ConfigError
from largebatch.common.text import one_line, say


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


class SafeLogger:
    """A logger that ends no run: after its first error lines go to metrics.jsonl alone.

    Args:
        open_logger: makes the logger.
        failed: takes the error, as a sentence; while it is not set, errors wait for it.

    Raises:
        ConfigError: the configuration is wrong, which the user can mend before the run.
    """

    def __init__(self, open_logger: Callable[[], Logger]) -> None:
        self.failed: Callable[[str], None] | None = None
        self._waiting: str | None = None
        self._logger: Logger = NoLogger()
        self._try(lambda: setattr(self, "_logger", open_logger()))

    def tell(self, failed: Callable[[str], None]) -> None:
        """Set `failed`."""
        self.failed = failed
        if self._waiting is not None:
            failed(self._waiting)

    def log(self, line: Mapping[str, Any]) -> None:
        self._try(lambda: self._logger.log(line))

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._try(lambda: self._logger.finish(summary))

    def _try(self, do: Callable[[], None]) -> None:
        try:
            do()
        except ConfigError:
            raise
        except Exception as error:  # a guest's may be of any class
            why = one_line(error)
            reason = (
                f"the logger has failed ({type(error).__name__}: {why}): the run continues, and "
                "metrics.jsonl has every line"
            )
            say(reason)
            self._logger = NoLogger()
            if self.failed is None:
                self._waiting = reason
            else:
                self.failed(reason)


class Wandb:
    """Weights & Biases, in the run's folder. WANDB_MODE decides whether it is online; without it a
    WANDB_API_KEY does. A resumed run continues the first one's W&B run, by its id.

    Args:
        folder: the run's folder; its name is the run's.
        group: runs of one study or sweep share it.
        config: the resolved configuration.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], project: str, group: str | None = None
    ) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"logger=wandb needs the package {error.name}: pip install 'largebatch[train]', or "
                "use logger=jsonl"
            ) from error

        has_key = bool(os.environ.get("WANDB_API_KEY"))
        known = folder / "wandb" / "run_id"
        first = known.read_text(encoding="utf-8").strip() if known.exists() else None
        self._run = wandb.init(
            project=project,
            group=group,
            name="/".join(folder.parts[-3:]),
            dir=folder,
            config=dict(config),
            # None: as WANDB_MODE says.
            mode=None if "WANDB_MODE" in os.environ else "online" if has_key else "offline",
            id=first,
            resume="allow",
            settings=wandb.Settings(silent=True),
        )
        if first is None:
            known.parent.mkdir(parents=True, exist_ok=True)
            known.write_text(f"{self._run.id}\n", encoding="utf-8")

    def log(self, line: Mapping[str, Any]) -> None:
        self._run.log(dict(line), step=line["step"])

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=int(summary["status"] == "failed"))
