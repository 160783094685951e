"""Loggers are guests: the environment's words count, and none of them ends a run."""

import json
import sys
from pathlib import Path

import pytest
from fixture_types import ReadRun, Train

RUN = ("task=digits", "optim=sgd", "optim.lr=0.05", "batch.size=64", "budget.samples=192",
       "target.loss=null", "evaluation.growth=100", "hydra.run.dir=run")  # fmt: skip


@pytest.mark.parametrize(("at", "samples"), [("start", 0), ("second line", 128), ("end", 192)])
def test_a_logger_that_fails_costs_itself_alone(
    at: str,
    samples: int,
    train: Train,
    read_run: ReadRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(*RUN, "logger._target_=own_loggers.Failing", f"+logger.at={at}") == 0
    lines, summary = read_run(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert summary["status"] == "exhausted"
    told = f"no server at the {at}"
    assert capsys.readouterr().err.count(told) == 1
    (event,) = map(json.loads, (tmp_path / "run" / "events.jsonl").read_text().splitlines())
    assert (event["kind"], event["samples"]) == ("logger_failed", samples)
    assert told in event["reason"]


def test_a_logger_that_is_not_installed_is_one_sentence(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert train(*RUN, "logger=wandb") == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "pip install 'largebatch[train]'" in told
    assert "logger=jsonl" in told
