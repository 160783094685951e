"""A run's folder is one process's: with the kernel's locks, and where there are none."""

import errno
import fcntl
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import forked
import pytest

from largebatch.records import lock as owner_module
from largebatch.records.lock import STALE_SECONDS, RunLock, RunLocked
from largebatch.records.names import OWNER
from largebatch.records.record import RunFolder, claim
from largebatch.train.checkpoints.resume import Resumption, find_resumption

CONFIG = "checkpoint: {verify: auto}\nseed: 0\n"

# Begins a run, or goes on with it, and stays until it is told to go or killed.
HOLDS = """
import errno, fcntl, sys
from pathlib import Path
from largebatch.records.record import RunFolder
def none(descriptor, operation):
    raise OSError(errno.{error}, "no locks here")
if {error!r} != "none":
    fcntl.flock = none
folder = Path({folder!r})
resumed = 0 if (folder / "metrics.jsonl").exists() else None
held = RunFolder(folder, {{"config.yaml": {config!r}}}, resumed, world=3)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def another_process(folder: Path, error: str = "none") -> Iterator["subprocess.Popen[str]"]:
    code = HOLDS.format(folder=str(folder), config=CONFIG, error=error)
    process = forked.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PBS_JOBID": "4711.aurora"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Lustre that is mounted without them: this machine has no such file system."""

    def none(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", none)


def test_a_second_process_is_refused_before_it_has_chosen_a_checkpoint(tmp_path: Path) -> None:
    """And is told whose the folder is; with the process goes the hold, however it ends."""
    with another_process(tmp_path) as process:
        # Broken, and to be refused as such, had it been looked at.
        (tmp_path / "checkpoints" / "samples-000000000000064").mkdir(parents=True)
        with pytest.raises(RunLocked) as refused:
            find_resumption(tmp_path, CONFIG)
        said = str(refused.value)
        assert f"(process {process.pid} on " in said
        assert "job 4711.aurora, 3 rank(s), since " in said
    (tmp_path / "checkpoints" / "samples-000000000000064").rmdir()
    resumption = find_resumption(tmp_path, CONFIG)
    assert resumption is not None
    resumption.release()


def test_the_hold_goes_from_the_choice_to_the_record_without_a_gap(tmp_path: Path) -> None:
    with RunFolder(tmp_path, {"config.yaml": CONFIG}):
        pass
    resumption = find_resumption(tmp_path, CONFIG)
    assert resumption is not None
    with pytest.raises(RunLocked):
        claim(tmp_path)
    with RunFolder(tmp_path, {}, 0, resumption.lock) as folder:
        with pytest.raises(RunLocked):
            find_resumption(tmp_path, CONFIG)
        folder.write({"samples": 64, "seconds": 1.0})
    assert not (tmp_path / OWNER).exists()
    claim(tmp_path).release()


def test_a_hold_is_told_to_no_other_process(tmp_path: Path) -> None:
    with RunFolder(tmp_path, {}):
        pass
    hold = claim(tmp_path)
    told = pickle.loads(pickle.dumps(Resumption(None, 0, hold)))
    assert told == Resumption(None, 0, None)
    hold.release()


def test_what_is_refused_lets_go_of_the_folder(tmp_path: Path) -> None:
    with RunFolder(tmp_path, {"config.yaml": CONFIG}):
        pass
    with pytest.raises(ValueError, match="was made with"):
        find_resumption(tmp_path, CONFIG.replace("seed: 0", "seed: 1"))
    claim(tmp_path).release()


@pytest.mark.parametrize("error", ["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
@pytest.mark.usefixtures("no_locks")
def test_without_locks_an_owner_that_has_long_been_silent_is_gone(
    error: str, tmp_path: Path
) -> None:
    silent = r"last heard of \d+ s ago, and taken for gone after 180"
    with another_process(tmp_path, error), pytest.raises(RunLocked, match=silent):
        claim(tmp_path)
    with pytest.raises(RunLocked):  # killed, and nobody can know yet
        claim(tmp_path)
    long_ago = time.time() - STALE_SECONDS - 5
    os.utime(tmp_path / OWNER, (long_ago, long_ago))
    hold = claim(tmp_path)
    assert json.loads((tmp_path / OWNER).read_text())["run_id"] == hold.run_id
    with pytest.raises(RunLocked):
        claim(tmp_path)
    hold.release()
    assert not [path for path in tmp_path.iterdir() if OWNER in path.name]
    claim(tmp_path).release()


@pytest.mark.usefixtures("no_locks")
def test_without_locks_an_owner_shows_itself_and_notices_that_it_was_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner_module, "BEAT_SECONDS", 0.02)
    with RunFolder(tmp_path, {}) as folder:
        long_ago = time.time() - STALE_SECONDS - 5
        os.utime(tmp_path / OWNER, (long_ago, long_ago))
        deadline = time.monotonic() + 600
        while (tmp_path / OWNER).stat().st_mtime < long_ago + 5:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        folder.flush_to_disk()
        words = json.loads((tmp_path / OWNER).read_text())
        (tmp_path / OWNER).write_text(json.dumps(words | {"run_id": "another's", "host": "x12"}))
        with pytest.raises(RunLocked, match="on x12"):
            folder.flush_to_disk()
    assert (tmp_path / OWNER).exists()  # it is not ours to remove


def test_an_owner_that_is_not_there_any_more_is_not_in_the_way(tmp_path: Path) -> None:
    """Killed where there are locks: what it left to read stays, and its lock does not."""
    with another_process(tmp_path):
        pass
    assert json.loads((tmp_path / OWNER).read_text())["world"] == 3
    with (tmp_path / "metrics.jsonl").open("r+") as file:
        RunLock(tmp_path, file).release()
