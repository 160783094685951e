"""Sweeps packed over nodes: dead nodes, walltimes, kills, and what goes on from them.

The nodes are names in a host file, and a stand-in for mpiexec runs what it is told here.
"""

import collections
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import pytest

from largebatch.launch.sweeps.record import SweepRecord

HERE = Path(__file__).parent
NODES = ("n1", "n2", "n3", "n4")


class Sweep:
    """`largebatch sweep` over four nodes, in a folder of its own; trials that take no time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.at = folder / "sweep", folder
        self.at.mkdir(exist_ok=True)
        (folder / "hosts").write_text("".join(f"{node}\n" for node in NODES))
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *words: str) -> subprocess.Popen[str]:
        path = f"{HERE / 'parsl_fakes'}:{os.environ['PATH']}"
        command = f"[{sys.executable},-S,{HERE / 'parsl_trial.py'}]"
        started = forked.Popen(
            [
                sys.executable, "-m", "largebatch", "sweep", "task=digits", "hydra/launcher=parsl",
                "hydra.launcher.shape=nodes", f"hydra.launcher.hostfile={self.at / 'hosts'}",
                f"hydra.launcher.command={command}", "hydra.launcher.poll_seconds=0.05",
                f"hydra.sweep.dir={self.folder}", *words,
            ],
            children=False,
            env=os.environ | {"PATH": path, "FAKE_NODES": str(self.at)}, cwd=self.at,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.started.append(started)
        return started

    def run(self, *words: str) -> tuple[int, str]:
        started = self.start(*words)
        said, _ = started.communicate(timeout=600)
        return started.returncode, said

    def dies(self, node: str) -> None:
        (self.at / f"{node}.dead").touch()

    def allow(self, *trials: int) -> None:
        """Let trials end that wait for it."""
        self.folder.mkdir(exist_ok=True)
        for trial in trials:
            (self.folder / f"go-{trial}").touch()

    @property
    def running(self) -> list[str]:
        """The trials whose last note is that they began."""
        last = {trial: what for what, trial, *_ in self.notes}
        return [trial for trial, what in last.items() if what == "begun"]

    def wait_for(self, true: Callable[[], bool]) -> None:
        def alive_and_true() -> bool:
            assert self.started[-1].poll() is None, self.started[-1].communicate()[0]
            return true()

        self.wait_until(alive_and_true)

    @staticmethod
    def wait_until(true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 600
        while not true():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    @property
    def notes(self) -> list[list[str]]:
        """What trials have noted: what, trial, node, hundredths of a second done."""
        path = self.folder / "notes"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def noted(self, what: str) -> list[str]:
        return [note[1] for note in self.notes if note[0] == what]

    @property
    def record(self) -> list[dict[str, Any]]:
        return [
            json.loads(line) for line in (self.folder / "trials.jsonl").read_text().splitlines()
        ]

    def ended(self, outcome: str) -> list[str]:
        return [
            line["trial"]
            for line in self.record
            if line["event"] == "ended" and line["outcome"] == outcome
        ]


@pytest.fixture
def sweep(tmp_path: Path) -> Iterator[Sweep]:
    sweep = Sweep(tmp_path)
    yield sweep
    for started in sweep.started:
        started.kill()
        with started:
            pass  # waits, and closes its pipe


TRIALS = [str(number) for number in range(12)]


def test_a_node_that_dies_half_way_costs_no_trial(sweep: Sweep) -> None:
    started = sweep.start(f"seed=range({len(TRIALS)})", "+lasts=15")
    sweep.wait_for(lambda: len(sweep.noted("reached")) >= 4)
    sweep.dies("n3")
    said, _ = started.communicate(timeout=600)
    assert started.returncode == 0, said
    assert sorted(sweep.noted("reached"), key=int) == TRIALS
    assert sorted(sweep.ended("reached"), key=int) == TRIALS
    assert {
        json.loads((sweep.folder / name / "summary.json").read_text())["status"] for name in TRIALS
    } == {"reached"}
    assert "node n3 is left out" in said
    (at,) = (place for place, line in enumerate(sweep.record) if line["event"] == "left_out")
    assert sweep.record[at]["node"] == "n3"
    assert {"n1", "n2", "n4"} == {
        node for line in sweep.record[at:] if line["event"] == "begun" for node in line["nodes"]
    }


def test_a_sweep_that_is_killed_and_then_stopped_goes_on_where_it_was(sweep: Sweep) -> None:
    words = ("seed=range(8)", "+lasts=5", "+waits=true")
    killed = sweep.start(*words)
    sweep.allow(0, 1)
    # Four at a time: the two that hold their nodes, and the two after those that have ended.
    sweep.wait_for(lambda: len(sweep.noted("begun")) == 6)
    killed.kill()
    sweep.wait_until(lambda: killed.poll() is not None)
    stopped = sweep.start(*words)
    sweep.allow(2, 3, 4)
    # Also where the kill left a trial no time for its last note: it begins again, all the same.
    sweep.wait_for(lambda: {"5", "6", "7"} <= {*sweep.running} and len(sweep.noted("reached")) == 5)
    stopped.terminate()
    said, _ = stopped.communicate(timeout=600)
    assert stopped.returncode == 130
    assert "stopped, by SIGTERM" in said
    assert sorted(sweep.noted("reached")) == ["0", "1", "2", "3", "4"]
    assert {"5", "6", "7"} <= {*sweep.noted("interrupted")}
    sweep.allow(5, 6, 7)
    code, said = sweep.run(*words)
    assert code == 0, said
    # Each has come to its end once, none that had was begun again, and none began anew.
    assert sorted(sweep.noted("reached")) == [str(number) for number in range(8)]
    for at, (what, trial, _, hundredths) in enumerate(sweep.notes):
        later = [note for note in sweep.notes[at + 1 :] if note[1] == trial]
        if what == "interrupted":
            assert (later[0][0], later[0][3]) == ("begun", hundredths)
        if what == "reached":
            assert later == []


def test_another_sweep_in_the_folder_is_refused_and_so_are_two_at_a_time(sweep: Sweep) -> None:
    with SweepRecord(sweep.folder):  # as long as a sweep lasts, it holds this
        code, said = sweep.run("seed=0,1", "+lasts=1")
    assert (code, "another sweep is running" in said) == (2, True)
    assert sweep.run("seed=0,1", "+lasts=1")[0] == 0
    code, said = sweep.run("seed=0,2", "+lasts=1")
    assert code == 2
    assert "holds a run of seed=1 (now seed=2)" in said
    assert sorted(sweep.noted("reached")) == ["0", "1"]


def test_how_a_trial_ends_decides_whether_it_is_made_again(sweep: Sweep) -> None:
    code, said = sweep.run("+does=diverges,misses,is-refused,crashes,ends", "+lasts=5")
    begun = collections.Counter(sweep.noted("begun"))
    assert begun == {"0": 1, "1": 1, "2": 1, "3": 3, "4": 1}
    outcomes = {line["trial"]: line["outcome"] for line in sweep.record if line["event"] == "ended"}
    assert outcomes == {
        "0": "diverged", "1": "exhausted", "2": "refused", "3": "failed", "4": "reached",
    }  # fmt: skip
    # The refused one is told in its own words, by the exit code of a refusal.
    assert code == 2
    assert "trial 2 refused: the trial does not like its words" in said
    # The crash was the trial's own: on three nodes, none of them left out.
    nodes = [
        line["nodes"]
        for line in sweep.record
        if line.get("trial") == "3" and line["event"] == "begun"
    ]
    assert len({node for (node,) in nodes}) == 3
    assert "left out" not in said


def test_on_aurora_a_trial_gets_the_launcher_and_the_cores_of_a_job(tmp_path: Path) -> None:
    """Real training on real MPI ranks; the stand-in for PALS refuses shared cores, a master that is
    not of the slice, and variables that are not Aurora's.
    """
    (tmp_path / "hosts").write_text("x1.site\nx2.site\nx3.site\n")
    fakes = {
        "PATH": f"{HERE / 'fakes'}:{os.environ['PATH']}",
        "FAKE_PALS_MPIEXEC": str(shutil.which("mpiexec")),
        "FAKE_PALS_RANKS": "2",
        "FAKE_PALS_FORKS": "yes",
        "FAKE_PALS_RECORD": str(tmp_path / "asked.json"),
    }
    done = forked.run(
        [
            sys.executable, "-m", "largebatch", "sweep", "task=digits", "batch.size=960",
            "budget.samples=1920", "engine.device=cpu", "hydra/launcher=parsl",
            "hydra.launcher.shape=nodes", "hydra.launcher.cluster=aurora",
            "hydra.launcher.nodes_per_trial=2", "hydra.launcher.hostfile=hosts",
            "hydra.launcher.poll_seconds=0.1", "hydra.sweep.dir=sweep",
        ],
        children=False,
        env=os.environ | fakes, cwd=tmp_path, timeout=600, capture_output=True, text=True,
    )  # fmt: skip
    log = tmp_path / "sweep" / "0" / "attempt-1.log"
    assert done.returncode == 0, done.stderr + (log.read_text() if log.exists() else "")
    summary = json.loads((tmp_path / "sweep" / "0" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("exhausted", 2)
    assert summary["data_parallel_size"] == 2
    asked = json.loads((tmp_path / "asked.json").read_text())
    assert (asked["n"], asked["ppn"]) == (24, 12)
    assert Path(asked["hostfile"]).read_text().split() == ["x1.site", "x2.site"]
