"""`largebatch bench study`: a real study, and as many steps in a bare loop."""

import json
import sys
from pathlib import Path

import forked
import pytest
from omegaconf import OmegaConf

from largebatch.benchmarks import study
from largebatch.study.costs import StudyCost

SMALL = (
    "study=digits", "study.optimizers=[sgd]", "study.batch_sizes=[32,64]", "study.rules=[]",
    "study.search=[lr]", "study.select_seeds=[0]", "study.report_seeds=[]", "target.loss=1",
    "study.start_batch=32",
)  # fmt: skip


def test_all_steps_of_a_study_are_made_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", forked.stand_in())
    made = study.made(SMALL, tmp_path / "study")
    runs = [json.loads(path.read_text()) for path in tmp_path.rglob("summary.json")]
    steps = study.steps_of(tmp_path / "study")
    assert made.cost.runs == len(runs) > 4
    assert sum(steps.values()) == sum(run["steps"] for run in runs)
    assert len(steps) == 2
    for folder in steps:
        size = json.loads((folder / "summary.json").read_text())["batch_size"]
        rates = [run["lr"] for run in runs if run["batch_size"] == size]
        config = OmegaConf.load(folder / ".hydra" / "config.yaml")
        assert config.optim.lr == min(rates)
    loops = {folder: study.prepared(folder) for folder in steps}
    first, *_ = loops.values()
    before = first.evaluate()
    assert study.bare_seconds(steps, loops) > 0
    assert first.evaluate() < before


def test_the_parts_of_a_study_are_all_of_it() -> None:
    cost = StudyCost(10, 20.0, 5.0, 1.0, 26.0)
    parts = study.seconds_of(study.Made(30.0, 15.0, cost))
    assert parts == {
        "its steps": 7.0, "evaluations": 2.5, "records": 0.5, "between runs": 3.0,
        "start and end": 2.0, "study": 15.0,
    }  # fmt: skip


def test_a_study_that_fails_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="study=none_such ended with 2"):
        study.made(["study=none_such"], tmp_path)
