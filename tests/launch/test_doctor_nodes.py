"""Choosing nodes with spares: by ranks that met, and by asking each node for itself."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from preflight_ranks import quiet_port

from largebatch.launch.doctor.command import main

LINES = [f"node{n}.hsn.example.org" for n in range(5)]

# What mpiexec does for a probe: run the command on the node of a hostfile of one line. One node
# does not start anything, one does not answer, one has another program.
LAUNCHER = """#!/bin/bash
node=$(cut -d. -f1 "$1"); shift
case $node in
  node1) echo "node1: no route to host" >&2; exit 7 ;;
  node2) sleep 60 ;;
  node3) export PYTHONPATH=$OTHER_PROGRAM:$PYTHONPATH ;;
esac
LARGEBATCH_FAKE_NODE=$node PALS_RANKID=0 PALS_LOCAL_SIZE=1 PALS_LOCAL_RANKID=0 exec "$@"
"""


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The probe's command; `allocation` in the test's folder is the allocation's hostfile."""
    (tmp_path / "allocation").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    script = tmp_path / "launch"
    script.write_text(LAUNCHER, encoding="utf-8")
    script.chmod(0o755)
    record = tmp_path / "other" / "numpy-0.0.1.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: numpy\nVersion: 0.0.1\n", encoding="utf-8"
    )
    monkeypatch.setenv("OTHER_PROGRAM", str(tmp_path / "other"))
    monkeypatch.setenv("TMPDIR", "/tmp")
    monkeypatch.setattr(sys, "executable", forked.stand_in())
    monkeypatch.chdir(tmp_path)
    return f"{script} {{hostfile}}"


def test_each_node_is_asked_for_itself_and_the_bad_ones_are_left_out_by_name(
    launcher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--hostfile", "allocation", "--probe", launcher, "--timeout", "4", "--json"]
    assert main([*arguments, "--nodes", "2", "--hostfile-out", "good"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (tmp_path / "good").read_text(encoding="utf-8").split() == [LINES[0], LINES[4]]
    assert told["left_out"] == {
        "node1": "node-dead",
        "node2": "node-dead",
        "node3": "versions-differ",
    }
    words = {finding["nodes"][0]: finding["found"] for finding in told["findings"]}
    assert words["node1"] == "failed with exit code 7: node1: no route to host"
    assert words["node2"] == "has not answered within 4 s"
    assert words["node3"].startswith("numpy 0.0.1 (others ")


RACKS = [f"x41{rack}c0s{n}b0n0.hsn.example.org" for rack in "01" for n in (0, 1)]

# What mpiexec does over several nodes: all of them, or none where one is dead.
RACK_LAUNCHER = """#!/bin/bash
hosts=$2; echo "$1: $(cut -d. -f1 "$hosts" | tr '\\n' ' ')" >> asked; shift 2
grep -q x411c0s1 "$hosts" && exit 7
for node in $(cut -d. -f1 "$hosts"); do
  LARGEBATCH_FAKE_NODE=$node PALS_RANKID=0 PALS_LOCAL_SIZE=1 PALS_LOCAL_RANKID=0 "$@" &
done
wait
"""


def test_a_rack_is_asked_by_one_launch_and_again_by_node_where_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "allocation").write_text("\n".join(RACKS), encoding="utf-8")
    (tmp_path / "launch").write_text(RACK_LAUNCHER, encoding="utf-8")
    (tmp_path / "launch").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", "/tmp")
    monkeypatch.setattr(sys, "executable", forked.stand_in())
    arguments = ["--hostfile", "allocation", "--nodes", "3", "--hostfile-out", "good", "--json"]
    assert main([*arguments, "--probe", f"{tmp_path}/launch {{nodes}} {{hostfile}}"]) == 0
    assert (tmp_path / "good").read_text(encoding="utf-8").split() == RACKS[:3]
    assert json.loads(capsys.readouterr().out)["left_out"] == {"x411c0s1b0n0": "node-dead"}
    asked = (tmp_path / "asked").read_text(encoding="utf-8").splitlines()
    assert sorted(asked) == [
        "1: x411c0s0b0n0 ", "1: x411c0s1b0n0 ",
        "2: x410c0s0b0n0 x410c0s1b0n0 ", "2: x411c0s0b0n0 x411c0s1b0n0 ",
    ]  # fmt: skip
    assert [path.name for path in tmp_path.glob(".probe-*")] == []


def test_too_few_good_nodes_write_nothing_and_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "allocation").write_text("\n".join(LINES[:2]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    arguments = ["--hostfile", "allocation", "--nodes", "1", "--hostfile-out", "good"]
    assert main([*arguments, "--probe", "/no/launcher"]) == 1
    said = capsys.readouterr()
    assert "node0: node-dead; node1: node-dead" in said.err
    assert "cannot be asked: /no/launcher: No such file" in said.out
    assert not (tmp_path / "good").exists()


def test_ranks_that_met_leave_out_the_node_that_did_not_come(tmp_path: Path) -> None:
    """Three nodes of which one never starts; the command itself, by processes of its own."""
    (tmp_path / "allocation").write_text("\n".join(LINES[:3]), encoding="utf-8")
    command = [sys.executable, "-m", "largebatch", "doctor", "--timeout", "3", "--json"]
    command += ["--nodes", "2", "--hostfile-out", "good"]
    port = quiet_port()
    ranks = []
    for rank in (0, 2):
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": "3",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": socket.gethostname(),
            "MASTER_PORT": str(port),
            "PBS_NODEFILE": str(tmp_path / "allocation"),
            "LARGEBATCH_FAKE_NODE": f"node{rank}",
            "TMPDIR": "/tmp",
            # A name server that does not answer is none of this test's business.
            "RES_OPTIONS": "timeout:1 attempts:1",
        }
        ranks.append(
            forked.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        )
    said = [rank.communicate(timeout=600)[0] for rank in ranks]
    told = json.loads(said[0])
    silent = [finding for finding in told["findings"] if finding["code"] == "rank-silent"]
    assert [finding["nodes"] for finding in silent] == [["node1"]]
    assert said[1] == ""  # rank 0 speaks for all
    # One machine plays all nodes: where its name is its loopback, that is an error of its own.
    if any(finding["code"] == "master-loopback" for finding in told["findings"]):
        assert "master-loopback" in told["too_few_nodes"]
        assert [rank.returncode for rank in ranks] == [1, 1]
    else:
        assert told["nodes"] == [LINES[0], LINES[2]]
        assert told["left_out"] == {"node1": "rank-silent"}
        assert [rank.returncode for rank in ranks] == [0, 0]
