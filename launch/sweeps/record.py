"""A sweep's memory, `trials.jsonl` in its folder: a line when a trial is begun, when it has ended,
when a node is left out. It survives whatever ends the sweep; the next one reads it and continues.

Only its own summary.json says whether a trial has ended.
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from largebatch.common.errors import ConfigError
from largebatch.common.files import lock, lock_or_warn
from largebatch.common.text import shown
from largebatch.records import find_fields
from largebatch.records.fields import whole
from largebatch.records.names import METRICS, SUMMARY
from largebatch.records.outcomes import UNFINISHED
from largebatch.records.record import telling, words_of
from largebatch.records.summary import status

TRIALS: Final = "trials.jsonl"


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: its number there, its overrides, its whole command without what starts it
    on nodes, its folder, and that below the sweep's as its name.
    """

    number: int
    words: tuple[str, ...]
    command: tuple[str, ...]
    name: str
    folder: Path


def summary_of(folder: Path) -> dict[str, Any] | None:
    """The summary of a run that has ended; None where it has not."""
    summary = find_fields(folder / SUMMARY, [])  # one that cannot be read: the trial is made again
    if summary is None or summary.find("status", status) in (None, *UNFINISHED):
        return None
    return dict(summary.values)


def samples_of(folder: Path) -> int | None:
    """Samples after which a run was interrupted; None where it was not."""
    summary = find_fields(folder / SUMMARY, [])
    if summary is None or summary.find("status", status) != "interrupted":
        return None
    return summary.find("samples", whole()) or 0


def is_busy(folder: Path) -> bool:
    """Whether a process is at work on the run: that of a sweep which was killed may still end."""
    metrics = folder / METRICS
    if not metrics.exists():
        return False
    with metrics.open("a") as handle:
        return lock(handle.fileno()) is False


@dataclass
class SweepRecord:
    """`trials.jsonl`, this process's until it is closed; ConfigError where another sweep is running
    in the folder. By trial: how often it has been begun, its words then, and the scheduler's jobs
    that were submitted and have not been seen to end. `seconds` are what trials took that came to
    their end in one attempt.
    """

    folder: Path
    attempts: dict[str, int] = field(default_factory=dict)
    words: dict[str, list[str]] = field(default_factory=dict)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = (self.folder / TRIALS).open("a+", encoding="utf-8")
        if not lock_or_warn(self._file.fileno(), self.folder / TRIALS):
            self._file.close()
            raise ConfigError(
                f"another sweep is running in {self.folder}; wait for it, or choose another folder "
                "with hydra.sweep.dir=…"
            )
        self._file.seek(0)
        line = "?"
        try:
            text = self._file.read()
            whole = text.rpartition("\n")[0] + "\n" if "\n" in text else ""
            if whole != text:  # killed within a line
                self._file.truncate(len(whole.encode()))
            for line in whole.splitlines():
                self._take(json.loads(line))
        except (LookupError, RecursionError, TypeError, ValueError, AttributeError):
            self._file.close()
            raise ConfigError(
                f"{self.folder / TRIALS} is damaged (after {shown(line)}): restore it, or begin in "
                "another folder with hydra.sweep.dir=…"
            ) from None

    def _take(self, line: Mapping[str, Any]) -> None:
        event, trial = line["event"], line.get("trial", "")
        if event == "begun":
            self.attempts[trial] = line["attempt"]
            self.words[trial] = line["words"]
            self.jobs.pop(trial, None)
        elif event == "submitted":
            self.jobs[trial] = dict(line)
        elif event == "ended":
            self.jobs.pop(trial, None)
            if line["outcome"] not in (*UNFINISHED, "refused") and not line["resumed"]:
                self.seconds.append(line["seconds"])

    def write(self, event: str, **what: Any) -> None:
        """One line, on disk before anything else happens."""
        line = {"time": round(time.time(), 3), "event": event, **what}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._take(line)

    def check_same(self, trial: Trial) -> None:
        """Refuse to take another trial's run in a trial's folder for its own, with what differs."""
        if not any((trial.folder / name).exists() for name in (METRICS, SUMMARY)):
            return
        known = self.words.get(trial.name) or words_of(trial.folder)
        if known is None:
            return
        before, now = telling(known), telling(trial.words)
        if before != now:
            raise ConfigError(
                f"{trial.folder} holds a run of {' '.join(sorted(before - now)) or 'fewer words'} "
                f"(now {' '.join(sorted(now - before)) or 'without'}): the same sweep resumes in "
                "its folder, another needs its own: hydra.sweep.dir=…"
            )

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
