"""How far a study is, told from its folder alone."""

import json
from pathlib import Path
from typing import Any

import pytest
from made_studies import ARGUMENTS, Killed, Simulate, Workers, make_protocol

from largebatch.records.record import RunFolder
from largebatch.study.command import main
from largebatch.study.protocol.conduct import conduct, owned
from largebatch.study.protocol.identity import check_grid, check_identity
from largebatch.study.protocol.status import read_status


def begin(folder: Path, simulate: Simulate, dies_at: int | None) -> None:
    """Run a study in the folder, or as much of it as comes before `dies_at` runs."""
    protocol = make_protocol()
    shared: dict[str, Any] = {"config": {"budget": {"samples": 2e4, "tokens": None}}}
    names = {f"optim={name}": protocol.optimizers[name] for name in protocol.study.optimizers}
    check_identity(folder, shared | names)
    check_grid(folder, protocol.study)
    if dies_at is None:
        conduct(protocol, folder, ARGUMENTS, Workers(folder, simulate))
        return
    with pytest.raises(Killed):
        conduct(protocol, folder, ARGUMENTS, Workers(folder, simulate, dies_at))


def test_a_study_that_was_cut_off_says_what_is_done_and_what_is_asked(
    tmp_path: Path, simulate: Simulate, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(tmp_path, simulate, dies_at=12)
    status = read_status(tmp_path)
    assert status.done == 12
    assert sum(row.running for row in status.rows) == 1  # the one that was being written
    assert sum(row.wanted for row in status.rows) >= 1
    assert 0 < status.fraction < 1
    assert not status.is_running
    capsys.readouterr()
    assert main(["status", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "in all 12 runs" in printed
    assert "at rest" in printed


def test_a_study_that_has_ended_is_done_in_every_point(tmp_path: Path, simulate: Simulate) -> None:
    begin(tmp_path, simulate, dies_at=None)
    status = read_status(tmp_path)
    assert status.fraction == 1.0
    assert status.seconds_left is None
    assert status.done == len(list(tmp_path.rglob("summary.json")))
    for row in status.rows:
        assert (row.points, row.points_done, row.running, row.wanted) == (3, 3, 0, 0)


def test_a_study_that_is_conducted_now_is_running(tmp_path: Path, simulate: Simulate) -> None:
    begin(tmp_path, simulate, dies_at=3)
    with owned(tmp_path):
        assert read_status(tmp_path).is_running


def test_looking_changes_nothing(tmp_path: Path, simulate: Simulate) -> None:
    begin(tmp_path, simulate, dies_at=5)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    read_status(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("content", [None, "{", json.dumps({"study": 3}), json.dumps({})])
def test_a_folder_without_a_study_is_refused_in_a_sentence(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "study.json").write_text(content)
    with RunFolder(tmp_path / "run", {"config.yaml": "seed: 0\n"}):
        pass
    assert main(["status", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(tmp_path) in said
