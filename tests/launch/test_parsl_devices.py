"""Trials on single devices, by Parsl's worker pools: real ones, on this machine."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import forked
import pytest

pytestmark = pytest.mark.skipif(find_spec("parsl") is None, reason="the extra parsl is missing")

HERE = Path(__file__).parent


def start(at: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    return forked.Popen(
        [
            sys.executable, "-m", "largebatch", "sweep", "task=digits", "hydra/launcher=parsl",
            "hydra.launcher.workers_per_node=2", "hydra.launcher.poll_seconds=0.1",
            "hydra.sweep.dir=sweep", *words,
        ],
        children=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, cwd=at, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def record(at: Path) -> list[dict[str, Any]]:
    lines = (at / "sweep" / "trials.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Sweeps that end with the test."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for sweep in started:
        sweep.kill()
        sweep.communicate()


def on_nodes(folder: Path, *nodes: str) -> tuple[list[str], dict[str, str]]:
    """Words and variables for a sweep whose pools a stand-in starts on nodes of these names."""
    (folder / "hosts").write_text("".join(f"{node}\n" for node in nodes))
    (folder / "clusters" / "cluster").mkdir(parents=True)
    cluster = "{name: here, scheduler: none, launcher: mpich, node: {ranks: 1}}"
    (folder / "clusters" / "cluster" / "here.yaml").write_text(cluster)
    words = [
        "hydra.launcher.cluster=here", "hydra.launcher.hostfile=hosts",
        f"--config-dir={folder / 'clusters'}",
    ]  # fmt: skip
    path = f"{HERE / 'parsl_fakes' / 'pools'}:{os.environ['PATH']}"
    return words, {"PATH": path, "FAKE_NODES": str(folder)}


@pytest.mark.matrix  # as the trials below, whose folders have names of all kinds
def test_a_worker_trains_a_trial(tmp_path: Path) -> None:
    # What started the pools has left its marks in them, and a trial is none of its ranks.
    words, environment = on_nodes(tmp_path, "n1.site")
    words += ["batch.size=64", "budget.samples=640", "engine.device=cpu"]
    sweep = start(tmp_path, *words, **environment)
    said, _ = sweep.communicate(timeout=600)
    assert sweep.returncode == 0, said
    assert "1 of 1 trials done" in said
    summary = json.loads((tmp_path / "sweep" / "0" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("exhausted", 10)
    ended = [line for line in record(tmp_path) if line["event"] == "ended"]
    assert {tuple(line["nodes"]) for line in ended} == {("n1",)}


@pytest.mark.matrix
def test_workers_of_a_killed_sweep_make_room_for_the_next(
    tmp_path: Path, killed: list[subprocess.Popen[str]]
) -> None:
    words = (
        f"hydra.launcher.command=[{sys.executable},-S,{HERE / 'parsl_trial.py'}]", "seed=0,1",
        "+lasts=300",
    )  # fmt: skip
    first = start(tmp_path, *words)
    killed.append(first)
    notes = tmp_path / "sweep" / "notes"
    deadline = time.monotonic() + 600
    while not (notes.exists() and notes.read_text().count("begun") == 2):
        assert time.monotonic() < deadline
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    first.kill()
    second = start(tmp_path, *words)
    said, _ = second.communicate(timeout=600)
    assert second.returncode == 0, said
    lines = [line.split() for line in notes.read_text().splitlines()]
    for trial in "01":
        story = [line for line in lines if line[1] == trial]
        assert [line[0] for line in story] == ["begun", "interrupted", "begun", "reached"]
        assert story[1][3] == story[2][3]


def test_pools_on_nodes_to_avoid_get_nothing(tmp_path: Path) -> None:
    pools: dict[bytes, Any] = {
        b"a": {"hostname": "n1.hsn.site"}, b"b": {"hostname": "n2"}, b"c": {"hostname": "n3"},
    }  # fmt: skip
    from largebatch.launch.sweeps.parsl_devices import OnlyOn

    choice = OnlyOn(str(tmp_path / "avoided"))
    assert set(choice.sort_managers(pools, set(pools))) == {b"a", b"b", b"c"}
    (tmp_path / "avoided").write_text("n1\nn3")
    assert choice.sort_managers(pools, {b"a", b"b", b"c"}) == [b"b"]
    assert choice.sort_managers(pools, {b"a", b"c"}) == []


@pytest.mark.matrix
def test_a_node_that_falls_silent_is_left_out_and_its_trial_made_elsewhere(
    tmp_path: Path, killed: list[subprocess.Popen[str]]
) -> None:
    words, environment = on_nodes(tmp_path, "n1.site", "n2.site")
    sweep = start(
        tmp_path, *words, "hydra.launcher.workers_per_node=1", "seed=range(4)",
        f"hydra.launcher.command=[{sys.executable},-S,{HERE / 'parsl_trial.py'}]", "+lasts=120",
        "hydra.launcher.lost_seconds=4", **environment,
    )  # fmt: skip
    killed.append(sweep)
    notes = tmp_path / "sweep" / "notes"
    deadline = time.monotonic() + 600
    while not (notes.exists() and "begun" in notes.read_text() and " n2 " in notes.read_text()):
        assert time.monotonic() < deadline
        assert sweep.poll() is None, sweep.communicate()[0]
        time.sleep(0.05)
    (tmp_path / "n2.site.dead").touch()
    said, _ = sweep.communicate(timeout=600)
    assert sweep.returncode == 0, said
    lines = [line.split() for line in notes.read_text().splitlines()]
    assert sorted(line[1] for line in lines if line[0] == "reached") == ["0", "1", "2", "3"]
    assert "node n2 is left out" in said
    ended = {line["trial"]: line["nodes"] for line in record(tmp_path) if line["event"] == "ended"}
    assert set(map(tuple, ended.values())) == {("n1",)}


def test_folders_and_trials_may_be_called_anything(tmp_path: Path) -> None:
    at = tmp_path / "données {a} & (b)"
    at.mkdir()
    words = (
        f"hydra.launcher.command=[{sys.executable},-S,{HERE / 'parsl_trial.py'}]", "seed=0",
        "hydra.sweep.subdir='try ${hydra.job.num}'",
    )  # fmt: skip
    sweep = start(at, *words)
    said, _ = sweep.communicate(timeout=600)
    assert sweep.returncode == 0, said
    summary = json.loads((at / "sweep" / "try 0" / "summary.json").read_text())
    assert summary["status"] == "reached"


def test_without_its_extra_parsl_is_named_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from largebatch.common.errors import ConfigError
    from largebatch.launch.sweeps.checks import checked
    from largebatch.launch.sweeps.launcher import make_backend
    from largebatch.launch.sweeps.record import SweepRecord

    monkeypatch.setitem(sys.modules, "parsl", None)
    with (
        SweepRecord(tmp_path) as record,
        pytest.raises(ConfigError, match=r"parsl: pip install 'largebatch\[parsl\]'"),
    ):
        make_backend(checked({}), None, record, tmp_path)
