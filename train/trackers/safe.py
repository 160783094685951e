"""A logger is a guest: whatever it raises once the run has begun is reported once, and the run
continues without it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from largebatch.common.errors import ConfigError
from largebatch.common.text import one_line, say
from largebatch.train.trackers.base import Logger


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
