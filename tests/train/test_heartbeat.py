"""The heartbeat tells the step and no more often than it should, whole at any moment."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked
import pytest

from largebatch.launch.progress import Progress, is_gone, process_of
from largebatch.records.heartbeat import Beat, Heartbeat, find_beat, process_start
from largebatch.records.names import HEARTBEAT, WATCH


def read_beat(folder: Path) -> dict[str, Any]:
    beat: dict[str, Any] = json.loads((folder / HEARTBEAT).read_text())
    return beat


def test_a_run_begins_steps_and_ends(tmp_path: Path) -> None:
    run = tmp_path / "new"
    with Heartbeat(run, world_size=24, every_seconds=0.0) as heartbeat:
        beat = read_beat(run)
        assert (beat["state"], beat["step"], beat["world_size"]) == ("starting", 0, 24)
        assert (beat["pid"], beat["host"]) == (os.getpid(), socket.gethostname())
        assert abs(beat["time"] - time.time()) < 60
        assert (run / WATCH).is_dir()
        heartbeat.beat(1, 512)
        assert [read_beat(run)[name] for name in ("state", "step", "samples")] == [
            "stepping",
            1,
            512,
        ]
        heartbeat.enter("save")
        assert [read_beat(run)[name] for name in ("phase", "step")] == ["save", 1]
        heartbeat.beat(2, 1024)
        assert [read_beat(run)[name] for name in ("phase", "step")] == [None, 2]
    assert [read_beat(run)[name] for name in ("state", "step")] == ["ended", 2]


def test_an_exception_is_no_end(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="gone"), Heartbeat(tmp_path, 1):
        raise OSError("gone")
    assert read_beat(tmp_path)["state"] == "failed"


def test_steps_are_told_at_most_so_often(tmp_path: Path) -> None:
    with Heartbeat(tmp_path, 1, every_seconds=3600.0) as heartbeat:
        for step in range(1, 100):
            heartbeat.beat(step, step)
            assert read_beat(tmp_path)["step"] == 1  # the first at once: the run has come so far
        heartbeat.enter("evaluate")
        assert read_beat(tmp_path)["step"] == 99
        heartbeat.beat(100, 100)  # what the run does now is told at once
        assert read_beat(tmp_path)["phase"] is None
    assert read_beat(tmp_path)["step"] == 100


BEATS = """
import pathlib, sys
from largebatch.records.heartbeat import Heartbeat
with Heartbeat(pathlib.Path(sys.argv[1]), 1, every_seconds=0.0) as heartbeat:
    print("on", flush=True)
    step = 0
    while True:
        step += 1
        heartbeat.beat(step, step)
"""


def test_a_reader_and_a_killed_writer_never_see_half_of_it(tmp_path: Path) -> None:
    process = forked.Popen(
        [sys.executable, "-c", BEATS, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    steps = [read_beat(tmp_path)["step"] for _ in range(2000)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert steps == sorted(steps)
    assert steps[-1] > steps[0]
    assert read_beat(tmp_path)["state"] == "stepping"


def test_a_process_is_named_as_the_watch_names_it(tmp_path: Path) -> None:
    beat = Beat(pid=os.getpid(), pid_started=process_start(os.getpid()), host=socket.gethostname())
    process = process_of(beat)
    assert process is not None
    assert (process.pid, is_gone(beat)) == (os.getpid(), False)
    assert is_gone(replace(beat, pid_started=0))
    assert process_start(2**22 + 1) is None


def test_progress_is_the_step_and_not_the_time(tmp_path: Path) -> None:
    now = 0.0
    with Heartbeat(tmp_path, 1, every_seconds=0.0) as heartbeat:
        progress = Progress(tmp_path, clock=lambda: now)
        progress.look()
        assert not progress.is_stepping
        now = 5.0
        assert progress.seconds == 5.0
        heartbeat.beat(1, 8)
        progress.look()
        assert (progress.is_stepping, progress.seconds) == (True, 0.0)
        now = 20.0
        heartbeat.beat(1, 8)  # alive, and no further
        progress.look()
        assert progress.seconds == 15.0
        assert str(progress) == "no step for 15 s after step 1 (8 samples)"
        heartbeat.enter("save")
        progress.look()
        assert progress.seconds == 0.0
        assert "phase 'save'" in str(progress)
    progress.look()
    assert (progress.is_stepping, progress.has_ended) == (False, True)


def test_the_heartbeat_of_a_process_before_is_none(tmp_path: Path) -> None:
    with Heartbeat(tmp_path, 1) as heartbeat:
        heartbeat.beat(7, 56)
        stale = find_beat(tmp_path, [])
        progress = Progress(tmp_path, stale)
        progress.look()
        assert progress.beat is None
        assert "no heartbeat" in str(progress)
        heartbeat.enter("evaluate")
        progress.look()
        assert progress.is_stepping
