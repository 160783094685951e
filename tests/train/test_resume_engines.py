"""Killed under one engine, gone on under another, in a world of another size: the undisturbed run.

No sample is lost or repeated, and every loss is that of the run that nobody killed, up to rounding.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked
import pytest

STEPS, BATCH_SIZE = 60, 32
RUN = (
    "task=text", "task.num_bytes=65536", "task.sequence_length=16", "task.num_eval=16",
    "model.dim=32", "model.depth=2", "model.heads=2", "target.loss=null", "optim=lamb",
    "optim.lr=0.01", f"batch.size={BATCH_SIZE}", f"budget.samples={STEPS * BATCH_SIZE}",
    "evaluation.growth=1.5", f"checkpoint.every_samples={5 * BATCH_SIZE}", "resume=auto",
)  # fmt: skip


@dataclass(frozen=True)
class Way:
    engine: str
    world: int = 1
    more: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{' '.join((self.engine, *self.more))} on {self.world}"

    @property
    def words(self) -> list[str]:
        return [f"engine={self.engine}", f"engine.nproc={self.world}", *self.more]


DDP, DDP2, DDP4 = Way("ddp"), Way("ddp", 2), Way("ddp", 4, ("engine.micro_batch_size=2",))
FSDP, FSDP2 = Way("fsdp"), Way("fsdp", 2, ("engine.micro_batch_size=4",))
HSDP4 = Way("fsdp", 4, ("engine.replicas=2",))
ASYNC2 = Way("fsdp", 2, ("checkpoint.mode=async",))

HERE = [(FSDP2, DDP)]
MATRIX = [(DDP2, ASYNC2), (DDP, FSDP2), (ASYNC2, DDP4), (DDP4, HSDP4), (HSDP4, FSDP), (FSDP, DDP2)]


def start(folder: Path, way: Way) -> "subprocess.Popen[bytes]":
    return forked.Popen(
        [sys.executable, "-m", "largebatch", "train", *RUN, *way.words, f"hydra.run.dir={folder}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
    )  # fmt: skip


def num_lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def drafts(folder: Path) -> list[Path]:
    return list((folder / "checkpoints").glob(".samples-*"))


def whole(folder: Path) -> set[Path]:
    return set((folder / "checkpoints").glob("samples-*"))


def kill_after(lines: int, folder: Path, way: Way) -> None:
    process = start(folder, way)
    try:
        while num_lines(folder) < lines:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def kill_while_saving(folder: Path, way: Way) -> None:
    """Kill a run in the middle of writing a checkpoint, when it has written one."""
    before = whole(folder)
    process = start(folder, way)
    try:
        while whole(folder) <= before or not drafts(folder):
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.0005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def finish(folder: Path, way: Way) -> None:
    assert start(folder, way).wait(timeout=600) == 0


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(folder, DDP)
    return lines_of(folder)


def check(folder: Path, undisturbed: list[dict[str, Any]]) -> None:
    lines = lines_of(folder)
    assert [line["samples"] for line in lines] == [
        BATCH_SIZE * step for step in range(1, STEPS + 1)
    ]
    for field in ("loss", "eval_loss"):
        pairs = [
            (a[field], b[field]) for a, b in zip(lines, undisturbed, strict=True) if field in a
        ]
        difference = max(abs(a - b) / b for a, b in pairs)
        print(f"{field}: off by {difference:.1e} at most")
        assert difference < 1e-5
    assert json.loads((folder / "summary.json").read_text())["status"] == "exhausted"


def killed_twice(first: Way, then: Way, folder: Path, undisturbed: list[dict[str, Any]]) -> None:
    """At a random step, and while a checkpoint is being written; by other ways every time."""
    kill_after(random.randrange(6, 20), folder, first)
    kill_while_saving(folder, then)
    finish(folder, first)
    check(folder, undisturbed)
    worlds = {line["data_parallel_size"] for line in lines_of(folder)}
    assert worlds == {first.world, then.world}


@pytest.mark.parametrize(("first", "then"), HERE, ids=str)
def test_a_killed_run_goes_on_under_another_engine_in_another_world(
    first: Way, then: Way, tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    killed_twice(first, then, tmp_path / "run", undisturbed)


@pytest.mark.matrix
@pytest.mark.parametrize(("first", "then"), MATRIX, ids=str)
def test_the_whole_resume_matrix(
    first: Way,
    then: Way,
    tmp_path: Path,
    undisturbed: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with capsys.disabled():
        print(f"\n{first}, then {then}")
        killed_twice(first, then, tmp_path / "run", undisturbed)


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.matrix),
                                   pytest.param(3, marks=pytest.mark.matrix)])  # fmt: skip
def test_a_killed_deepspeed_run_goes_on_in_another_world_through_universal_conversion(
    stage: int, tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    folder = tmp_path / "run"
    kill_after(15, folder, Way("deepspeed", 2, (f"engine.stage={stage}",)))
    command = [sys.executable, "-m", "largebatch", "checkpoint", "universal", str(folder)]
    done = forked.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    finish(folder, Way("deepspeed", 1, (f"engine.stage={stage}",)))
    check(folder, undisturbed)


def test_a_rank_that_is_killed_under_torchrun_is_started_again_and_goes_on(
    tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    folder = tmp_path / "run"
    agent = forked.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         "--max-restarts", "2", "-m", "largebatch", "train", *RUN, f"hydra.run.dir={folder}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while num_lines(folder) < 12:
            assert agent.poll() is None
            time.sleep(0.005)
        killed = [pid for pid in children(agent.pid) if environment(pid).get("RANK") == "1"]
        assert len(killed) == 1
        os.kill(killed[0], signal.SIGKILL)
        assert agent.wait(timeout=600) == 0
    finally:
        agent.kill()
        agent.wait()
    check(folder, undisturbed)
    assert list((folder / ".hydra").glob("resumed-*"))


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(word) for task in tasks for word in task.read_text().split()]


def environment(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)
