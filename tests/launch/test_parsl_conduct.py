"""What a sweep decides: whose fault a failure is, what can still end before the walltime."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from largebatch.common.errors import ConfigError
from largebatch.conf.cluster_config import ClusterConfig, NodeConfig
from largebatch.distributed.walltime import end_of_job
from largebatch.launch.sweeps.checks import checked
from largebatch.launch.sweeps.record import SweepRecord, Trial, is_busy
from largebatch.launch.sweeps.scheduler import NodeHealth, SweepProgress, TrialScheduler
from largebatch.launch.sweeps.slices import Slices, nodes_here

HERE = Path(__file__).parent


def test_a_node_is_at_fault_where_its_trials_end_elsewhere() -> None:
    health = NodeHealth()
    health.record_failure("t1", ["n1"])
    health.record_failure("t2", ["n1"])
    assert health.doubtful == {"n1"}
    assert health.newly_left_out() == set()
    health.record_success("t1", ["n2"])
    assert health.doubtful == {"n1"}
    health.record_success("t2", ["n2"])
    assert health.newly_left_out() == {"n1"}
    assert health.newly_left_out() == set()  # is told once


def test_nodes_are_forgiven_a_trial_that_fails_everywhere() -> None:
    health = NodeHealth()
    for trial in ("t1", "t2", "t3"):
        for node in ("n1", "n2"):
            health.record_failure(trial, [node])
    assert health.doubtful == {"n1", "n2"}
    for trial in ("t1", "t2", "t3"):
        health.forgive(trial)
    assert health.doubtful == set()
    assert health.newly_left_out() == set()


def test_a_trial_that_ends_where_it_failed_blames_nobody() -> None:
    health = NodeHealth()
    for trial in ("t1", "t2", "t3"):
        health.record_failure(trial, ["n1", "n2"])
        health.record_success(trial, ["n1", "n3"])
    assert health.faults == {"n2": 3}


class Bench:
    """A sweep over slices of nodes that are not there, without Hydra."""

    def __init__(self, folder: Path, num_nodes: int, nodes_per_trial: int = 1) -> None:
        self.folder = folder / "sweep"
        self.folder.mkdir()
        self.cluster = ClusterConfig(
            name="here", scheduler="none", launcher="mpich", node=NodeConfig(ranks=1)
        )
        self.nodes = [f"n{number}" for number in range(1, num_nodes + 1)]
        self.nodes_per_trial = nodes_per_trial

    def run(self, num_trials: int, lasts: int, seconds: float | None = None, **keys: int) -> float:
        """Make the sweep; returns the seconds that it took. `seconds`: until its walltime."""
        settings = checked({"poll_seconds": 0.02, "shape": "nodes"} | keys)
        trials = []
        for number in range(num_trials):
            words = (
                f"+lasts={lasts}", f"hydra.sweep.dir={self.folder}", f"hydra.sweep.subdir={number}",
            )  # fmt: skip
            command = (sys.executable, "-S", str(HERE / "parsl_trial.py"), *words)
            folder = self.folder / str(number)
            trials.append(Trial(number, words, command, str(number), folder))
        begin = time.time()
        slices = Slices(self.cluster, self.nodes, self.nodes_per_trial, self.folder)
        with SweepRecord(self.folder) as record:
            end = None if seconds is None else begin + seconds
            silence = SweepProgress(num_trials, silent=True)
            conductor = TrialScheduler(trials, slices, record, NodeHealth(), settings, end, silence)
            self.outcomes = {name: outcome.status for name, outcome in conductor.run().items()}
        return time.time() - begin

    def noted(self, what: str) -> list[list[str]]:
        lines = (self.folder / "notes").read_text().splitlines()
        return [line.split()[1:] for line in lines if line.startswith(what)]


@pytest.fixture(autouse=True)
def _fake_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{HERE / 'parsl_fakes'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_NODES", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def test_a_sweep_stops_before_the_walltime_and_goes_on_in_the_next_job(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 2)
    took = bench.run(3, lasts=300, seconds=4.0, stop_before_walltime=2)
    assert took >= 2.0
    assert bench.outcomes == {}
    stopped = bench.noted("interrupted")
    assert len(stopped) == 2
    bench.run(3, lasts=300)
    assert set(bench.outcomes.values()) == {"reached"}
    begun = {trial: hundredths for trial, _, hundredths in bench.noted("begun")}
    assert {trial: hundredths for trial, _, hundredths in stopped}.items() <= begun.items()


def test_no_trial_is_begun_that_would_not_end(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 1)
    begin = time.time()
    bench.run(9, lasts=100, seconds=6.0, stop_before_walltime=2)  # one takes a second and more
    lines = [json.loads(line) for line in (bench.folder / "trials.jsonl").read_text().splitlines()]
    longest, num_begun = 0.0, 0
    for line in lines:
        if line["event"] == "begun":
            num_begun += 1
            assert (
                num_begun == 1 or line["time"] + longest <= begin + 5
            )  # with what a busy machine adds
        elif line["event"] == "ended":
            longest = max(longest, line["seconds"])
    assert 1 <= num_begun < 4


def test_a_dead_node_leaves_its_slice_and_the_others_go_on(tmp_path: Path) -> None:
    (tmp_path / "n2.dead").touch()
    bench = Bench(tmp_path, 4, nodes_per_trial=2)
    bench.run(4, lasts=10)
    assert set(bench.outcomes.values()) == {"reached"}
    lines = [json.loads(line) for line in (bench.folder / "trials.jsonl").read_text().splitlines()]
    assert [line["node"] for line in lines if line["event"] == "left_out"] == ["n2"]
    ended = [set(line["nodes"]) for line in lines if line.get("outcome") == "reached"]
    assert {"n1", "n3", "n4"} >= set().union(*ended)
    assert any("n1" in nodes for nodes in ended)


def test_a_sweep_without_nodes_says_so(tmp_path: Path) -> None:
    for node in ("n1", "n2"):
        (tmp_path / f"{node}.dead").touch()
    bench = Bench(tmp_path, 2)
    bench.run(3, lasts=10)
    assert set(bench.outcomes.values()) == {"failed"}
    assert not (bench.folder / "notes").exists()
    with pytest.raises(ConfigError, match="at most 2, the nodes that are here, got 3"):
        Slices(bench.cluster, bench.nodes, 3, bench.folder)


def test_a_record_that_was_cut_off_within_a_line_goes_on(tmp_path: Path) -> None:
    with SweepRecord(tmp_path) as record:
        record.write("begun", trial="0", attempt=1, nodes=["n1"], words=["seed=0"])
    with (tmp_path / "trials.jsonl").open("a") as file:
        file.write('{"event": "ended", "tri')
    with SweepRecord(tmp_path) as record:
        assert record.attempts == {"0": 1}
        record.write("begun", trial="0", attempt=2, nodes=["n2"], words=["seed=0"])
    lines = (tmp_path / "trials.jsonl").read_text().splitlines()
    assert [json.loads(line)["attempt"] for line in lines] == [1, 2]


def test_a_run_that_somebody_is_at_is_busy(tmp_path: Path) -> None:
    from largebatch.common.files import lock

    assert not is_busy(tmp_path)
    with (tmp_path / "metrics.jsonl").open("w") as file:
        assert lock(file.fileno())
        assert is_busy(tmp_path)
    assert not is_busy(tmp_path)


def test_the_walltime_is_what_the_job_says(tmp_path: Path) -> None:
    nodes = tmp_path / "nodes"
    nodes.write_text("n1\n")
    os.utime(nodes, (1000.0, 1000.0))
    assert end_of_job(None, {}) is None
    assert end_of_job(None, {"PBS_WALLTIME": "3600", "PBS_NODEFILE": str(nodes)}) == 4600.0
    assert end_of_job(None, {"SLURM_JOB_ID": "1", "SLURM_JOB_END_TIME": "5000"}) == 5000.0
    assert end_of_job(60, {"SLURM_JOB_END_TIME": "5000"}) == pytest.approx(time.time() + 60, abs=5)


def test_nodes_are_those_of_the_job_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nodes").write_text("n1\nn1\nn2\n")
    monkeypatch.setenv("PBS_NODEFILE", str(tmp_path / "nodes"))
    assert nodes_here(None) == ["n1", "n2"]
    (tmp_path / "mine").write_text("n2\n")
    assert nodes_here(str(tmp_path / "mine")) == ["n2"]
    with pytest.raises(ConfigError, match="No such file"):
        nodes_here(str(tmp_path / "none"))
