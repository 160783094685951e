"""What a run reports, on rank 0: record lines, events, a heartbeat, rates."""

import time
from collections.abc import Callable
from typing import Any, Self

from largebatch.records.heartbeat import Heartbeat
from largebatch.records.record import RunFolder
from largebatch.records.step_record import StepRecord
from largebatch.train.reporting.events import Events
from largebatch.train.reporting.loggers import SafeLogger
from largebatch.train.reporting.throughput import Throughput


class NullReporter:
    """Of the ranks other than the first: reports nothing."""

    def line(self, record: StepRecord) -> None: ...
    def event(self, event: dict[str, Any]) -> None: ...
    def rewind(self, samples: int) -> None: ...
    def phase(self, name: str) -> None: ...
    def flush_to_disk(self) -> None: ...
    def checkpoint_failed(self, samples: int, reason: str) -> None: ...
    def rates(self) -> dict[str, Any]:
        return {}

    def seconds(self) -> float:
        return 0.0

    def recorded_steps(self) -> int:
        return 0


class Reporter(NullReporter):
    """Rank 0's, for as long as the run lasts.

    Args:
        every: steps between the lines that are written; those with an evaluation, a change of the
            batch or a step that was skipped always are.
        watch: sees every line.
    """

    def __init__(
        self,
        folder: RunFolder,
        logger: SafeLogger,
        throughput: Throughput,
        world_size: int,
        every: int,
        watch: Callable[[dict[str, Any]], None],
    ) -> None:
        self._folder, self._logger, self._every = folder, logger, every
        self._throughput, self._watch = throughput, watch
        self._events = Events(folder.path)
        self._heartbeat = Heartbeat(folder.path, world_size)
        self._begin = time.perf_counter() - folder.seconds
        self._steps = self._samples = 0

    def __enter__(self) -> Self:
        self._heartbeat.__enter__()
        self._logger.tell(self._logger_failed)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._heartbeat.__exit__(kind, error, trace)

    def seconds(self) -> float:
        """Since training began, before an interruption too."""
        return round(time.perf_counter() - self._begin, 4)

    def recorded_steps(self) -> int:
        """Of the last line that was written."""
        return self._folder.last.step

    def line(self, record: StepRecord) -> None:
        """A complete record, each in its turn."""
        rates = self._throughput.line(record["global_batch_size"], record["step_seconds"])
        line = {**record} | rates | {"seconds": self.seconds()}
        del line["step_seconds"]
        self._steps, self._samples = record["step"], record["samples"]
        self._heartbeat.beat(self._steps, self._samples)
        is_shown = "eval_loss" in record or "batch_change" in record or record.get("skipped")
        if is_shown or self._steps % self._every == 0:
            self._folder.write(line)
            self._logger.log(line)
        self._watch(line)

    def event(self, event: dict[str, Any]) -> None:
        """What was done to the run: keywords of `Events.write`."""
        self._events.write(**event)

    def rewind(self, samples: int) -> None:
        """The run goes back: later lines are no longer its record."""
        self._folder.rewind(samples)

    def phase(self, name: str) -> None:
        """Something else than steps begins."""
        self._heartbeat.enter(name)

    def flush_to_disk(self) -> None:
        """The lines so far, before a checkpoint that must not outlive them."""
        self._folder.flush_to_disk()

    def checkpoint_failed(self, samples: int, reason: str) -> None:
        self._events.write("checkpoint_failed", step=self._steps, samples=samples, reason=reason)

    def _logger_failed(self, reason: str) -> None:
        at = {"step": self._steps, "samples": self._samples}
        self._events.write("logger_failed", **at, reason=reason)

    def rates(self) -> dict[str, Any]:
        """For the summary."""
        return self._throughput.summary()
