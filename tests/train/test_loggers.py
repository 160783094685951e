"""Loggers are guests: the environment's words count, and none of them ends a run."""

import json
import sys
from pathlib import Path

import pytest
from fixture_types import ReadRun, Train

from largebatch.train.reporting.loggers import Wandb

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


def test_the_environments_mode_wins_and_a_resumed_run_keeps_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Online, the key would make it wait for a server that is not there."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (1, 2):
        logger = Wandb(folder, {"seed": 0}, "project")
        logger.log({"step": step, "loss": 1.0 / step})
        logger.finish({"status": "interrupted"})
    stored = [*(folder / "wandb").glob("offline-run-*/run-*.wandb")]
    first, *others = {file.stem.removeprefix("run-") for file in stored}
    assert stored
    assert not others
    assert (folder / "wandb" / "run_id").read_text().strip() == first
