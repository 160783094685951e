"""A login node and its PBS, both fake; jobs there run from their first line to their last."""

import getpass
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import forked

FAKES = Path(__file__).parent / "fakes"
BIN = Path(sys.executable).parent
SMALL = ["task=digits", "target.loss=null", "evaluation.growth=100"]
AURORA = ["cluster=aurora", "cluster.account=project", "cluster.walltime=00:30:00"]

Done = subprocess.CompletedProcess[str]


class Cluster:
    """A login node and its PBS, both fake, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.home, self.jobs, self.work = folder / "home", folder / "pbs", folder / "work"
        for made in (self.home / "largebatch-env" / "bin", self.jobs, self.work):
            made.mkdir(parents=True)
        # Python is found on PATH: the environment is a name.
        (self.home / "largebatch-env" / "bin" / "activate").write_text("export VENV=active\n")
        self.environment = os.environ | {
            "HOME": str(self.home),
            "USER": getpass.getuser(),
            "PATH": f"{FAKES}:{BIN}:{os.environ['PATH']}",
            "FAKE_PBS": str(self.jobs),
            "FAKE_PALS_MPIEXEC": str(BIN / "mpiexec"),
            "FAKE_PALS_RANKS": "2",
            "FAKE_PALS_FORKS": "yes",
            "FAKE_PALS_RECORD": str(self.jobs / "asked"),
            "OMP_NUM_THREADS": "1",
        }

    def submit(self, *words: str) -> Done:
        return forked.run(
            [sys.executable, "-m", "largebatch", "submit", *words],
            cwd=self.work, env=self.environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip

    def job(self, number: int) -> dict[str, Any]:
        job: dict[str, Any] = json.loads((self.jobs / f"{1000 + number}.pbs.json").read_text())
        return job

    def run(self, number: int, nodes: Sequence[str] | None = None) -> Done:
        """A job from its begin to its end."""
        process = self.begin(number, nodes)
        said, errors = process.communicate(timeout=600)
        self.ended(number)
        return Done(process.args, process.returncode, said, errors)

    def ended(self, number: int) -> None:
        (self.jobs / f"{self.job(number)['id']}.ended").touch()

    def begin(self, number: int, nodes: Sequence[str] | None = None) -> "subprocess.Popen[str]":
        """What PBS does once the nodes are free: the script, on the first of them."""
        job = self.job(number)
        if job["depend"] is not None:
            before = job["depend"].removeprefix("depend=afterany:")
            assert (self.jobs / f"{before}.ended").exists()
        nodes = nodes or [f"x4{node:04}c0s0b0n0" for node in range(int(job["select"]))]
        nodefile = self.jobs / f"{job['id']}.nodes"
        # A name a chunk of the node: they repeat.
        nodefile.write_text("".join(f"{node}.hostmgmt.site\n" * 2 for node in nodes))
        (self.jobs / "job.sh").write_text(job["script"])
        return subprocess.Popen(
            ["bash", str(self.jobs / "job.sh")],
            cwd=self.home,
            env=self.environment
            | {
                "PBS_JOBID": job["id"],
                "PBS_NODEFILE": str(nodefile),
                "PBS_O_WORKDIR": job["at"],
            },
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def asked(self) -> dict[str, Any]:
        """What the job asked of PALS."""
        asked: dict[str, Any] = json.loads((self.jobs / "asked").read_text())
        return asked


def read(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary
