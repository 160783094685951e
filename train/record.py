"""A run's folder: `.hydra/`, `metrics.jsonl` (a line per recorded step), `summary.json` (written
last).

A folder belongs to the run that created its metrics.jsonl, and to one process at a time; only
`resume=auto` goes on in it, from a checkpoint.
"""

import fcntl
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TextIO

from largebatch.conf.errors import ConfigError
from largebatch.train.owner import Owner

METRICS: Final = "metrics.jsonl"
SUMMARY: Final = "summary.json"
ROLLED_BACK: Final = "rolled_back.jsonl"

STATUSES: Final = ("reached", "exhausted", "diverged", "interrupted", "failed")
UNFINISHED: Final = ("interrupted", "failed")


def check_free(folder: Path) -> None:
    """Refuse a folder that another run has written to.

    Raises:
        ConfigError: naming the folder and the way out.
    """
    if (folder / METRICS).exists() or (folder / SUMMARY).exists():
        raise ConfigError(
            f"{folder} already holds a run; choose another with hydra.run.dir=…, move it away, or "
            "go on with it by resume=auto"
        )


def finite(value: Any) -> Any:
    """JSON has no NaN or infinity: null stands for them; `status` says what happened."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunEnded(ConfigError):
    """There is nothing to resume: the run has come to its end, as `summary` says."""

    def __init__(self, folder: Path, summary: dict[str, Any]) -> None:
        super().__init__(
            f"{folder} holds a run that has ended ({summary['status']}): there is nothing to "
            "resume; choose another folder with hydra.run.dir=…"
        )
        self.summary = summary


def check_unfinished(folder: Path) -> None:
    """Refuse to go on with a run that has come to its end.

    Raises:
        RunEnded: naming the folder and the way out.
    """
    if not (folder / SUMMARY).exists():
        return
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    if summary["status"] not in UNFINISHED:
        raise RunEnded(folder, summary)


def words_of(folder: Path) -> list[str] | None:
    """Return the overrides that the run in `folder` was made with; None where it does not say."""
    overrides = folder / ".hydra" / "overrides.yaml"
    if not overrides.exists():
        return None
    from omegaconf import OmegaConf

    return [str(word) for word in OmegaConf.to_container(OmegaConf.load(overrides)) or ()]


def telling(words: Iterable[str]) -> set[str]:
    """Return those of a run's overrides that say which run it is."""
    free = ("hydra.", "resume=", "checkpoint.", "logger")
    return {word for word in words if not word.startswith(free)}


def claim(folder: Path, world: int = 1) -> Owner:
    """Make this process the owner of the run that is in `folder`, before anything in it is read.

    Raises:
        Owned: another process is at work in it.
    """
    file = (folder / METRICS).open("r+", encoding="utf-8")
    try:
        return Owner(folder, file, world)
    except BaseException:
        file.close()
        raise


class RunFolder:
    """The record of one run, open for as long as the run lasts. The folder is this process's until
    then (`train/owner.py`).

    Args:
        resumed_samples: go on with the run that the folder holds, from the checkpoint after so many
            samples. Lines of later steps are dropped: those steps are made again.
        owner: who has claimed the run that is gone on with; the folder releases it.
        world: ranks of the run.

    Attributes:
        seconds: that the run had taken until there.

    Raises:
        ConfigError: the folder holds another run, or another process is at work in it.
    """

    def __init__(
        self,
        folder: Path,
        hydra_files: Mapping[str, str],
        resumed_samples: int | None = None,
        owner: Owner | None = None,
        world: int = 1,
    ) -> None:
        self.path, self.seconds = folder, 0.0
        if resumed_samples is None:
            check_free(folder)
            (folder / ".hydra").mkdir(parents=True, exist_ok=True)
            # "x": of two runs that found the folder free, one creates the file.
            try:
                self._lines: TextIO = (folder / METRICS).open("x+", encoding="utf-8")
            except FileExistsError:
                check_free(folder)
                raise
            self._owner = Owner(folder, self._lines, world)
        else:
            self._owner = owner or claim(folder, world)
            self._lines = self._owner.file
            try:
                check_unfinished(folder)
                self._cut(resumed_samples)
            except BaseException:
                self._owner.release()
                raise
            (folder / SUMMARY).unlink(missing_ok=True)
            (folder / ".hydra").mkdir(exist_ok=True)
            if (folder / ".hydra" / "config.yaml").exists():  # else killed before it was written
                start = f"resumed-{resumed_samples}"
                hydra_files = {f"{start}-{name}": text for name, text in hydra_files.items()}
        for name, text in hydra_files.items():
            write_whole(folder / ".hydra" / name, text)

    def _cut(self, samples: int) -> None:
        """Drop the lines of steps after `samples` samples, and a last one that is not whole."""
        kept = 0
        for text in self._lines.read().splitlines(keepends=True):
            line = json.loads(text) if text.endswith("\n") else {"samples": math.inf}
            if line["samples"] > samples:
                break
            kept += len(text.encode())
            self.seconds = line["seconds"]
        self._lines.seek(kept)
        self._lines.truncate()

    def write(self, line: Mapping[str, Any]) -> None:
        """One line, on disk before the next step is recorded."""
        self._lines.write(json.dumps({key: finite(value) for key, value in line.items()}) + "\n")
        self._lines.flush()

    def rewind(self, samples: int) -> None:
        """Move the lines of steps after `samples` samples to `rolled_back.jsonl`: the run has gone
        back to before them.
        """
        self._lines.flush()
        self._lines.seek(0)
        lines = self._lines.read()
        seconds = self.seconds
        self._lines.seek(0)
        self._cut(samples)
        self.seconds = seconds
        with (self.path / ROLLED_BACK).open("a", encoding="utf-8") as file:
            file.write(lines.encode()[self._lines.tell() :].decode())

    def flush_to_disk(self) -> None:
        """Wait until the lines so far would survive a crash of the machine.

        Raises:
            Owned: another process has taken the folder for abandoned, and over.
        """
        self._owner.check()
        self._lines.flush()
        os.fsync(self._lines.fileno())

    def close(self, summary: Mapping[str, Any]) -> None:
        """Write the summary: whole, or not at all."""
        assert summary["status"] in STATUSES
        text = json.dumps({key: finite(value) for key, value in summary.items()}, indent=1)
        write_whole(self.path / SUMMARY, text + "\n")
        self._owner.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._owner.release()


def write_whole(path: Path, text: str) -> None:
    """Replace `path` in one step, so that no reader and no crash sees half of it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def lock(descriptor: int) -> bool:
    """Take the lock of an open file; False where another process holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
