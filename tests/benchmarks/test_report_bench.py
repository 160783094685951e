"""`largebatch bench report`: the runs that it makes up are read as real ones are."""

from pathlib import Path

import pytest

from largebatch.benchmarks import command
from largebatch.benchmarks.report import BATCH_SIZES, OPTIMIZERS, write_runs
from largebatch.study.reading import read_runs


def test_runs_are_made_up_that_can_all_be_read(tmp_path: Path) -> None:
    write_runs(tmp_path / "runs", 600)
    runs, problems = read_runs(tmp_path / "runs")
    assert (len(runs), problems) == (600, [])
    places = {(run.optimizer, run.batch_size) for run in runs}
    assert len(places) == OPTIMIZERS * len(BATCH_SIZES)
    assert all(run.conclusive and run.config for run in runs)


def test_too_few_runs_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["report", "--runs", "10"]) == 2
    assert "--runs must be 1000 or more, got 10" in capsys.readouterr().err
