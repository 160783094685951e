"""What a run reports, on rank 0: record lines, events, a heartbeat, rates."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from largebatch.common.text import say
from largebatch.records.heartbeat import Heartbeat
from largebatch.records.names import EVENTS
from largebatch.records.record import RunFolder, finite
from largebatch.records.step_record import StepRecord
from largebatch.train.reporting.throughput import Throughput
from largebatch.train.trackers.safe import SafeLogger


class Events:
    """Appends to `events.jsonl` in a run's folder, made with the first event: what was done to the
    run and why, a line each. It is a history: never cut, not even where a resumed run makes steps
    again. One process writes: rank 0.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / EVENTS

    def write(self, kind: str, *, step: int, samples: int, reason: str, **more: Any) -> None:
        """One event ("skip", "rollback", "stop", …), out of this process's hands when this returns;
        one that the disk does not take is reported on stderr. `more` are numbers (null where they
        are not finite) and lists of names.
        """
        event = {"time": time.time(), "step": step, "samples": samples, "kind": kind}
        event |= {"reason": reason} | more
        text = json.dumps({name: finite(value) for name, value in event.items()}) + "\n"
        try:
            with self._path.open("ab+", buffering=0) as file:
                if file.tell() > 0:  # a writer killed half-way leaves half a line
                    file.seek(-1, 2)
                    text = text if file.read(1) == b"\n" else "\n" + text
                data = text.encode()
                while data:  # a disk may take a part before it takes nothing
                    data = data[file.write(data) :]
        except OSError as error:
            say(f"{self._path} could not be written ({error}): {text.strip()}")


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

    def record_seconds(self) -> float:
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
        self._recording = 0.0

    def __enter__(self) -> Self:
        self._heartbeat.__enter__()
        self._logger.tell(self._logger_failed)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._heartbeat.__exit__(kind, error, trace)

    def seconds(self) -> float:
        """Since training began, before an interruption too."""
        return round(time.perf_counter() - self._begin, 4)

    def record_seconds(self) -> float:
        """Spent on lines, since this process began; without what `watch` did with them."""
        return round(self._recording, 4)

    def recorded_steps(self) -> int:
        """Of the last line that was written."""
        return self._folder.last.step

    def line(self, record: StepRecord) -> None:
        """A complete record, each in its turn."""
        begin = time.perf_counter()
        rates = self._throughput.line(record["global_batch_size"], record["step_seconds"])
        line = {**record} | rates | {"seconds": self.seconds()}
        del line["step_seconds"]
        self._steps, self._samples = record["step"], record["samples"]
        self._heartbeat.beat(self._steps, self._samples)
        is_shown = "eval_loss" in record or "batch_change" in record or record.get("skipped")
        if is_shown or self._steps % self._every == 0:
            self._folder.write(line)
            self._logger.log(line)
        self._recording += time.perf_counter() - begin
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
