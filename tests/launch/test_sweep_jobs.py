"""A PBS job for each trial, with stand-ins for qsub and qselect, which really run what is
submitted.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest

from largebatch.launch.sweeps.jobs import LocalJobs

HERE = Path(__file__).parent

CLUSTER = """
name: here
scheduler: pbs
launcher: mpich
shell_options: ""
queue: any
account: project
walltime: "00:10:00"
open_files: 1024
node: {ranks: 2}
queues: {any: {walltime: {4: "01:00:00"}, jobs_per_user: 2}}
"""


class PBS:
    """Sweeps on a cluster with PBS; `jobs` has what was submitted."""

    def __init__(self, folder: Path) -> None:
        self.at, self.jobs = folder, folder / "jobs"
        self.jobs.mkdir()
        (folder / "clusters" / "cluster").mkdir(parents=True)
        (folder / "clusters" / "cluster" / "here.yaml").write_text(CLUSTER)

    def start(self, *words: str, path: str = "") -> subprocess.Popen[str]:
        path = f"{HERE / 'parsl_fakes' / 'pbs'}:{os.environ['PATH']}"
        return forked.Popen(
            [
                sys.executable, "-m", "largebatch", "sweep", f"--config-dir={self.at / 'clusters'}",
                "hydra/launcher=parsl", "hydra.launcher.shape=jobs", "hydra.launcher.cluster=here",
                "hydra.launcher.poll_seconds=0.05", "hydra.sweep.dir=sweep", "task=digits", *words,
            ],
            children=False,
            env=os.environ | {"PATH": path, "FAKE_PBS": str(self.jobs), "OMP_NUM_THREADS": "1"},
            cwd=self.at, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def run(self, *words: str) -> tuple[int, str]:
        started = self.start(*words)
        said, _ = started.communicate(timeout=600)
        return started.returncode, said

    @property
    def submitted(self) -> list[str]:
        return sorted(path.stem for path in self.jobs.glob("*.pid"))


@pytest.fixture
def pbs(tmp_path: Path) -> Iterator[PBS]:
    pbs = PBS(tmp_path)
    yield pbs
    for path in pbs.jobs.glob("*.pid"):
        try:
            os.killpg(int(path.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            continue


@pytest.mark.matrix
def test_a_job_trains_its_trial(pbs: PBS) -> None:
    code, said = pbs.run(
        "budget.samples=640", "engine.device=cpu", "hydra.launcher.ranks_per_node=1"
    )
    log = pbs.at / "sweep" / "0" / "attempt-1.log"
    assert code == 0, said + (log.read_text() if log.exists() else "")
    summary = json.loads((pbs.at / "sweep" / "0" / "summary.json").read_text())
    assert summary["status"] == "exhausted"
    assert json.loads((pbs.at / "sweep" / "trials.jsonl").read_text().splitlines()[-1])["code"] == 3
    assert len(pbs.submitted) == 1


def test_jobs_outlive_their_sweep_and_are_found_again(pbs: PBS) -> None:
    words = (
        f"hydra.launcher.command=[{sys.executable},-S,{HERE / 'parsl_trial.py'}]", "seed=range(3)",
        "+lasts=300", "hydra.launcher.ranks_per_node=1",
    )  # fmt: skip
    killed = pbs.start(*words)
    notes = pbs.at / "sweep" / "notes"
    deadline = time.monotonic() + 600
    while not (notes.exists() and notes.read_text().count("begun") == 2):
        assert time.monotonic() < deadline
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.02)
    # The queue holds two of a user's jobs: the third waits for its turn.
    assert len(pbs.submitted) == 2
    killed.kill()
    killed.communicate()
    code, said = pbs.run(*words)
    assert code == 0, said
    assert len(pbs.submitted) == 3
    lines = [line.split() for line in notes.read_text().splitlines()]
    assert sorted(line[:2] for line in lines) == sorted(
        [what, trial] for what in ("begun", "reached") for trial in "012"
    )


def test_a_dry_run_shows_a_job_and_submits_none(pbs: PBS) -> None:
    code, said = pbs.run("seed=0,1", "hydra.launcher.dry_run=true", "hydra.launcher.walltime=600")
    assert code == 0, said
    assert f"# qsub {pbs.at / 'sweep' / '0' / 'attempt-1.job'}" in said
    for directive in ("-A project", "-q any", "-l walltime=00:10:00", "-l select=1"):
        assert f"#PBS {directive}\n" in said
    assert "mpiexec -n 2 -ppn 2" in said
    assert "# 2 jobs like this one would be submitted" in said
    assert pbs.submitted == []
    assert not (pbs.at / "sweep" / "0").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["hydra.launcher.cluster=nowhere"], "nowhere"),
        (["hydra.launcher.walltime=02:00:00"], "queue any gives a job of 1 nodes"),
        (["hydra.launcher.shape=clouds"], "must be one of devices, nodes, jobs, got 'clouds'"),
        (["hydra.launcher.retries=-1"], "hydra.launcher.retries"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(pbs: PBS, words: list[str], sentence: str) -> None:
    code, said = pbs.run(*words)
    assert code == 2
    assert sentence in said
    assert said.count("\n") == 1
    assert pbs.submitted == []


def test_a_job_of_this_machine_has_ended_once_its_process_is_gone(tmp_path: Path) -> None:
    script, jobs = tmp_path / "job", LocalJobs()
    script.write_text(f"while [ ! -e {tmp_path / 'end'} ]; do sleep 0.01; done\n")
    job, before = jobs.submit(script), f"{os.getpid()}.0"
    assert jobs.ended([job, before]) == {before}  # an id is not that of a process with its number
    assert LocalJobs().ended([job]) == set()  # as a sweep that is started again finds it
    (tmp_path / "end").touch()
    deadline = time.monotonic() + 600
    while not jobs.ended([job]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
