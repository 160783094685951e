"""Metrics beside the loss: summed over batches and ranks, recorded, drawn from, aimed at."""

import json
import math
from pathlib import Path

import pytest
import torch
from fixture_types import ReadRun, Train
from gloo_ranks import launch, one_thread, successful
from metric_ranks import work
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from largebatch.conf.config import TargetConfig
from largebatch.distributed.ranks import Ranks
from largebatch.records.summary import read_summary
from largebatch.records.target import Target
from largebatch.train.engines.ddp import DDP
from largebatch.train.models import MLP
from largebatch.train.tasks import Batch
from largebatch.train.tasks.digits import Digits
from largebatch.train.tasks.metrics import MetricSums, one_pass

RUN = ("task=digits", "batch.size=64", "optim.lr=0.01", "hydra.run.dir=run")


def test_metrics_are_the_same_on_one_rank_and_on_two(tmp_path: Path) -> None:
    """1,437 samples: batches of 718 leave the second rank none for its last."""
    with one_thread():
        alone = successful([launch(work, [400], 1, tmp_path)[0]["400"]])[0]
    jobs = [400, 718]
    ranks = launch(work, jobs, 2, tmp_path)
    for job in jobs:
        one, other = successful([found[str(job)] for found in ranks])
        assert one == other
        assert (one["accuracy"], one["even"]) == (alone["accuracy"], alone["even"])
        assert one["margin"] == pytest.approx(alone["margin"], rel=1e-7)
    torch.manual_seed(0)
    task, model = Digits(), MLP(64, 8, 10)
    with torch.no_grad():
        labels = task._labels
        right = model(task._images).argmax(1) == labels
    assert alone["accuracy"] == int(right.sum()) / 1437
    assert alone["even"] == int(right[labels % 2 == 0].sum()) / int((labels % 2 == 0).sum())


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = nn.Linear(64, 10), 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(images)


class InPlace(Digits):
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model(batch[0]).mul_(-1), batch[1])


class OtherInput(Digits):
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model(batch[0] + 0.0), batch[1])


class Views(Digits):
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model(batch[0].flatten(1)), batch[1])


class Written(Digits):
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss = cross_entropy(model(batch[0]), batch[1])
        batch[0].mul_(-1)
        return loss


TASKS = [(Digits(), 1), (Views(), 1), (InPlace(), 2), (OtherInput(), 2), (Written(), 2)]


@pytest.mark.parametrize(("task", "calls"), TASKS)
def test_loss_and_metrics_of_one_output_take_one_pass(task: Digits, calls: int) -> None:
    model = Counting()
    engine, batch = (
        DDP(model, Ranks(), torch.device("cpu")),
        task.train_batch(torch.arange(9).numpy()),
    )
    with torch.no_grad():
        _, metrics = engine.evaluate(task, batch)
        assert model.calls == calls
        right = model.inner(batch[0]).argmax(1) == batch[1]
    assert metrics["accuracy"] == (int(right.sum()), 9)
    assert "forward" not in vars(model)
    assert model(batch[0]).shape == (9, 10)


def test_a_pass_within_a_pass_leaves_the_model_as_it_was() -> None:
    model = Counting()
    own = model.forward
    with one_pass(model), one_pass(model):
        images = torch.zeros(1, 64)
        assert model(images) is model(images)
    assert model.forward == own


def test_a_metric_of_no_samples_is_no_number() -> None:
    sums = MetricSums(torch.device("cpu"))
    assert sums.means(1) == {}
    sums.add({"even": (torch.tensor(0), torch.tensor(0)), "x": (math.nan, 1)}, counts=False)
    assert math.isnan(sums.means(1)["even"])
    sums.add({"even": (torch.tensor(0), torch.tensor(0)), "x": (2, 4.0)}, counts=True)
    assert sums.means(1)["x"] == 0.5


def test_a_run_ends_where_its_metric_reaches_the_target(
    train: Train, read_run: ReadRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*RUN, "target.metric=accuracy", "target.value=0.9") == 0
    lines, summary = read_run(tmp_path / "run")
    evaluated = [line for line in lines if "eval_loss" in line]
    found = [line["eval_accuracy"] for line in evaluated]
    assert found[-1] >= 0.9 > max(found[:-1])
    assert evaluated[-1] is lines[-1]
    assert (summary["status"], summary["target_loss"]) == ("reached", None)
    assert summary["metrics"] == {"accuracy": found[-1]}
    assert summary["steps_to_target"] == lines[-1]["step"]
    before, after = evaluated[-2], evaluated[-1]
    share = (0.9 - before["eval_accuracy"]) / (after["eval_accuracy"] - before["eval_accuracy"])
    crossed = before["step"] * (after["step"] / before["step"]) ** share
    assert summary["steps_to_target_interpolated"] == pytest.approx(crossed, rel=1e-9)
    read = read_summary(tmp_path / "run" / "summary.json")
    assert (read.target, read.metrics) == (Target("accuracy", 0.9, "max"), summary["metrics"])
    told = capsys.readouterr()
    assert "target accuracy 0.9" in told.err
    assert f"reached accuracy 0.9 after {lines[-1]['step']} steps" in told.out
    assert f"accuracy {found[-1]:.4f}" in told.out


def test_a_target_that_is_missed_is_one_of_the_metric(train: Train, tmp_path: Path) -> None:
    words = ("target.metric=accuracy", "target.value=0.1", "target.direction=min")
    assert train(*RUN, *words, "budget.samples=128", "optim.lr=1e-9") in (0, 3)
    assert train(*RUN[:-1], "hydra.run.dir=b", "target.metric=accuracy", "target.value=2",
                 "budget.samples=128") == 3  # fmt: skip
    summary = json.loads((tmp_path / "b" / "summary.json").read_text())
    assert (summary["status"], summary["target_value"]) == ("exhausted", 2)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["task=digits", "target.metric=recall"], ["target.metric=recall", "accuracy"]),
        (["task=bytes", "task.num_bytes=65536", "task.num_eval=64", "target.metric=accuracy"],
         ["target.metric=accuracy", "no metrics", "metrics(model, batch)"]),
    ],
)  # fmt: skip
def test_a_target_that_is_no_metric_of_the_task_is_refused(
    words: list[str], named: list[str], train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*words, "target.value=0.5", "hydra.run.dir=run") == 2
    told = capsys.readouterr().err
    assert all(word in told for word in named), told
    assert told.count("\n") == 1


def test_a_metric_takes_the_place_of_a_tasks_own_loss_target() -> None:
    assert TargetConfig(loss=0.1).aim == Target("loss", 0.1)
    config = TargetConfig(loss=0.1, metric="accuracy", value=0.97)
    assert (config.loss, config.aim) == (None, Target("accuracy", 0.97, "max"))
    assert TargetConfig(metric="word_error", value=0.1).aim == Target("word_error", 0.1, "min")
    assert TargetConfig(metric="shine", value=1, direction="max").aim == Target("shine", 1, "max")
    assert TargetConfig(metric="loss", value=0.2).aim == Target("loss", 0.2)
    assert not Target("accuracy", 0.5, "max").is_met(math.nan)
