"""Which node leaves a job that is started again, and which takes its place."""

from pathlib import Path

import pytest

from largebatch.launch.doctor.preflight.nodes import choose, remembered
from largebatch.launch.watch.nodes import Faults, Nodes

LINES = [f"x400{n}c0s0b0n0.hsn.site" for n in range(4)]
NAMES = [line.partition(".")[0] for line in LINES]


def nodes_of(folder: Path, *spares: str) -> Nodes:
    (folder / "nodes").write_text("\n".join(LINES))
    (folder / "spares").write_text("\n".join(spares))
    return Nodes(folder / "nodes", folder / "spares", folder / "bad")


def faults_of(*lines: str) -> Faults:
    faults = Faults()
    for line in lines:
        faults.look(line)
    return faults


LOST = f"ping failed on {NAMES[0]}: No reply from {LINES[2]} after 97s"
KILLED = f"{LINES[1]}: rank 13 died from signal 9"
ECHO = f"{LINES[3]}: rank 40 died from signal 15"
ELSEWHERE = "ping RPC timeout from x4999c0s0b0n0.hsn.site after 120s"


@pytest.mark.parametrize(
    ("lines", "silent", "out"),
    [
        ([KILLED, LOST, ECHO], [], [2]),  # what is lost has killed the others
        ([KILLED, f"{LINES[2]}: rank 25 died from signal 11", ECHO], [], [1]),  # the first
        ([ECHO, ELSEWHERE], [], []),
        ([f"{LINES[0]}: shepherd died from signal 9", LOST], [], [0, 2]),
        ([KILLED], [40, 41], [3]),  # of 48 ranks
        ([], [*range(48)], []),  # all are silent: no node's own fault
        (["torch.OutOfMemoryError"], [], []),
    ],
)
def test_who_is_to_blame_leaves_and_a_spare_takes_the_same_place(
    lines: list[str], silent: list[int], out: list[int], tmp_path: Path
) -> None:
    nodes = nodes_of(tmp_path, "spare1.hsn.site", "spare2.hsn.site")
    told = nodes.take_out(faults_of(*lines), silent, 48)
    expected, spares = [*LINES], iter(["spare1.hsn.site", "spare2.hsn.site"])
    for place in out:
        expected[place] = next(spares)
    assert (tmp_path / "nodes").read_text().split() == expected
    bad = (tmp_path / "bad").read_text().splitlines() if out else []
    assert [line.split()[0] for line in bad] == [NAMES[place] for place in out]
    assert len(told) == len(out)


def test_without_a_spare_a_node_keeps_its_place_and_is_remembered(tmp_path: Path) -> None:
    nodes = nodes_of(tmp_path)
    (told,) = nodes.take_out(faults_of(LOST), [], 48)
    assert told.startswith(f"no spare is left for {NAMES[2]} (ping failed on")
    assert (tmp_path / "nodes").read_text().split() == LINES
    assert (tmp_path / "bad").read_text().split()[0] == NAMES[2]


def test_the_ranks_meet_on_whatever_node_is_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = nodes_of(tmp_path, "spare1.hostmgmt.site")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert nodes.environment == {}  # the ranks tell it themselves
    monkeypatch.setenv("MASTER_ADDR", f"{NAMES[0]}.fast")
    monkeypatch.setenv("LARGEBATCH_HSN_SUFFIX", "fast")
    assert nodes.environment == {"MASTER_ADDR": f"{NAMES[0]}.fast"}
    nodes.take_out(faults_of(f"ping RPC timeout from {LINES[0]}"), [], 48)
    assert nodes.environment == {"MASTER_ADDR": "spare1.fast"}
    monkeypatch.delenv("LARGEBATCH_HSN_SUFFIX")
    assert nodes.environment == {"MASTER_ADDR": "spare1.hostmgmt.site"}


def test_nodes_that_an_earlier_job_took_out_come_last(tmp_path: Path) -> None:
    assert remembered(tmp_path / "bad") == []
    (tmp_path / "bad").write_text(f"{NAMES[0]} {LOST}\n{NAMES[0]} again\n{NAMES[3]} {KILLED}\n")
    choice = choose(LINES, remembered(tmp_path / "bad"), 1)
    assert choice.lines == (LINES[1],)
    assert choice.spares == (LINES[2], LINES[0], LINES[3])
    # There are no others: by now they may be mended.
    assert set(choose(LINES, remembered(tmp_path / "bad"), 4).lines) == set(LINES)
