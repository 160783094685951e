"""Sweeps: runs that fail beside others, going on in a folder, signals, other people's sweepers."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.core.utils import JobReturn, JobStatus
from processes import is_running

import largebatch.conf.resolvers  # noqa: F401 — registers them
from largebatch.launch.sweeps.workers import _run
from largebatch.records.summary import objective

HERE = Path(__file__).parent
RUN = ("task=digits", "batch.size=64", "budget.samples=640", "target.loss=null")
MOODY = (*RUN, "task._target_=sweep_tasks.Moody", "+task.mood=calm")
HERE_AND_NOW = "hydra/launcher=basic"  # in this process, one after the other

Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """A command of Hydra's in this process, in a folder of its own; returns the exit code."""
    from largebatch.train import command, sweep_command

    def largebatch(name: str, *words: str) -> int:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["largebatch"])
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        if HERE_AND_NOW not in words:
            monkeypatch.setattr(sys, "executable", forked.stand_in())
        main = {"train": command.main, "sweep": sweep_command.main}[name]
        return main(list(words))

    return largebatch


def summaries(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        path.parent.name: json.loads(path.read_text())
        for path in sorted(folder.glob("*/summary.json"))
    }


def test_a_run_that_is_killed_or_breaks_takes_no_other_with_it(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = (*MOODY[:-1], "+task.mood=killed,breaks,calm", "hydra.launcher.n_jobs=2")
    assert run("sweep", *words, "hydra.sweep.dir=s") == 1
    assert {name: line["status"] for name, line in summaries(tmp_path / "s").items()} == {
        "1": "failed", "2": "exhausted",
    }  # fmt: skip
    said = capfd.readouterr().err.splitlines()
    assert "largebatch: s/0 failed: its process was killed by SIGKILL" in "\n".join(said)
    (line,) = (line for line in said if line.startswith("largebatch: s/1 failed: "))
    assert "RuntimeError: the data is gone (see s/1/traceback.txt)" in line
    assert "in train_batch" in (tmp_path / "s" / "1" / "traceback.txt").read_text()
    assert said[-1].startswith("largebatch: of 3 run(s) 2 failed; the same command makes those")


def test_a_sweep_that_has_nothing_left_to_do_says_so(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*RUN, "seed=0,1", HERE_AND_NOW, "hydra.sweep.dir=s")
    told = "all 2 runs have ended already; their records are in s\n"
    for ended in ("", told):
        assert run("sweep", *words) == 0
        assert (capsys.readouterr().out == ended) is bool(ended)
    shutil.rmtree(tmp_path / "s" / "1")
    assert run("sweep", *words) == 0
    assert "have ended already" not in capsys.readouterr().out


@pytest.mark.parametrize("command", [("sweep",), ("train", "--multirun")], ids=" ".join)
def test_each_refused_run_is_told_with_its_folder(
    command: tuple[str, ...], run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*RUN, "optim.lr=-1,0.01,-2", HERE_AND_NOW, "hydra.sweep.dir=s")
    assert run(*command, *words) == 2
    said = capsys.readouterr().err
    for name, lr in (("0", "-1"), ("2", "-2")):
        assert f"largebatch: s/{name} refused: optim.lr must be a number > 0, got {lr}\n" in said
    assert said.endswith("largebatch: of 3 run(s) 2 refused\n")
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["1", "multirun.yaml"]


@pytest.mark.parametrize("more", [(), ("resume=auto",)], ids=["", "resume"])
def test_a_sweep_goes_on_in_its_folder_and_another_is_refused(
    more: tuple[str, ...], run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*RUN, HERE_AND_NOW, "hydra.sweep.dir=s", *more)
    assert run("sweep", *words, "seed=0,1") == 0
    (tmp_path / "s" / "1" / "summary.json").unlink()  # as if it had been killed
    kept = tmp_path / "s" / "0" / "summary.json"
    before = kept.stat().st_mtime_ns
    assert run("sweep", *words, "seed=0,1") == 0
    assert summaries(tmp_path / "s").keys() == {"0", "1"}
    assert kept.stat().st_mtime_ns == before
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run("sweep", *words, "seed=5,6") == 2
    output, said = capsys.readouterr()
    assert output == ""
    assert said.count("\n") == 1
    assert "the run in s/0 was made with seed=0 (now 5)" in said
    assert "hydra.sweep.dir" in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


@pytest.fixture
def sweep(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A sweep of two slow runs, both under way."""
    (tmp_path / "gate").touch()
    started = start(tmp_path)
    deadline = time.monotonic() + 600
    while len(workers(tmp_path)) < 2:  # metrics.jsonl is there a moment before its owner
        assert started.poll() is None, started.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield started
    started.kill()
    started.communicate()


def start(folder: Path) -> subprocess.Popen[str]:
    words = (
        *MOODY,
        "budget.samples=64000",
        "seed=0,1",
        "hydra.launcher.n_jobs=2",
        "hydra.sweep.dir=s",
    )
    path = f"{HERE}:{os.environ.get('PYTHONPATH', '')}"
    return forked.Popen(
        [sys.executable, "-m", "largebatch", "sweep", *words], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip


def workers(of: Path) -> set[int]:
    """Processes that hold the runs below a folder."""
    return {json.loads(path.read_text())["pid"] for path in of.rglob("owner.json")}


def are_gone(processes: set[int]) -> bool:
    return not any(is_running(number) for number in processes)


def test_sigterm_ends_a_sweep_with_its_runs_and_the_same_command_goes_on(
    sweep: subprocess.Popen[str], tmp_path: Path
) -> None:
    at_work = workers(tmp_path)
    assert len(at_work) == 2
    sweep.send_signal(signal.SIGTERM)
    _, said = sweep.communicate(timeout=600)
    assert sweep.returncode == 130
    assert said.splitlines()[-1] == ("largebatch: interrupted; the same command resumes from here")
    assert are_gone(at_work)
    ended = summaries(tmp_path / "s")
    assert {line["status"] for line in ended.values()} == {"interrupted"}
    (tmp_path / "gate").unlink()
    again = start(tmp_path)
    _, said = again.communicate(timeout=600)
    assert again.returncode == 0, said
    assert {line["status"] for line in summaries(tmp_path / "s").values()} == {"exhausted"}


def test_workers_of_a_killed_sweep_end_too(sweep: subprocess.Popen[str], tmp_path: Path) -> None:
    at_work = workers(tmp_path)
    sweep.kill()
    deadline = time.monotonic() + 600
    while not are_gone(at_work):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.filterwarnings("ignore")  # Optuna's own
def test_optuna_makes_small_what_runs_return(run: Run, tmp_path: Path) -> None:
    words = ("task=digits", "batch.size=64", "budget.samples=3200", "target.loss=0.5")
    code = run(
        "sweep", *words, "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweep.dir=s",
        "hydra.sweeper.sampler.seed=1", "optim.lr=tag(log,interval(1e-5,0.1))", HERE_AND_NOW,
    )  # fmt: skip
    assert code == 0
    found = summaries(tmp_path / "s").values()
    steps = [line["steps_to_target_interpolated"] for line in found]
    assert len(steps) == 3
    assert None in steps  # a miss does not end the search
    best = yaml.safe_load((tmp_path / "s" / "optimization_results.yaml").read_text())
    assert best["best_value"] == min(step for step in steps if step is not None)


REACHED = {
    "status": "reached", "target_loss": 0.1, "steps_to_target": 12, "batch_size": 64,
    "steps_to_target_interpolated": 11.5, "eval_loss": 0.09,
}  # fmt: skip


@pytest.mark.parametrize(
    ("summary", "value"),
    [
        ({"target_loss": 0.1, "steps_to_target": 12, "status": "reached"}, 12.0),
        ({"target_loss": 0.1, "steps_to_target": None, "status": "exhausted"}, math.inf),
        ({"target_loss": None, "eval_loss": 0.25, "status": "exhausted"}, 0.25),
        ({"target_loss": None, "eval_loss": None, "loss": 0.5, "status": "exhausted"}, 0.5),
        ({"target_loss": None, "eval_loss": 9.0, "status": "diverged"}, math.inf),
        ({**REACHED, "config": {"objective": None}}, 11.5),
        ({**REACHED, "config": {"objective": "steps"}}, 11.5),
        ({**REACHED, "config": {"objective": "samples"}}, 11.5 * 64),
        ({**REACHED, "config": {"objective": "loss"}}, 0.09),
    ],
)
def test_a_run_is_worth_its_steps_or_its_loss(summary: dict[str, Any], value: float) -> None:
    assert objective(summary) == value


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own() -> None:
    with initialize_config_module("largebatch.conf", version_base="1.3"):
        configs = [compose("train", return_hydra_config=True) for _ in range(3)]
        jobs = [compose("submit", ["cluster=local"]).folder for _ in range(3)]
    for key in ("run", "sweep"):
        names = [config.hydra[key].dir for config in configs]
        assert len(set(names)) == 3
        assert names == [config.hydra[key].dir for config in configs]  # each for good
    assert len(set(jobs)) == 3


@pytest.mark.parametrize("there", [False, True], ids=["new", "there"])
def test_a_refused_run_leaves_folders_as_they_were(there: bool, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "deep"
    if there:
        folder.mkdir(parents=True)
    assert run("train", *RUN, "optim.lr=-1", "hydra.run.dir=new/deep") == 2
    assert run("train", *RUN, "optim=lamb", "optim.betas=[0.9,2]", "hydra.run.dir=new/deep") == 2
    assert folder.exists() is there
    assert folder.parent.exists() is there


def test_a_task_of_ones_own_is_found_from_the_run_s_folder(
    tmp_path: Path, command: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    (tmp_path / "mine.py").write_text((HERE / "sweep_tasks.py").read_text())
    done = command(
        "train", *RUN, "task._target_=mine.Moody", "engine.nproc=2", "hydra.job.chdir=true",
        "hydra.run.dir=run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("· run")
    assert json.loads((tmp_path / "run/summary.json").read_text())["data_parallel_size"] == 2


def test_the_configuration_of_a_sweep_s_run_can_be_shown(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("sweep", "--cfg", "job", "seed=7") == 0
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 7
    assert run("sweep", "--cfg", "job", "seed=7,8") == 2
    assert "seed=7,8 are values of a sweep" in capsys.readouterr().err


def test_a_job_that_cannot_even_begin_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    returned = _run(b"no pickle", 0, ["optim=lamb", "seed=1"])
    assert isinstance(returned, JobReturn)
    assert returned.status == JobStatus.FAILED
    assert capsys.readouterr().err.startswith("largebatch: optim=lamb seed=1: UnpicklingError: ")
