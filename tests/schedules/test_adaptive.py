"""Ramps that are decided during the run: what they have decided is a function of the samples."""

import json

import pytest

from largebatch.schedules import Constant, LossTriggered, Plan

LOSSES = [4.0, 3.1, 3.0, 3.2, 2.4, 2.6, 1.0]


def triggered() -> LossTriggered:
    return LossTriggered(start=64, spec="3:128 2.5:256 2:512 1.5:1024")


def planned(ramp: LossTriggered) -> Plan:
    return Plan(
        ramp=ramp, curve=Constant(), budget_samples=10_000, base_lr=0.1, base_batch=64, rule="sqrt"
    )


def run(plan: Plan, losses: list[float], begin: int = 0) -> list[tuple[int, int]]:
    """Evaluate after every step, one loss each; returns each step's samples and size."""
    steps = []
    for point, loss in zip(plan.steps_from(begin), losses, strict=False):
        steps.append((point.samples, point.batch_size))
        plan.observe(point.samples + point.batch_size, eval_loss=loss)
    return steps


def test_the_batch_grows_at_the_evaluation_that_is_at_a_level_and_never_falls() -> None:
    steps = run(planned(triggered()), LOSSES)
    assert [size for _, size in steps] == [64, 64, 64, 128, 128, 256, 256]
    assert [samples for samples, _ in steps] == [0, 64, 128, 192, 320, 448, 704]


def test_levels_may_be_passed_over() -> None:
    plan = planned(triggered())
    run(plan, LOSSES)
    assert plan.at(10_000).batch_size == 1024  # from 256, the loss being 1
    assert plan.final_batch_size == 1024
    assert plan.peak_lr == pytest.approx(0.1 * 4)


def test_what_was_decided_is_a_function_of_the_samples() -> None:
    plan = planned(triggered())
    steps = run(plan, LOSSES)
    assert [(point.samples, point.batch_size) for point in plan][: len(steps)] == steps


@pytest.mark.parametrize("stop", range(1, len(LOSSES)))
def test_a_run_goes_on_from_its_state_as_if_it_had_not_stopped(stop: int) -> None:
    whole = run(planned(triggered()), LOSSES)
    first = planned(triggered())
    before = run(first, LOSSES[:stop])
    state = json.loads(json.dumps(first.state_dict()))
    second = planned(triggered())
    second.load_state_dict(state)
    seen = before[-1][0] + before[-1][1]
    assert before + run(second, LOSSES[stop:], seen) == whole


def test_a_loss_that_is_no_number_decides_nothing() -> None:
    plan = planned(triggered())
    plan.observe(64, eval_loss=float("nan"))
    assert plan.at(64).batch_size == 64


def test_the_plan_says_that_the_rest_is_open_and_plans_for_all_of_it() -> None:
    plan = planned(triggered())
    assert plan.is_open
    assert [stage.batch_size for stage in plan.stages()] == [64]
    with pytest.raises(ValueError, match="a batch size of 64 is not divisible by 1024"):
        plan.check_divisible(1024, 1)
    plan.check_divisible(2, 32)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("3", r'^batch\.spec must be entries like "3:128 2\.5:256", got \'3\'$'),
        ("low:128", r"^a loss of batch\.spec must be a number, got 'low'$"),
        ("3:128 3:256", r"losses of batch\.spec must fall and its batch sizes rise"),
        ("2:128 3:256", r"losses of batch\.spec must fall and its batch sizes rise"),
        ("3:128 2:128", r"losses of batch\.spec must fall and its batch sizes rise"),
        ("3:32", r"batch sizes rise from batch\.start = 64, got '3:32'$"),
    ],
)
def test_levels_out_of_order_are_refused(spec: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        LossTriggered(start=64, spec=spec)
