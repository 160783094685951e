"""Jobs that outlive their nodes and know their end: scripts of `largebatch submit` with real ranks
behind the fake PBS and PALS, nodes killed, the batch system's TERM in the middle.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from fake_cluster import AURORA, SMALL, Cluster, read

from largebatch.distributed.addresses import free_port
from largebatch.records.checkpoints import listed
from largebatch.train.checkpoints.export import weights
from largebatch.train.checkpoints.files import read_state

STEPS = 400
TRAIN = [*SMALL, "optim=lamb", "batch.size=24", f"budget.samples={24 * STEPS}",
         "checkpoint.every_samples=960"]  # fmt: skip


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    cluster = Cluster(tmp_path)
    cluster.environment["FAKE_PALS_WELL"] = "yes"
    return cluster


def steps_of(record: Path) -> list[dict[str, Any]]:
    """What each step has seen, and come to."""
    lines = map(json.loads, (record / "metrics.jsonl").read_text().splitlines())
    return [{key: line[key] for key in ("step", "samples", "loss", "grad_norm")} for line in lines]


def last_weights(record: Path) -> dict[str, torch.Tensor]:
    last = listed(record)[-1]
    return weights(last, read_state(last)["saved_by"])


def wait_for_steps(record: Path, steps: int) -> None:
    deadline = time.monotonic() + 600
    lines = record / "metrics.jsonl"
    while not lines.exists() or lines.read_text().count("\n") < steps:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_three_nodes_that_die_in_one_job_cost_no_sample(cluster: Cluster, tmp_path: Path) -> None:
    drawn = random.Random(14)
    steps = sorted(drawn.sample(range(20, STEPS - 100), 3))
    kills = tmp_path / "kills"
    kills.write_text("".join(f"{step} {drawn.randrange(2)}\n" for step in steps))
    kills.with_suffix(".dead").touch()
    cluster.environment["FAKE_PALS_KILLS"] = str(kills)
    sent = cluster.submit(
        *AURORA, "cluster.queue=debug-scaling", "cluster.nodes=2", "cluster.spares=3",
        "cluster.restarts=3", "folder=jobs/a", "--", "train", *TRAIN,
    )  # fmt: skip
    assert sent.returncode == 0, sent.stderr
    done = cluster.run(0)
    dead = kills.with_suffix(".dead").read_text().split()
    assert (done.returncode, len(dead)) == (0, 3), done.stdout + done.stderr
    assert kills.read_text() == ""
    # Who was taken out is who was killed, and the spares come in their order.
    nodes = [f"x4{node:04}c0s0b0n0" for node in range(5)]
    folder = cluster.work / "jobs" / "a"
    taken_out = (folder / "bad_nodes").read_text().splitlines()
    assert [line.split()[0] for line in taken_out] == dead
    for spare, node in zip(nodes[2:], dead, strict=True):
        assert f"{spare} takes the place of {node} (ping failed on" in done.stderr
    left = [host.partition(".")[0] for host in (folder / "nodes.1000.pbs.good").read_text().split()]
    assert set(left) == set(nodes) - set(dead)

    whole = tmp_path / "whole"
    undisturbed = [sys.executable, "-m", "largebatch", "train", *TRAIN, f"hydra.run.dir={whole}"]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        forked.Popen(
            undisturbed,
            env=os.environ | world | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )
        for rank in "01"
    ]
    assert forked.all_ended(ranks) is None
    record = folder / "run"
    assert (read(record)["status"], read(record)["samples"]) == ("exhausted", 24 * STEPS)
    assert steps_of(record) == steps_of(whole)
    expected = last_weights(whole)
    found = last_weights(record)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert len(list((record / ".hydra").glob("resumed-*-config.yaml"))) >= 1


SIZES = (1, 2, 8, 256, 2048, 10624)
ANY_SIZE = pytest.mark.parametrize(
    "nodes", [2, *(pytest.param(n, marks=pytest.mark.matrix) for n in SIZES if n != 2)]
)


def queue_of(nodes: int) -> str:
    return "prod" if nodes > 256 else "debug-scaling" if nodes > 1 else "debug"


@pytest.mark.matrix
@pytest.mark.parametrize("nodes", [1, 8, 255, 2048])  # the queues take 256 with the spare
def test_a_node_that_dies_in_a_job_of_any_size_costs_no_sample(
    cluster: Cluster, tmp_path: Path, nodes: int
) -> None:
    batch, steps = 12 * nodes, 30
    kills = tmp_path / "kills"
    kills.write_text("17 0\n")
    kills.with_suffix(".dead").touch()
    cluster.environment["FAKE_PALS_KILLS"] = str(kills)
    cluster.environment["FAKE_PALS_RANKS"] = "2"
    sent = cluster.submit(
        *AURORA, f"cluster.queue={queue_of(nodes)}", f"cluster.nodes={nodes}", "cluster.spares=1",
        "cluster.restarts=1", "folder=jobs/a", "--", "train", *SMALL, f"batch.size={batch}",
        f"budget.samples={steps * batch}", f"checkpoint.every_samples={4 * batch}",
    )  # fmt: skip
    assert sent.returncode == 0, sent.stderr
    done = cluster.run(0)
    dead = kills.with_suffix(".dead").read_text().split()
    assert (done.returncode, len(dead)) == (0, 1), done.stdout + done.stderr
    record = cluster.work / "jobs" / "a" / "run"
    assert [line["step"] for line in steps_of(record)] == [*range(1, steps + 1)]
    assert (cluster.work / "jobs" / "a" / "bad_nodes").read_text().split()[0] == dead[0]


@ANY_SIZE
def test_a_job_that_is_told_to_end_saves_tidies_up_and_keeps_the_runs_exit_code(
    cluster: Cluster, nodes: int
) -> None:
    cluster.environment["FAKE_PALS_RANKS"] = "2"
    many = 12 * nodes * 10**6
    sent = cluster.submit(
        *AURORA, f"cluster.queue={queue_of(nodes)}", f"cluster.nodes={nodes}",
        "cluster.daos=pool:box", "folder=jobs/a", "--", "train", *TRAIN,
        f"batch.size={12 * nodes}", f"budget.samples={many}", f"checkpoint.every_samples={many}",
    )  # fmt: skip
    assert sent.returncode == 0, sent.stderr
    record = cluster.work / "jobs" / "a" / "run"
    job = cluster.begin(0)
    wait_for_steps(record, 20)
    job.send_signal(signal.SIGTERM)  # to the script's shell alone
    said, errors = job.communicate(timeout=600)
    assert job.returncode == 128 + signal.SIGTERM, said + errors
    assert said.endswith("largebatch: exit code 143, record in jobs/a/run\n")
    notes = (cluster.jobs / "notes").read_text().splitlines()
    assert notes[-2:] == ["launch-dfuse-with-caching.sh pool:box", "clean-dfuse.sh pool:box"]
    summary = read(record)
    assert (summary["status"], summary["signal"]) == ("interrupted", signal.SIGTERM)
    (saved,) = listed(record)
    assert int(saved.name.removeprefix("samples-")) == summary["samples"]
