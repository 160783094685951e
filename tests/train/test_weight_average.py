"""The average of the weights: its formulas, what is evaluated, saved, resumed, exported, scaled."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixture_types import Command
from torch import nn

from largebatch.conf.weights_config import AverageConfig
from largebatch.train.weights.average import WeightAverage

Train = Callable[..., int]
LR = (0.1, 0.2, 0.0, 0.3)


def trajectory(kind: str, steps: int = 4) -> tuple[list[np.ndarray[Any, Any]], WeightAverage, Any]:
    """The points at which gradients were taken, of f(w) = ‖w - 1‖² / 2 by gradient descent."""
    model = nn.Linear(3, 1, bias=False).double()
    model.weight.data = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64)
    average = WeightAverage(AverageConfig(kind=kind, decay=0.7, interpolation=0.6), model)
    points = []
    for lr in LR[:steps]:
        points.append(model.weight.detach().numpy().copy())
        grad = model.weight.detach() - 1
        with average.step(lr), torch.no_grad():
            model.weight -= lr * grad
    return points, average, model


def reference(kind: str) -> tuple[list[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """The papers' recursions in x, y and z."""
    z = x = y = np.array([[2.0, 0.0, -1.0]])
    points, total = [], 0.0
    for lr in LR:
        points.append(y)
        z = z - lr * (y - 1)
        total += lr**2
        c = lr**2 / total if kind == "schedule_free" else 0.3
        x = (1 - c) * x + c * z
        y = z if kind == "ema" else 0.6 * x + 0.4 * z
    return points, x


@pytest.mark.parametrize("kind", ["ema", "gpa", "schedule_free"])
def test_gradients_and_averages_are_those_of_the_formulas(kind: str) -> None:
    points, average, model = trajectory(kind)
    expected, x = reference(kind)
    np.testing.assert_allclose(points, expected, rtol=1e-13)
    held = model.weight.detach().clone()
    with average.in_place():
        np.testing.assert_allclose(model.weight.detach().numpy(), x, rtol=1e-13)
    assert torch.equal(model.weight, held)


SHORT = ("task=digits", "batch.size=64", "target.loss=null", "hydra.run.dir=run",
         "checkpoint.every_samples=128", "checkpoint.keep=9", "optim.lr=0.003")  # fmt: skip


@pytest.mark.parametrize("kind", ["ema", "gpa", "schedule_free"])
def test_a_run_is_resumed_with_its_average_and_exports_it(
    kind: str, train: Train, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    from largebatch.train.checkpoints.export import export

    words = (f"average={kind}", "average.decay=0.8")
    assert train(*SHORT, *words, "budget.samples=384") == 0
    whole = json.loads((tmp_path / "run" / "summary.json").read_text())
    again = ("hydra.run.dir=again", "resume=auto")
    assert train(*SHORT, *words, *again, "budget.samples=192") == 0
    assert train(*SHORT, *words, *again, "budget.samples=384") == 0
    resumed = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert resumed["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-5)
    last = max((tmp_path / "run" / "checkpoints").glob("samples-*"), key=lambda path: path.name)
    export(last, tmp_path / "weights.safetensors")
    exported = load_file(tmp_path / "weights.safetensors")
    assert {name: tensor.dtype for name, tensor in exported.items()} == dict.fromkeys(
        exported, torch.float32
    )


def test_an_average_that_two_ranks_shard_is_resumed_by_one(
    train: Train, command: Command, tmp_path: Path
) -> None:
    words = (*SHORT, "average=gpa", "average.decay=0.8")  # which is in the weights, too
    again = (*words, "hydra.run.dir=again", "resume=auto")
    done = command("train", *again, "engine=fsdp", "engine.nproc=2", "budget.samples=128")
    assert done.returncode == 0, done.stderr
    assert train(*again, "budget.samples=256") == 0
    assert train(*words, "budget.samples=256") == 0
    resumed, whole = (
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("again", "run")
    )
    assert resumed["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-5)


def test_a_rule_keeps_the_half_life_in_samples(train: Train, tmp_path: Path) -> None:
    words = ("average=ema", "scaling=adam_sde", "scaling.base_batch=16", "budget.samples=192")
    assert train(*SHORT, *words, "optim=adamw") == 0
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["batch_change"]["ema_decay"] == pytest.approx(0.999**4)


def test_what_cannot_be_is_refused(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*SHORT, "average=ema", "average.decay=1.0") == 2
    assert "average.decay must be in [0, 1), got 1" in capsys.readouterr().err
    assert train(*SHORT, "average.kind=mean") == 2
    assert "average.kind must be null or one of ema, gpa, schedule_free" in capsys.readouterr().err
