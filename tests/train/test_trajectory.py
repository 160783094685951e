"""The global batch is the unit of truth: every way to spread it over ranks gives one trajectory."""

import json
import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import forked
import pytest
from processes import is_running

BIN = Path(sys.executable).parent
STEPS = 60
# Half of the best learning rate at this batch size, found by the study of the bytes task.
HALF_OF_BEST = {"sgd": 0.225, "adamw": 0.008, "lars": 0.35, "lamb": 0.01}

# Each way cuts the 256 samples of a step differently.
WAYS = {
    "torchrun": ([str(BIN / "torchrun"), "--nproc-per-node", "2", "-m"], ["micro_batch_size=32"]),
    "mpiexec": ([str(BIN / "mpiexec"), "-n", "2", sys.executable, "-m"], ["micro_batch_size=64"]),
    "nproc": ([sys.executable, "-m"], ["nproc=2", "micro_batch_size=128"]),
}


def losses(folder: Path, launcher: list[str], optimizer: str, engine: list[str]) -> list[float]:
    """The loss at every step of a run of the bytes task."""
    command = [
        *launcher, "largebatch", "train", "task=bytes", f"optim={optimizer}", "batch.size=256",
        f"optim.lr={HALF_OF_BEST[optimizer]}", f"budget.samples={256 * STEPS}", "target.loss=null",
        "evaluation.growth=10", f"hydra.run.dir={folder}", *(f"engine.{key}" for key in engine),
    ]  # fmt: skip
    own = launcher[0] == sys.executable
    done = (forked if own else subprocess).run(
        command if own else forked.launched(command),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "exhausted"
    return [json.loads(line)["loss"] for line in lines]


@cache
def alone(optimizer: str, folder: Path) -> list[float]:
    return losses(folder / optimizer, [sys.executable, "-m"], optimizer, [])


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("alone")


# Each way once; `make matrix` makes all pairs.
HERE = [("torchrun", "lars"), ("mpiexec", "lars"), ("nproc", "lars")]
PAIRS = [
    pytest.param(way, optimizer, marks=() if (way, optimizer) in HERE else pytest.mark.matrix)
    for way in WAYS
    for optimizer in HALF_OF_BEST
]


@pytest.mark.parametrize(("way", "optimizer"), PAIRS)
def test_two_ranks_follow_the_trajectory_of_one(
    way: str, optimizer: str, tmp_path: Path, together: Path
) -> None:
    launcher, engine = WAYS[way]
    one = alone(optimizer, together)
    two = losses(tmp_path / "run", launcher, optimizer, engine)
    assert len(one) == len(two) == STEPS
    difference = max(abs(a - b) / a for a, b in zip(one, two, strict=True))
    print(f"{way} {optimizer}: largest relative difference in {STEPS} losses {difference:.1e}")
    assert difference <= 1e-5
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["data_parallel_size"] == 2
    assert summary["provenance"]["launcher"] == way.replace("mpiexec", "mpi")


def test_a_refused_configuration_ends_every_rank() -> None:
    command = [str(BIN / "torchrun"), "--nproc-per-node", "2", "-m", "largebatch", "train"]
    done = subprocess.run(
        forked.launched([*command, "batch.size=255"]), capture_output=True, text=True, timeout=600
    )
    assert done.returncode != 0
    assert done.stderr.count("largebatch: a batch size of 255 is not divisible by 2") == 1


def test_ranks_that_a_run_started_end_with_it(tmp_path: Path) -> None:
    process = forked.Popen(
        [sys.executable, "-m", "largebatch", "train", "task=digits", "engine.nproc=2",
         "target.loss=null", "budget.samples=1e9", f"hydra.run.dir={tmp_path / 'run'}"],
    )  # fmt: skip
    from largebatch.records.names import METRICS

    children: list[int] = []
    try:
        path = tmp_path / "run" / METRICS
        while not path.exists() or path.stat().st_size == 0:
            assert process.poll() is None
            time.sleep(0.005)
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        children = [int(word) for word in listed.split()]
        assert children
    finally:
        process.kill()
        process.wait()
    for child in children:
        for _ in range(100):
            if not is_running(child):
                break
            time.sleep(0.1)
        assert not is_running(child)
