"""Exclusive lock on a run folder, released when the owning process exits.

The lock is the kernel's, on the run's `metrics.jsonl`: it dies with its process, whatever kills it.
Some mounts have no such locks (Lustre without `flock`, DAOS through dfuse). There the owner writes
`owner.json` alone and touches it again and again; who finds it untouched for long takes it over.

Two jobs of one chain that wrote into one folder have cost checkpoints: hence the lock comes before
anything in the folder is read to be gone on from.
"""

import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Final, TextIO

from largebatch.common.errors import ConfigError
from largebatch.common.files import lock, read_json
from largebatch.records.names import OWNER

BEAT_SECONDS: Final = 20.0
STALE_SECONDS: Final = 180.0
"""Without a lock: an owner that has not shown itself for so long is gone."""

_JOB_IDS: Final = ("PBS_JOBID", "SLURM_JOB_ID", "LSB_JOBID")


class RunLocked(ConfigError):
    """Another process is at work on the run."""


class RunLock:
    """This process's hold on the folder of a run, until it is released or the process ends.

    To other processes it is nothing: pickled, it becomes None.

    Args:
        file: the run's metrics.jsonl, open. It stays open: the lock is on this opening of it.
        world: ranks of the run, named in the refusal of others.

    Raises:
        RunLocked: another process has the folder.
    """

    def __init__(self, folder: Path, file: TextIO, world: int = 1) -> None:
        self.folder, self.file = folder, file
        self.run_id = uuid.uuid4().hex[:12]
        self._path = folder / OWNER
        self._ended = threading.Event()
        self._heart: threading.Thread | None = None
        words = {
            "run_id": self.run_id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job_id": next((os.environ[name] for name in _JOB_IDS if name in os.environ), None),
            "world": world,
            "begun": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        locked = lock(file.fileno())
        if locked is False:
            raise self._refusal()
        if locked is None:
            self._take(words)
            self._heart = threading.Thread(target=self._beat, name="owner", daemon=True)
            self._heart.start()
        else:
            self._draft(words).replace(self._path)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def check(self) -> None:
        """Without a lock: check that nobody took the folder over while this process was paused."""
        if self._heart is not None and _read(self._path).get("run_id") != self.run_id:
            raise self._refusal()

    def release(self) -> None:
        """Let go of the folder."""
        self._ended.set()
        if self._heart is not None:
            self._heart.join()
            self._heart = None
        if not self.file.closed:
            if _read(self._path).get("run_id") == self.run_id:
                self._path.unlink(missing_ok=True)
            self.file.close()  # and with it goes the lock

    def _draft(self, words: dict[str, Any]) -> Path:
        draft = self._path.with_name(f".{OWNER}.{self.run_id}")
        draft.write_text(_text(words), encoding="utf-8")
        return draft

    def _take(self, words: dict[str, Any]) -> None:
        """Make owner.json ours: there is none, or one whose owner has long been silent."""
        try:
            self._create(words)
            return
        except FileExistsError:
            pass
        probe = self._draft(words)
        try:  # both times are the file system's: clocks of hosts differ
            silent = probe.stat().st_mtime - self._path.stat().st_mtime
            before = _read(self._path).get("run_id")
            if silent < STALE_SECONDS:
                raise self._refusal(
                    f"; last heard of {silent:.0f} s ago, and taken for gone after "
                    f"{STALE_SECONDS:.0f}"
                )
            gone = self._path.with_name(f".{OWNER}.{self.run_id}.gone")
            os.rename(self._path, gone)  # of several one succeeds: the others find no file
            if _read(gone).get("run_id") != before:
                os.rename(gone, self._path)  # another was quicker, and this is theirs
                raise self._refusal()
            self._create(words)
            gone.unlink()
        except (FileNotFoundError, FileExistsError):
            raise self._refusal() from None
        finally:
            probe.unlink()

    def _create(self, words: dict[str, Any]) -> None:
        with self._path.open("x", encoding="utf-8") as file:
            file.write(_text(words))

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                if _read(self._path).get("run_id") != self.run_id:
                    return  # it is somebody else's by now: `check` says so
                os.utime(self._path)
            except OSError:
                pass  # a file system that is away comes back, or the next write says so

    def _refusal(self, more: str = "") -> RunLocked:
        words = _read(self._path)
        by = ""
        if words:
            job = f", job {words['job_id']}" if words.get("job_id") else ""
            by = (
                f" (process {words.get('pid')} on {words.get('host')}{job}, {words.get('world')} "
                f"rank(s), since {words.get('begun')}{more})"
            )
        return RunLocked(
            f"another process is at work on the run in {self.folder}{by}: wait for it, or choose "
            "another hydra.run.dir"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        words = read_json(path)
    except (OSError, ValueError):
        return {}
    return words if isinstance(words, dict) else {}


def _text(words: dict[str, Any]) -> str:
    return json.dumps(words, indent=1) + "\n"
