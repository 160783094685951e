"""A run's folder: `.hydra/`, `metrics.jsonl` (a line per recorded step), `summary.json` (written
last).

A folder belongs to the run that created its metrics.jsonl. It is never written twice.
"""

import fcntl
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from largebatch.conf.config import ConfigError

METRICS: Final = "metrics.jsonl"
SUMMARY: Final = "summary.json"

STATUSES: Final = ("reached", "exhausted", "diverged", "interrupted", "failed")
UNFINISHED: Final = ("interrupted", "failed")


def check_free(folder: Path) -> None:
    """Refuse a folder that another run has written to.

    Raises:
        ConfigError: naming the folder and the way out.
    """
    if (folder / METRICS).exists() or (folder / SUMMARY).exists():
        raise ConfigError(
            f"{folder} already holds a run; choose another with hydra.run.dir=…, or move it away"
        )


def finite(value: Any) -> Any:
    """JSON has no NaN or infinity: null stands for them; `status` says what happened."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunFolder:
    """The record of one run, open for as long as the run lasts. The lock dies with its process."""

    def __init__(self, folder: Path, hydra_files: Mapping[str, str]) -> None:
        check_free(folder)
        (folder / ".hydra").mkdir(parents=True, exist_ok=True)
        # "x": of two runs that found the folder free, one creates the file.
        self._lines = (folder / METRICS).open("x", encoding="utf-8")
        lock(self._lines.fileno())
        self.path = folder
        for name, text in hydra_files.items():
            (folder / ".hydra" / name).write_text(text, encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """One line, on disk before the next step is recorded."""
        self._lines.write(json.dumps({key: finite(value) for key, value in line.items()}) + "\n")
        self._lines.flush()

    def close(self, summary: Mapping[str, Any]) -> None:
        """Write the summary: whole, or not at all."""
        assert summary["status"] in STATUSES
        text = json.dumps({key: finite(value) for key, value in summary.items()}, indent=1)
        write_whole(self.path / SUMMARY, text + "\n")
        self._lines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lines.close()


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
