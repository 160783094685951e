"""A run's folder: `.hydra/`, `metrics.jsonl` (a line per recorded step), `summary.json` (written
last).

A folder belongs to the run that created its metrics.jsonl, and to one process at a time; only
`resume=auto` resumes it, from a checkpoint.
"""

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, Self, TextIO

from largebatch.common.errors import ConfigError
from largebatch.common.files import write_whole
from largebatch.common.text import say
from largebatch.records import Fields, RecordError, read_fields
from largebatch.records.checkpoints import listed
from largebatch.records.configuration import read_yaml
from largebatch.records.fields import LARGEST, mapping, number, one_of, optional, whole
from largebatch.records.lock import RunLock
from largebatch.records.names import HEARTBEAT, METRICS, ROLLED_BACK, SUMMARY
from largebatch.records.outcomes import STATUSES, UNFINISHED
from largebatch.records.reading import parsed


def check_free(folder: Path) -> None:
    """Refuse a folder that another run has written to."""
    if (folder / METRICS).exists() or (folder / SUMMARY).exists() or listed(folder):
        raise ConfigError(
            f"{folder} already holds a run; choose another with hydra.run.dir=…, move it away, or "
            "go on with it by resume=auto"
        )


def finite(value: Any) -> Any:
    """JSON has no NaN or infinity: null stands for them; `status` says what happened."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


_FINITE: Final = json.JSONEncoder(allow_nan=False)
"""Raises a ValueError for what is not: rare, and asking each number takes half of a line's time."""


class RunEnded(ConfigError):
    """There is nothing to resume: the run has ended, as `summary` says."""

    def __init__(self, folder: Path, summary: dict[str, Any]) -> None:
        longer = ", or a larger budget.samples" if summary["status"] == "exhausted" else ""
        super().__init__(
            f"{folder} holds a run that has ended ({summary['status']}): there is nothing to "
            f"resume; choose another folder with hydra.run.dir=…{longer}"
        )
        self.summary = summary


def check_unfinished(folder: Path, budget_samples: int = 0) -> None:
    """Refuse, by `RunEnded`, to resume a run that has ended. One that has spent its budget may be
    resumed with a larger one.
    """
    try:
        summary = read_fields(folder / SUMMARY)
        status = summary.take("status", one_of(*STATUSES))
        spent = summary.find("budget_samples", optional(whole()))
    except FileNotFoundError:
        return
    except RecordError as error:
        raise ConfigError(
            f"{error}: restore it, or delete it if the run is to go on from its last checkpoint"
        ) from error
    is_longer = status == "exhausted" and budget_samples > (spent or LARGEST)
    if status not in UNFINISHED and not is_longer:
        raise RunEnded(folder, dict(summary.values))


class Kept(NamedTuple):
    """What stays of `metrics.jsonl` where a run is resumed."""

    size: int = 0
    """Bytes."""
    step: int = 0
    """Of the last line."""
    seconds: float = 0.0
    """That the run had taken until there."""


def kept_lines(folder: Path, samples: int) -> Kept:
    """The lines of steps until `samples` samples: later steps are made again, and half a line at
    the end is of a process that was killed.
    """
    path, kept, size, damage = folder / METRICS, Kept(), 0, ""
    with path.open("rb") as file:
        for place, text in enumerate(file, 1):
            size += len(text)
            where = f"{path}:{place}"
            try:
                line = Fields(mapping(parsed(text, where)), where)
                seen = line.take("samples", whole())
                found = Kept(size, line.find("step", whole()) or 0, line.take("seconds", number))
            except ValueError as error:
                named = isinstance(error, RecordError)
                damage = damage or (str(error) if named else f"{where} {error}")
                continue
            if seen > samples or not text.endswith(b"\n"):
                break
            if damage:
                raise ConfigError(f"{damage}: mend that line, or delete it, and resume again")
            kept = found
    return kept


def words_of(folder: Path) -> list[str] | None:
    """Return the overrides that the run in `folder` was made with; None where it does not say."""
    from omegaconf import ListConfig, OmegaConf

    path = folder / ".hydra" / "overrides.yaml"
    try:
        words = read_yaml(path)
        if not isinstance(words, ListConfig):
            raise RecordError(f"{path} must hold a list of overrides")
    except FileNotFoundError:
        return None
    except RecordError as error:
        raise ConfigError(
            f"{error}: restore it, or delete {folder}, whose run is then made again"
        ) from error
    return [str(word) for word in OmegaConf.to_container(words) or ()]


def telling(words: Iterable[str]) -> set[str]:
    """Return those of a run's overrides that say which run it is."""
    free = ("hydra.", "resume=", "checkpoint.", "logger", "stop_")
    return {word for word in words if not word.startswith(free)}


def claim(folder: Path, world: int = 1) -> RunLock:
    """Make this process the owner of the run that is in `folder`, before anything in it is read."""
    file = (folder / METRICS).open("r+", encoding="utf-8")
    try:
        return RunLock(folder, file, world)
    except BaseException:
        file.close()
        raise


def unwritable(error: OSError) -> str:
    """What keeps a run from making its folder."""
    return (
        f"the run's folder cannot be written: {error}: choose another with hydra.run.dir=… (of a "
        "sweep hydra.sweep.dir=…)"
    )


class RunFolder:
    """The record of one run, open for as long as the run lasts. The folder is this process's until
    then (`records/lock.py`).

    Args:
        resumed_samples: resume the run that the folder holds, from the checkpoint after that many
            samples. Lines of later steps are dropped: those steps are made again.
        lock: held by whoever resumes the run and has checked that it may; the folder
            releases it.
        world: ranks of the run.

    Attributes:
        last: where the last line ends, and what it says.

    Raises:
        ConfigError: the folder holds another run, or another process is at work in it.
    """

    def __init__(
        self,
        folder: Path,
        hydra_files: Mapping[str, str],
        resumed_samples: int | None = None,
        lock: RunLock | None = None,
        world: int = 1,
    ) -> None:
        self.path, self.last = folder, Kept()
        self._kept = bytearray()
        self._is_full = False
        if resumed_samples is None:
            check_free(folder)
            (folder / ".hydra").mkdir(parents=True, exist_ok=True)
            # "x": of two runs that found the folder free, one creates the file.
            try:
                self._lines: TextIO = (folder / METRICS).open("x+", encoding="utf-8")
            except FileExistsError:
                check_free(folder)
                raise
            self._lock = RunLock(folder, self._lines, world)
        else:
            self._lock = lock or claim(folder, world)
            self._lines = self._lock.file
            try:
                if lock is None:
                    check_unfinished(folder)
                self._cut(kept_lines(folder, resumed_samples))
            except BaseException:
                self._lock.release()
                raise
            (folder / SUMMARY).unlink(missing_ok=True)
            (folder / ".hydra").mkdir(exist_ok=True)
            if (folder / ".hydra" / "config.yaml").exists():  # else killed before it was written
                start = f"resumed-{resumed_samples}"
                hydra_files = {f"{start}-{name}": text for name, text in hydra_files.items()}
        for name in (f".{HEARTBEAT}.*", f".{SUMMARY}.*", ".hydra/.*.yaml.*"):
            for draft in folder.glob(name):  # of a process that was killed while it wrote
                draft.unlink(missing_ok=True)
        for name, text in hydra_files.items():
            write_whole(folder / ".hydra" / name, text)

    @property
    def seconds(self) -> float:
        """That the run had taken when it wrote its last line."""
        return self.last.seconds

    def _cut(self, kept: Kept) -> None:
        """Drop what comes after the lines that stay."""
        self.last = kept
        self._lines.seek(self.last.size)
        self._lines.truncate()
        os.lseek(self._lines.fileno(), kept.size, os.SEEK_SET)  # it is written by number

    def write(self, line: Mapping[str, Any]) -> None:
        """One line, on disk before the next step is recorded. Lines that a full disk does not take
        are kept, and written once it does.
        """
        try:
            text = _FINITE.encode(line) + "\n"
        except ValueError:
            text = json.dumps({key: finite(value) for key, value in line.items()}) + "\n"
        size, step = self.last.size + len(text), line.get("step", self.last.step)
        self.last = Kept(size, step, line.get("seconds", self.last.seconds))
        self._kept += text.encode()
        try:
            self._write_kept()
        except OSError as error:
            if not self._is_full:
                say(f"{self.path / METRICS} takes no lines ({error}): they are kept until it does")
            self._is_full = True
        else:
            if self._is_full:
                say(f"{self.path / METRICS} takes lines again; none is lost")
            self._is_full = False

    def _write_kept(self) -> None:
        """Write what is kept, and forget as much of it as is on disk."""
        while self._kept:
            del self._kept[: os.write(self._lines.fileno(), self._kept)]

    def rewind(self, samples: int) -> None:
        """Move the lines of steps after `samples` samples to `rolled_back.jsonl`: the run has gone
        back to before them.
        """
        self._write_kept()
        kept = kept_lines(self.path, samples)
        with (self.path / METRICS).open("rb") as lines:
            lines.seek(kept.size)
            with (self.path / ROLLED_BACK).open("ab") as file:
                shutil.copyfileobj(lines, file)
        self._cut(kept)

    def flush_to_disk(self) -> None:
        """Wait until the lines so far would survive a crash of the machine.

        Raises:
            RunLocked: another process has taken the folder for abandoned, and over.
            OSError: the disk is full, or gone.
        """
        self._lock.check()
        self._write_kept()
        os.fsync(self._lines.fileno())

    def close(self, summary: Mapping[str, Any]) -> None:
        """Write the summary: whole, or not at all.

        Raises:
            OSError: it, or lines before it, could not be written.
        """
        assert summary["status"] in STATUSES
        text = json.dumps({key: finite(value) for key, value in summary.items()}, indent=1)
        try:
            self._write_kept()
        finally:
            write_whole(self.path / SUMMARY, text + "\n")
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()
