"""Slurm for real: a node of its own on this machine, ranks that srun starts, trials that sbatch
runs.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
from slurm_node import free_port, lacking, slurm_node

TRAINING = [
    "task=digits", "optim=lamb", "optim.lr=0.01", "batch.size=64", "budget.samples=640", "seed=3",
    "engine.device=cpu", "target.loss=null",
]  # fmt: skip


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    reason = lacking()
    if reason is not None and "LARGEBATCH_TEST_SLURM" in os.environ:
        pytest.fail(f"LARGEBATCH_TEST_SLURM is set, and there is no Slurm here: {reason}")
    if reason is not None:
        pytest.skip(f"NOT TESTED, no Slurm here: {reason}")
    with slurm_node(tmp_path_factory.mktemp("slurm")) as environment:
        # Tasks and the sweeps before them are forks: srun is under test, and not their imports.
        path = f"{Path(forked.stand_in()).parent}:{environment['PATH']}"
        yield environment | {"OMP_NUM_THREADS": "1", "PATH": path}


@pytest.fixture(scope="module")
def by_torchrun(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the same training on two ranks that torchrun starts."""
    folder = tmp_path_factory.mktemp("torchrun")
    subprocess.run(
        forked.launched([
            "torchrun", "--standalone", "--nproc-per-node=2",
            "-m", "largebatch", "train", *TRAINING, f"hydra.run.dir={folder / 'run'}",
        ]),
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False, timeout=600, capture_output=True,
    )  # fmt: skip
    return losses(folder / "run")


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_ranks_of_srun_in_a_job_of_a_sweep_train_as_those_of_torchrun(
    slurm: dict[str, str], by_torchrun: list[float], tmp_path: Path
) -> None:
    done = forked.run(
        [
            sys.executable, "-m", "largebatch", "sweep", *TRAINING, "hydra/launcher=parsl",
            "hydra.launcher.shape=jobs", "hydra.launcher.cluster=slurm",
            "hydra.launcher.walltime=00:10:00", "hydra.launcher.ranks_per_node=2",
            f"hydra.launcher.overrides=['cluster.master_port={free_port()}']",
            "hydra.launcher.poll_seconds=0.1", f"hydra.sweep.dir={tmp_path / 'sweep'}",
        ],
        env=slurm, cwd=tmp_path, timeout=600, capture_output=True, text=True,
    )  # fmt: skip
    log = tmp_path / "sweep" / "0" / "attempt-1.log"
    assert done.returncode == 0, done.stderr + (log.read_text() if log.exists() else "")
    found = losses(tmp_path / "sweep" / "0")
    assert len(found) == 10
    assert found == pytest.approx(by_torchrun, rel=0, abs=1e-6)
    summary = json.loads((tmp_path / "sweep" / "0" / "summary.json").read_text())
    assert summary["data_parallel_size"] == 2
    lines = (tmp_path / "sweep" / "trials.jsonl").read_text().splitlines()
    begun, submitted, ended = map(json.loads, lines)
    assert (begun["event"], submitted["event"]) == ("begun", "submitted")
    assert (ended["outcome"], ended["code"]) == ("exhausted", 0)
    known = subprocess.run(
        ["scontrol", "--oneliner", "show", "job", submitted["job"]],
        env=slurm, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"JobId={submitted['job']} JobName=trial-0 " in known.stdout
    assert "NumNodes=1 NumCPUs=2 NumTasks=2" in known.stdout


def test_ranks_save_and_leave_on_the_warning_before_a_jobs_end(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    long = [word for word in TRAINING if not word.startswith("budget")]
    sent = forked.run(
        [
            sys.executable, "-m", "largebatch", "submit", "cluster=slurm",
            "cluster.walltime=00:10:00", "cluster.node.ranks=2",
            f"cluster.master_port={free_port()}", "folder=job", "--", "train", *long,
            "budget.samples=64e6", "checkpoint.every_samples=32e6",
        ],
        env=slurm, cwd=tmp_path, timeout=600, capture_output=True, text=True,
    )  # fmt: skip
    assert sent.returncode == 0, sent.stderr
    (number,) = re.findall(r"^(\d+):", sent.stdout)
    record = tmp_path / "job" / "run"
    deadline = time.monotonic() + 600
    while not ((record / "metrics.jsonl").exists() and losses(record)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    subprocess.run(["scancel", "--signal=USR2", number], env=slurm, check=True)  # as Slurm sends it
    while not (record / "summary.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    summary = json.loads((record / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    (saved,) = (record / "checkpoints").glob("samples-*")
    assert int(saved.name.removeprefix("samples-")) == summary["samples"]


def test_srun_hands_on_the_word_to_stop(slurm: dict[str, str], tmp_path: Path) -> None:
    trial = Path(__file__).parent / "parsl_trial.py"
    sweep = forked.Popen(
        [
            sys.executable, "-m", "largebatch", "sweep", "task=digits", "+lasts=6000",
            "hydra/launcher=parsl", "hydra.launcher.shape=nodes", "hydra.launcher.cluster=slurm",
            f"hydra.launcher.command=[{sys.executable},-S,{trial}]",
            "hydra.launcher.poll_seconds=0.1", f"hydra.sweep.dir={tmp_path / 'sweep'}",
        ],
        children=False,
        env=slurm, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    notes = tmp_path / "sweep" / "notes"
    deadline = time.monotonic() + 600
    while not (notes.exists() and "begun" in notes.read_text()):
        assert time.monotonic() < deadline
        assert sweep.poll() is None, sweep.communicate()[0]
        time.sleep(0.05)
    sweep.terminate()
    said, _ = sweep.communicate(timeout=600)
    assert (sweep.returncode, "stopped, by SIGTERM" in said) == (130, True)
    assert [line.split()[0] for line in notes.read_text().splitlines()] == ["begun", "interrupted"]


def test_a_sweep_knows_when_slurm_ends_its_job(slurm: dict[str, str]) -> None:
    code = "from largebatch.distributed.walltime import end_of_job; print(end_of_job(None))"
    done = subprocess.run(
        ["srun", "--ntasks=1", "--time=10", sys.executable, "-c", code],
        env=slurm, timeout=600, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(done.stdout) == pytest.approx(time.time() + 600, abs=30)
