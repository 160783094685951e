"""A fault on one rank, at any stage, ends all ranks with its message and one exit code."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forked
import pytest
from team_ranks import begin

from largebatch.distributed.ranks import free_port

BIN = Path(sys.executable).parent

# Parts of a user's own, each of which fails on the rank and at the stage that the environment says.
PARTS = """import inspect
import os

from pathlib import Path

import torch

from largebatch.train.engines.ddp import DDP
from largebatch.train.trackers.safe import NoLogger
from largebatch.train.tasks.digits import Digits


def fault(stage):
    rank = os.environ.get("RANK") or os.environ["PMI_RANK"]  # mpiexec's own name for it
    if os.environ["FAULT"] == f"{stage} {rank}":
        if os.environ["KIND"] == "refusal":
            raise ValueError(f"no such {stage} here")
        Path(f"missing-{stage}").read_text()


class Task(Digits):
    def __init__(self):
        fault("task")
        super().__init__()

    def train_batch(self, indices):
        if len(indices):
            fault("batch")
        return super().train_batch(indices)


class Model(torch.nn.Linear):
    def __init__(self):
        fault("model")
        if any(frame.function == "build_throughput" for frame in inspect.stack()):
            fault("throughput")  # where a second one is made, to count its operations
        super().__init__(64, 10)


class Engine(DDP):
    def __init__(self, *args, **more):
        fault("engine")
        super().__init__(*args, **more)

    def attach(self, optimizer, clip_norm):
        fault("attach")
        return super().attach(optimizer, clip_norm)

    def small_gradients(self, kind):
        fault("noise")
        return super().small_gradients(kind)

    def tensors(self, optimizer):
        fault("checkpoint")
        return super().tensors(optimizer)


class SGD(torch.optim.SGD):
    def __init__(self, *args, **more):
        fault("optimizer")
        super().__init__(*args, **more)


class Logger(NoLogger):
    def __init__(self, folder, config, group=None):
        fault("logger")
"""

QUICK = ("train", "task=digits", "optim=sgd", "batch.size=64", "budget.samples=256")
OWN = (
    *("train", "task=custom", "model=custom", "batch.size=64", "budget.samples=256"),
    *("task._target_=parts.Task", "model._target_=parts.Model", "engine._target_=parts.Engine"),
    *("optim=sgd", "optim._target_=parts.SGD", "+logger._target_=parts.Logger", "target.loss=null"),
    *("noise.small=rank", "checkpoint.every_samples=128", "hydra.run.dir=run"),
)  # fmt: skip
IPEX = """import os

if os.environ["FAULT"] == f"device {os.environ['RANK']}":
    raise ImportError("no library of the device")
"""

# Stage and rank of the fault, the exit code of all ranks, and a word of the message.
STAGES = {
    "composition 0": (2, "did you mean optim.lr", ["optim.lrr=1"]),
    "order 0": (2, "63", ["batch.size=63"]),
    "folder 0": (2, "cannot be written", []),
    "device 1": (2, "no library of the device", ["engine.ipex=true"]),
    "group 1": (1, "nowhere9", []),
    "logger 0 refusal": (2, "no such logger here", []),
    **{f"{stage} 1": (1, f"missing-{stage}", []) for stage in ("model", "attach", "checkpoint")},
    **{
        f"{stage} 1 refusal": (2, f"no such {stage} here", [])
        for stage in ("task", "engine", "optimizer", "noise")
    },
    "throughput 0": (1, "missing-throughput", ["throughput.formula=counted"]),
    "throughput 0 refusal": (2, "no such throughput here", ["throughput.formula=counted"]),
    "task 0": (1, "missing-task", []),
    "batch 1": (1, "missing-batch", []),
    "batch 0": (1, "missing-batch", []),
}
Ended = tuple[list[int | None], list[str]]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Exit codes and words of two ranks, for each stage; several at a time."""
    found: dict[str, Ended] = {}
    waiting = list(STAGES)
    running: dict[str, tuple[Path, list[Any], float]] = {}
    while waiting or running:
        while waiting and len(running) < 6:
            what = waiting.pop()
            folder = tmp_path_factory.mktemp("team")
            running[what] = (folder, start(what, folder), time.monotonic())
        for what, (folder, ranks, begun) in list(running.items()):
            if any(rank.poll() is None for rank in ranks) and time.monotonic() - begun < 240:
                continue
            codes = [rank.returncode for rank in ranks]
            for rank in ranks:
                rank.kill()
                rank.wait()
            found[what] = codes, [(folder / f"said-{rank}").read_text() for rank in range(2)]
            del running[what]
        time.sleep(0.05)
    return found


def start(what: str, folder: Path) -> list[Any]:
    (folder / "parts.py").write_text(PARTS)
    (folder / "intel_extension_for_pytorch.py").write_text(IPEX)
    stage, rank, *refusal = what.split()
    world = [
        {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "FAULT": f"{stage} {rank}"}
        | {"KIND": "refusal" if refusal else "error", "LOCAL_WORLD_SIZE": "2"}
    ] * 2
    if stage == "group":
        world = [world[0], world[1] | {"GLOO_SOCKET_IFNAME": "nowhere9"}]
    if stage == "folder":
        (folder / "run").mkdir()
        (folder / "run" / ".hydra").write_text("a file where a folder is to be")
    return begin(world, [*OWN, *STAGES[what][2]], folder)


@pytest.mark.parametrize("what", STAGES)
def test_a_fault_at_any_stage_ends_all_ranks_with_one_message(
    what: str, ended: dict[str, Ended]
) -> None:
    code, word, _ = STAGES[what]
    codes, said = ended[what]
    assert codes == [code, code], said
    failing = int(what.split()[1])
    told = [line for text in said for line in text.splitlines() if word in line]
    told = [line for line in told if line.startswith("largebatch: ")]
    assert len(told) == 1, said
    assert told[0].startswith("largebatch: rank 1 on ") == (failing == 1)
    assert told[0] in said[failing]
    assert "Error" not in said[1 - failing]


@pytest.mark.parametrize("launcher", ["nproc", "torchrun", "mpiexec"])
def test_a_fault_of_one_rank_ends_all_under_every_launcher(launcher: str, tmp_path: Path) -> None:
    (tmp_path / "parts.py").write_text(PARTS)
    own = [*OWN, "engine.nproc=2"] if launcher == "nproc" else [*OWN]
    words = [sys.executable, "-m", "largebatch", *own]
    if launcher == "torchrun":
        words = [str(BIN / "torchrun"), "--nproc-per-node", "2", *words[1:]]
    if launcher == "mpiexec":
        words = [str(BIN / "mpiexec"), "-n", "2", *words]
    run = forked.run if launcher == "nproc" else subprocess.run
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    done = run(
        words if launcher == "nproc" else forked.launched(words), cwd=tmp_path, timeout=600,
        env=os.environ | place | {"FAULT": "model 1", "KIND": "refusal"},
        capture_output=True, text=True,
    )  # fmt: skip
    # torchrun makes 1 of every code; MPI's launcher may have killed the second rank to leave.
    assert done.returncode == {"nproc": 2, "torchrun": 1}.get(launcher, done.returncode) != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("largebatch: ")]
    assert len(told) == 1, done.stderr
    assert told[0].startswith("largebatch: rank 1 on ")
    assert "no such model here" in told[0]


LEAVING = """
import sys, threading, time
from largebatch.distributed.team import Team, find_team
look = Team._look
Team._look = lambda self, store: (look(self, store), time.sleep(0.5))  # a busy machine's
try:
    with find_team() as team:
        team.tell("go" if team.ranks.is_first else None)
        if sys.argv[1] == "fault" and not team.ranks.is_first:
            raise ValueError("one rank's own")
finally:
    print("left:", *[thread.name for thread in threading.enumerate()])
"""


@pytest.mark.parametrize("how", ["well", "fault"])
def test_no_thread_is_left_in_the_store_when_a_rank_ends(how: str, tmp_path: Path) -> None:
    """The interpreter's end would abort the process, when such a thread came back."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_WORLD_SIZE": "2"}
    ranks = [
        forked.Popen(
            [sys.executable, "-c", LEAVING, how], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=os.environ | place | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"},
            text=True, cwd=tmp_path,
        )
        for rank in "01"
    ]  # fmt: skip
    for rank in ranks:
        said, _ = rank.communicate(timeout=600)
        (left,) = [line.split()[1:] for line in said.splitlines() if line.startswith("left:")]
        assert left == ["MainThread"], said
