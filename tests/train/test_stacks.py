"""Every rank says where it stands when it is asked, and writes nothing before."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from largebatch.distributed import rank_dump as stacks
from largebatch.distributed.rank_dump import (
    answering,
    last_of_each,
    seconds_between_looks,
    where_it_stands,
)
from largebatch.launch.watch.command import ask, dismiss
from largebatch.records.names import WATCH
from largebatch.train.stop_signal import SIGNALS, StopSignal


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "seconds_between_looks", lambda size: 0.05)


def answer(folder: Path, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"rank-{rank}.json").read_text())
    return found


def a_line_of_the_users(event: threading.Event) -> None:
    event.wait(20)


@contextmanager
def thread_in(function: Callable[[threading.Event], None]) -> Iterator[None]:
    event = threading.Event()
    thread = threading.Thread(target=function, args=(event,), name="loader")
    thread.start()
    yield
    event.set()
    thread.join()


def test_a_rank_answers_with_the_stacks_of_its_threads(tmp_path: Path) -> None:
    with answering(tmp_path, 0, 1), thread_in(a_line_of_the_users):
        time.sleep(0.2)
        assert list(tmp_path.iterdir()) == []  # nothing before it is asked
        found = answer(ask(tmp_path, 1, 20))
    assert [found[name] for name in ("rank", "size", "pid")] == [0, 1, os.getpid()]
    main, *others = found["threads"]
    assert main["name"] == "MainThread"
    own = [call for call in main["calls"] if call[0] == __file__]
    assert own[-1][2] == "test_a_rank_answers_with_the_stacks_of_its_threads"
    (loader,) = [thread for thread in others if thread["name"] == "loader"]
    line = a_line_of_the_users.__code__.co_firstlineno + 1
    assert [__file__, line, "a_line_of_the_users"] in loader["calls"]
    assert loader["calls"][-1][2] == "wait"  # the innermost last
    assert "watch" not in [thread["name"] for thread in found["threads"]]
    assert list((tmp_path / WATCH).iterdir()) != []
    assert not (tmp_path / WATCH / stacks.REQUEST).exists()


def test_each_request_is_answered_once_and_in_its_own_folder(tmp_path: Path) -> None:
    with answering(tmp_path, 3, 8):
        folders = [ask(tmp_path, 1, 20) for _ in range(3)]
        assert len(set(folders)) == 3
        for folder in folders:
            assert answer(folder, 3)["size"] == 8
        (tmp_path / WATCH / "once").mkdir()
        (tmp_path / WATCH / stacks.REQUEST).write_text("answer once\n")
        time.sleep(0.3)
        first = answer(tmp_path / WATCH / "once", 3)["time"]
        time.sleep(0.3)
        assert answer(tmp_path / WATCH / "once", 3)["time"] == first


def test_what_was_asked_of_a_run_before_is_not_for_this_one(tmp_path: Path) -> None:
    (tmp_path / WATCH / "old").mkdir(parents=True)
    (tmp_path / WATCH / stacks.REQUEST).write_text("leave 17\n")
    with answering(tmp_path, 0, 1):
        time.sleep(0.3)
        assert answer(ask(tmp_path, 1, 20))["rank"] == 0


def test_a_full_disk_is_no_end_of_the_run(tmp_path: Path) -> None:
    (tmp_path / WATCH).mkdir()
    with answering(tmp_path, 0, 1):
        (tmp_path / WATCH / stacks.REQUEST).write_text("answer nowhere\n")
        time.sleep(0.3)
        (tmp_path / WATCH / "nowhere").mkdir()
        until = time.monotonic() + 20
        while not (tmp_path / WATCH / "nowhere" / "rank-0.json").exists():
            assert time.monotonic() < until
            time.sleep(0.05)


HANGS = """
import pathlib, sys, time
from largebatch.distributed.rank_dump import answering
with answering(pathlib.Path(sys.argv[1]), 0, 1):
    print("on", flush=True)
    time.sleep(1000)  # where it hangs
"""


def hanging(folder: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "on\n"
    return process


def test_a_rank_that_hangs_leaves_when_it_is_told(tmp_path: Path) -> None:
    process = hanging(tmp_path)
    dismiss(tmp_path, lambda: (process.wait(20), None)[1])
    process.communicate()
    assert process.returncode == 124


def test_sigusr1_prints_the_stacks_and_the_run_goes_on(tmp_path: Path) -> None:
    process = hanging(tmp_path)
    for _ in range(2):
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.2)
    assert process.poll() is None
    process.kill()
    _, printed = process.communicate()
    assert printed.count("Current thread") == 2
    assert 'File "<string>", line 6 in <module>' in printed


def test_a_handler_of_the_users_stays(tmp_path: Path) -> None:
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        with answering(tmp_path, 0, 1):
            os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1] * 2


def test_no_rank_looks_so_often_that_all_together_are_a_storm() -> None:
    assert seconds_between_looks(24) == 1.0
    assert 98_304 / seconds_between_looks(98_304) <= 10_000


def test_the_last_collectives_of_each_group_are_kept() -> None:
    def entry(group: str, number: int) -> dict[str, Any]:
        names = {"process_group": (group, ""), "profiling_name": "gloo:barrier"}
        return names | {"collective_seq_id": number, "frames": ["…"] * 100}

    entries = [entry("rare", 1), *(entry("0", number) for number in range(1, 201))]
    kept = last_of_each(entries)
    assert [e["collective_seq_id"] for e in kept if e["process_group"][0] == "rare"] == [1]
    frequent = [e["collective_seq_id"] for e in kept if e["process_group"][0] == "0"]
    assert frequent == [*range(201 - stacks.KEPT, 201)]
    assert "frames" not in kept[0]


def test_a_torch_without_a_flight_recorder_is_said_to_be_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    for recorder in ("_dump_xccl_trace", "_dump_nccl_trace", "_dump_fr_trace"):
        monkeypatch.delattr(torch._C._distributed_c10d, recorder, raising=False)
    assert "no Flight Recorder in this torch" in where_it_stands(0, 1)["trouble"]


def test_every_flight_recorder_that_exists_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """XCCL and NCCL record into their own, which the general one (gloo's) does not show."""
    import torch

    def of(name: str, first: int) -> Callable[..., bytes]:
        entry = {"record_id": first, "process_group": ("0", ""), "profiling_name": f"{name}:x"}
        return lambda **asked: pickle.dumps({"entries": [entry]})

    def refuses(**asked: bool) -> bytes:
        raise RuntimeError("of another version")

    names = torch._C._distributed_c10d
    monkeypatch.setattr(names, "_dump_xccl_trace", of("xccl", 0), raising=False)
    monkeypatch.setattr(names, "_dump_fr_trace", of("gloo", 0))
    found = where_it_stands(0, 1)
    assert [call["profiling_name"] for call in found["collectives"]] == ["xccl:x", "gloo:x"]
    assert (found["is_whole"], found["trouble"]) == (True, None)
    monkeypatch.setattr(names, "_dump_nccl_trace", refuses, raising=False)
    monkeypatch.setattr(names, "_dump_fr_trace", of("gloo", 7))
    found = where_it_stands(0, 1)
    assert [call["profiling_name"] for call in found["collectives"]] == ["xccl:x", "gloo:x"]
    assert (found["is_whole"], found["trouble"]) == (False, None)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_once_with_its_echo_and_the_next_one_acts(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = []
    before = signal.signal(number, lambda number, frame: heard.append(number))
    try:
        with StopSignal() as stop_signal:
            assert stop_signal.signal is None
            signal.raise_signal(number)
            signal.raise_signal(number)  # mpiexec passes on what the batch system has sent to all
            assert (stop_signal.signal, heard) == (number, [])
            later = time.monotonic() + 1.5
            monkeypatch.setattr(time, "monotonic", lambda: later)
            signal.raise_signal(number)
            assert heard == [number]
        signal.raise_signal(number)
        assert heard == [number] * 2
    finally:
        signal.signal(number, before)


def test_the_signal_for_stacks_ends_no_run() -> None:
    assert signal.SIGUSR1 not in SIGNALS
    assert {signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGXCPU} == set(SIGNALS)
