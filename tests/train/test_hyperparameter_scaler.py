"""At a change of batch the optimizer's groups move as the rule says, and the record tells."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from largebatch.optim import LAMB, LARS
from largebatch.schedules import (
    Constant,
    GeometricBatch,
    Hyper,
    Plan,
    Seesaw,
    Smith,
    StepDecay,
    scale,
)
from largebatch.train.hyperparameter_scaler import HyperparameterScaler

Train = Callable[..., int]
ReadRun = Callable[[Path], tuple[list[dict[str, Any]], dict[str, Any]]]


def planned(rule: str, hold: str | None = "rule") -> Plan:
    return Plan(
        ramp=GeometricBatch(start=32, ramp_samples=256, size=128), curve=Constant(),
        budget_samples=1024, base_lr=0.01, base_batch=64, rule=rule, hold=hold,
    )  # fmt: skip


def adamw() -> torch.optim.Optimizer:
    weight, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    groups = [{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99), eps=1e-8)


def test_each_group_is_scaled_from_its_own_values_not_from_the_step_before() -> None:
    plan, optimizer = planned("adam_sde"), adamw()
    coscaling = HyperparameterScaler(plan, optimizer)
    for point in plan:
        coscaling.apply(point)
        for group, decay in zip(optimizer.param_groups, (0.1, 0.0), strict=True):
            base = Hyper(lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=decay)
            scaled = scale(base, 64, point.batch_size, rule="adam_sde")
            assert (group["betas"], group["eps"]) == (scaled.betas, scaled.eps)
            assert group["weight_decay"] == scaled.weight_decay
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.1 * 2**0.5)


def test_groups_follow_the_length_of_the_run() -> None:
    longer = replace(planned("adam_sde"), base_samples=256, duration_exponent=0.5)
    optimizer = adamw()
    coscaling = HyperparameterScaler(longer, optimizer)
    *_, last = longer
    coscaling.apply(last)
    coscaling.set_lr(last.lr)
    for group in optimizer.param_groups:  # a batch twice as large, over a run 4 times as long
        assert group["betas"] == pytest.approx((0.95, 0.995))
        assert group["eps"] == pytest.approx(1e-8 * 2**0.5)
        assert group["lr"] == pytest.approx(0.01 / 2**0.5)
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.1 * 2 * 2**0.5)


def test_a_change_is_told_once_with_what_moved() -> None:
    plan = planned("adam_sde")
    coscaling = HyperparameterScaler(plan, adamw())
    told = {point.samples: told for point in plan if (told := coscaling.apply(point))}
    assert list(told) == [stage.samples for stage in plan.stages()]
    changes = [change["batch_change"] for change in told.values()]
    assert [change["from"] for change in changes] == [None, 32, 64]
    assert changes[0]["betas"] == pytest.approx((0.95, 0.995))
    assert changes[1] == {"from": 32, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def test_a_rule_for_the_learning_rate_alone_leaves_the_groups_untouched() -> None:
    plan, optimizer = planned("sqrt"), adamw()
    before = [dict(group) for group in optimizer.param_groups]
    coscaling = HyperparameterScaler(plan, optimizer)
    told = [change for point in plan if (change := coscaling.apply(point))]
    assert told == [{"batch_change": {"from": 32}}, {"batch_change": {"from": 64}}]
    assert [dict(group) for group in optimizer.param_groups] == before


def test_weight_decay_moves_where_it_is_held_for_optimizers_without_betas_too() -> None:
    plan = planned("linear", hold="per_step")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.01, weight_decay=0.1)
    coscaling = HyperparameterScaler(plan, optimizer)
    for point in plan:
        coscaling.apply(point)
        decay = optimizer.param_groups[0]["weight_decay"]
        assert point.hyper.lr * decay == pytest.approx(0.01 * 0.1)


@pytest.mark.parametrize("make", [torch.optim.AdamW, LAMB])
def test_a_step_after_a_change_is_that_of_an_optimizer_made_with_the_new_values(
    make: Callable[..., torch.optim.Optimizer],
) -> None:
    plan = planned("adam_sde", hold="per_sample")
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3)) for _ in range(2)]
    values = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    moved = make([weights[0]], **values)
    HyperparameterScaler(plan, moved).apply(plan.at(1000))
    scaled = scale(Hyper(**values), 64, 128, rule="adam_sde")  # type: ignore[arg-type]
    made = make([weights[1]], lr=0.01, betas=scaled.betas, eps=scaled.eps,
                weight_decay=scaled.weight_decay)  # fmt: skip
    for _ in range(3):
        for weight, optimizer in zip(weights, (moved, made), strict=True):
            weight.grad = torch.linspace(-0.5, 2, 6).reshape(2, 3) * weight.detach()
            optimizer.step()
    assert torch.equal(weights[0], weights[1])


HALVED = StepDecay(drop_samples=[256], drop_factor=0.5)
RAMPS = {
    "linear": (GeometricBatch(start=32, ramp_samples=256, size=128), Constant(), [2.0, 2.0]),
    "smith": (Smith(start=32, size=64), HALVED, []),
    "seesaw": (Seesaw(start=32, size=64), HALVED, [0.5**0.5]),
}


@pytest.mark.parametrize("ramp", RAMPS)
def test_momentum_follows_the_learning_rate_that_is_inside_it(ramp: str) -> None:
    """At a change of batch LARS with lr in its buffer goes on as the one that has it outside."""
    schedule, curve, factors = RAMPS[ramp]
    plan = Plan(
        ramp=schedule, curve=curve, budget_samples=1024, base_lr=0.01, base_batch=64, rule="linear"
    )
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3)) for _ in range(2)]
    outside, inside = (
        LARS([weight], lr=0.01, momentum=0.9, eps=1e-8, lr_in_buffer=within)
        for weight, within in zip(weights, (False, True), strict=True)
    )
    told: list[dict[str, Any]] = []
    for optimizer, weight in ((outside, weights[0]), (inside, weights[1])):
        coscaling = HyperparameterScaler(plan, optimizer)
        for point in plan:
            weight.grad = torch.linspace(-0.5, 2, 6).reshape(2, 3) * weight.detach()
            told.append(coscaling.apply(point))
            optimizer.param_groups[0]["lr"] = point.lr
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=0)
    found = [line["batch_change"].get("momentum_buffer") for line in told if line]
    assert [factor for factor in found if factor] == pytest.approx(factors)


RUN = (
    "task=digits", "optim=adamw", "batch=stages", "batch.spec=0:32 320:64 960:128",
    "scaling=adam_sde", "scaling.base_batch=32", "optim.weight_decay=0.01", "optim.lr=0.005",
    "target.loss=null", "budget.samples=1600", "hydra.run.dir=run",
)  # fmt: skip


def test_the_record_tells_of_each_change_on_the_line_of_its_first_step(
    train: Train, read_run: ReadRun, tmp_path: Path
) -> None:
    assert train(*RUN, "record.every=7", "evaluation.growth=100") == 0
    lines, _ = read_run(tmp_path / "run")
    changes = [line for line in lines if "batch_change" in line]
    assert [(line["step"], line["global_batch_size"]) for line in changes] == [(11, 64), (21, 128)]
    first, second = (line["batch_change"] for line in changes)
    assert (first["from"], second["from"]) == (32, 64)
    assert first["betas"] == pytest.approx([0.8, 0.98])
    assert second["betas"] == pytest.approx([0.6, 0.96])
    assert second["eps"] == pytest.approx(1e-8 / 2)
    assert second["weight_decay"] == pytest.approx(0.01 * 2)
    assert {line["step"] for line in lines} >= {7, 11, 14, 21}


def test_a_loss_decides_the_batch_at_an_evaluation(
    train: Train, read_run: ReadRun, tmp_path: Path
) -> None:
    overrides = ("batch=loss_triggered", "batch.start=32", "batch.spec=2:64 1:128")
    train("task=digits", "optim=sgd", *overrides, "scaling=linear", "scaling.base_batch=32",
          "optim.lr=0.2", "target.loss=0.3", "budget.samples=2e4",
          "hydra.run.dir=run")  # fmt: skip
    lines, summary = read_run(tmp_path / "run")
    size, seen = 32, 0
    for line in lines:
        assert (line["global_batch_size"], line["samples"]) == (size, seen + size)
        assert line["lr"] == pytest.approx(0.2 * size / 32)
        seen = line["samples"]
        loss = line.get("eval_loss", 9.0)
        size = max(size, 128 if loss <= 1 else 64 if loss <= 2 else 32)
    assert summary["status"] == "reached"
    assert summary["batch_size"] == 128
    changed = [line["batch_change"] for line in lines if "batch_change" in line]
    assert [change["from"] for change in changed] == [32, 64]


def test_ranks_decide_the_same(train: Train, read_run: ReadRun, tmp_path: Path) -> None:
    overrides = ("task=digits", "optim=sgd", "batch=loss_triggered", "batch.start=32",
                 "batch.spec=2:64 1:128", "optim.lr=0.2", "target.loss=null",
                 "budget.samples=3000")  # fmt: skip
    records = []
    for ranks in (1, 2):
        assert train(*overrides, f"engine.nproc={ranks}", f"hydra.run.dir=ranks{ranks}") == 0
        records.append(read_run(tmp_path / f"ranks{ranks}")[0])
    one, two = records
    assert [line["global_batch_size"] for line in one] == [
        line["global_batch_size"] for line in two
    ]
    assert {line["global_batch_size"] for line in one} == {32, 64, 128}
    losses = [[line["loss"] for line in lines] for lines in records]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
