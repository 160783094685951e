"""The guard's rules against sequences worked out by hand; events that outlive their writer."""

import json
import math
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import forked
import pytest
from omegaconf import OmegaConf

from largebatch.common.errors import ConfigError
from largebatch.conf.config import GuardConfig
from largebatch.conf.specs import typed_as
from largebatch.records.names import EVENTS
from largebatch.train.guard import Guard, GuardAction
from largebatch.train.reporting.reporter import Events


def line(step: int, norm: float, loss: float = 2.0, **more: Any) -> dict[str, Any]:
    return {"step": step, "samples": 8 * step, "loss": loss, "grad_norm": norm} | more


def fed(
    guard: Guard, norms: Iterable[float], first: int = 1, loss: float = 2.0
) -> list[GuardAction]:
    """The actions on lines of these norms, in order."""
    lines = (line(step, norm, loss) for step, norm in enumerate(norms, first))
    return [action for action in map(guard.take, lines) if action is not None]


def masked(guard: Guard, norms: Iterable[float], first: int = 1) -> list[GuardAction]:
    """The same as a device sees it that masks each step by the threshold of the lines before."""
    actions = []
    for step, norm in enumerate(norms, first):
        bound = guard.threshold()
        skipped = norm > bound or (guard.skips_non_finite and not math.isfinite(norm))
        action = guard.take(line(step, norm, skipped=float(skipped), grad_norm_bound=bound))
        assert (action is not None) == skipped
        actions += [] if action is None else [action]
    return actions


# A 30B model's gradient norms before it was lost, and the healthy ones of before.
HEALTHY = [0.39, 0.41, 0.38, 0.40, 0.39, 0.37, 0.42, 0.39] * 4
BLOW_UP = [0.39, 2.41, 89.9, 1.0e3, 1.0e5]


def lost_at(guard: Guard, losses: Iterable[float], budget: int) -> int | None:
    """Samples at which a run of these evaluation losses, 8 samples apart, is stopped."""
    for place, loss in enumerate(losses, 1):
        action = guard.take_evaluation(loss, place, 8 * place, budget)
        if action is not None:
            assert (action.kind, action.number) == ("stop", "eval_loss")
            return action.samples
    return None


def test_a_run_is_lost_when_it_stays_far_above_its_start() -> None:
    def of(losses: Iterable[float], budget: int = 1600, start: float = 4.0, **more: Any) -> Any:
        guard = Guard(GuardConfig(**more))
        guard.take(line(1, 1.0, loss=start))
        # A resumed run counts on.
        resumed = Guard(GuardConfig(**more))
        resumed.load_state_dict(json.loads(json.dumps(guard.state_dict())))
        return lost_at(resumed, losses, budget)

    lost = [4.0] * 10 + [2e7] * 100
    assert of(lost) == 8 * 11 + 160  # a tenth of the budget after the first above 400
    assert of(lost, budget=100) == 8 * 20  # of a short run, the tenth evaluation
    assert of(lost, eval_loss_multiple=None) is None
    assert of([401.0] * 100) == 8 + 160
    assert of([399.0] * 100) is None
    assert of(([2e7] * 20 + [4.0]) * 5) is None  # it comes back each time
    assert of([99.0] * 100, start=1e-9) is None  # one that begins at nothing
    assert of([101.0] * 100, start=1e-9) == 8 + 160


@pytest.mark.parametrize("remedy", ["stop", "rollback"])
def test_a_blow_up_without_a_nan_is_seen_at_its_third_step(remedy: str) -> None:
    guard = Guard(GuardConfig(spike=remedy, grad_norm_multiple=20))
    assert fed(guard, HEALTHY) == []
    # The median of the 34 before is 0.39: 2.41 is 6 times it, 89.9 is 230 times.
    (action, *_) = fed(guard, BLOW_UP, first=33)
    assert (action.kind, action.step, action.samples) == (remedy, 35, 280)
    assert (action.number, action.value) == ("grad_norm", 89.9)
    assert action.bound == pytest.approx(20 * 0.39)
    assert "89.9" in action.reason
    assert "7.8" in action.reason


def test_a_run_that_begins_with_large_gradients_is_healthy() -> None:
    guard = Guard(GuardConfig(spike="stop", grad_norm_multiple=20, window=20))
    # Above 20 times the median of what came before at steps 6 to 19, and never after.
    norms = [1.0] * 5 + [25.0 * 1.5**k for k in range(5)] + [30.0] * 9 + [1.0] * 40
    assert fed(guard, norms) == []
    early = Guard(GuardConfig(spike="stop", grad_norm_multiple=20, window=20, warmup_steps=0))
    assert fed(early, norms)[0].step == 6


def test_without_a_rule_nothing_finite_is_a_spike() -> None:
    guard = Guard(GuardConfig())
    assert masked(guard, [*HEALTHY, *BLOW_UP]) == []
    assert guard.threshold() == math.inf


def test_the_threshold_is_the_multiple_of_a_median_without_what_was_skipped() -> None:
    guard = Guard(GuardConfig(grad_norm_multiple=10, window=5, warmup_steps=0))
    thresholds = []
    for step, norm in enumerate([1.0, 5.0, 3.0, 2.0, 4.0, 31.0, 29.0, 0.5], 1):
        thresholds.append(guard.threshold())
        guard.take(line(step, norm, skipped=norm > thresholds[-1]))
    # Medians of 1 5 3 2 4 twice (31 was skipped), then of 5 3 2 4 29.
    assert thresholds == [math.inf] * 5 + [30.0, 30.0, 40.0]
    assert guard.threshold() == 30.0  # of 3 2 4 29 0.5


def test_norms_that_are_all_zero_bound_nothing() -> None:
    guard = Guard(GuardConfig(grad_norm_multiple=10, warmup_steps=0))
    assert masked(guard, [0.0] * 6 + [1.0]) == []


def test_a_number_that_is_not_finite_stops_the_run_as_it_did() -> None:
    for norm, loss, number in ((math.nan, 2.0, "grad_norm"), (1.0, math.inf, "loss")):
        guard = Guard(GuardConfig())
        assert fed(guard, [1.0, 1.0]) == []
        (action,) = fed(guard, [norm], 3, loss)
        assert (action.kind, action.number, action.bound) == ("stop", number, math.inf)


def test_steps_that_are_not_finite_are_skipped_and_leave_no_trace() -> None:
    guard = Guard(GuardConfig(non_finite="skip", grad_norm_multiple=10, warmup_steps=0))
    actions = masked(guard, [1.0, 2.0, math.nan, 3.0, math.inf, 4.0, 5.0])
    assert [(v.kind, v.step) for v in actions] == [("skip", 3), ("skip", 5)]
    assert guard.threshold() == 30.0  # of 1 2 3 4 5


def test_a_loss_that_is_not_finite_where_the_gradient_is_cannot_be_skipped() -> None:
    guard = Guard(GuardConfig(non_finite="skip"))
    action = guard.take(line(1, 1.0, math.nan, skipped=0.0))
    assert action is not None
    assert action.kind == "stop"
    assert "too late to skip it" in action.reason


def test_a_loss_is_judged_by_its_median_deviation() -> None:
    def after(losses: list[float], last: float) -> GuardAction | None:
        guard = Guard(GuardConfig(spike="stop", loss_deviations=4, warmup_steps=0))
        for step, loss in enumerate(losses, 1):
            assert guard.take(line(step, 1.0, loss)) is None
        return guard.take(line(len(losses) + 1, 1.0, last))

    # Median 3; deviations 2 1 0 1 2, their median 1; the bound is 3 + 4 * 1.4826 = 8.9304.
    assert after([1.0, 2.0, 3.0, 4.0, 5.0], 8.93) is None
    spike = after([1.0, 2.0, 3.0, 4.0, 5.0], 8.9305)
    assert spike is not None
    assert (spike.number, spike.bound) == ("loss", pytest.approx(8.9304))
    # One outlier moves neither median: 3 and 1 as before.
    assert after([1.0, 2.0, 3.0, 4.0, 8.9], 8.9305) is not None
    # Losses that do not vary: a hundredth of the median stands in, 2 + 4 * 0.02.
    assert after([2.0] * 6, 2.079) is None
    assert after([2.0] * 6, 2.081) is not None


def test_more_events_than_allowed_in_a_window_stop_the_run() -> None:
    config = GuardConfig(non_finite="skip", window=5, most_events=2, warmup_steps=0)
    spaced = masked(Guard(config), [math.nan, 1.0, 1.0, math.nan, 1.0, math.nan, 1.0, 1.0])
    assert [v.kind for v in spaced] == ["skip"] * 3  # lines 1, 4, 6: never three within five
    dense = masked(Guard(config), [math.nan, 1.0, math.nan, 1.0, math.nan])
    assert [v.kind for v in dense] == ["skip", "skip", "stop"]
    assert "guard.most_events=2" in dense[-1].reason


def test_a_run_that_goes_back_for_ever_is_stopped() -> None:
    config = GuardConfig(spike="rollback", grad_norm_multiple=20, most_events=3, warmup_steps=0)
    guard = Guard(config)
    assert fed(guard, [1.0] * 10) == []
    checkpoint, kinds = json.loads(json.dumps(guard.state_dict())), []
    for _ in range(4):
        (action,) = fed(guard, [1.0, 1.0, 50.0], first=11)
        kinds.append(action.kind)
        guard.rewind(checkpoint)
    assert kinds == ["rollback"] * 3 + ["stop"]


def test_going_back_forgets_the_norms_since() -> None:
    guard = Guard(GuardConfig(grad_norm_multiple=10, warmup_steps=0, window=5))
    fed(guard, [1.0] * 5)
    state = guard.state_dict()
    fed(guard, [7.0] * 5, first=6)
    assert guard.threshold() == 70.0
    guard.rewind(state)
    assert guard.threshold() == 10.0


def test_a_resumed_guard_judges_as_the_one_before() -> None:
    config = GuardConfig(grad_norm_multiple=3, non_finite="skip", window=6, warmup_steps=4)
    norms = [1.0, 2.0, math.nan, 9.0, 1.5, 2.5, 40.0, 3.0, math.inf, 5.0, 70.0]
    whole = Guard(config)
    expected = masked(whole, norms)
    for cut in range(len(norms)):
        before = Guard(config)
        found = masked(before, norms[:cut])
        after = Guard(config)
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        found += masked(after, norms[cut:], first=cut + 1)
        assert [vars(v) | {"value": str(v.value)} for v in found] == [
            vars(v) | {"value": str(v.value)} for v in expected
        ]
        assert after.state_dict() == whole.state_dict()
    assert [v.step for v in expected] == [3, 7, 9, 11]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"non_finite": "ignore"}, "non_finite must be one of skip, rollback, stop"),
        ({"spike": "skip", "loss_deviations": 5}, "set guard.spike to rollback or stop"),
        ({"spike": "stop"}, "guard.spike=stop needs to know what a spike is"),
        ({"grad_norm_multiple": 1.0}, "grad_norm_multiple"),
        ({"loss_deviations": 0, "spike": "stop"}, "loss_deviations"),
        ({"window": 4}, "window must be a whole number of at least 5"),
        ({"most_events": -1}, "most_events"),
    ],
)
def test_a_guard_that_cannot_be_is_refused(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 — the sentence is below
        typed_as(GuardConfig, OmegaConf.create(keys))
    assert says in str(refusal.value)


def test_what_goes_back_needs_a_checkpoint() -> None:
    assert not GuardConfig(grad_norm_multiple=20).rolls_back
    assert GuardConfig(spike="rollback", loss_deviations=5).rolls_back
    assert GuardConfig(non_finite="rollback").rolls_back


def test_a_rollback_without_checkpoints_is_refused_before_the_run() -> None:
    from hydra import compose, initialize_config_module

    from largebatch.conf.config import typed

    words = ["guard.spike=rollback", "guard.grad_norm_multiple=20"]
    with initialize_config_module("largebatch.conf", version_base="1.3"):
        assert typed(compose("train", [*words, "checkpoint.every_samples=1e4"])).guard.rolls_back
        with pytest.raises(ConfigError, match=r"set checkpoint\.every_samples"):
            typed(compose("train", words))
        with pytest.raises(ConfigError, match="leave guard as it is"):
            typed(compose("train", ["mode=lr_find", "guard.non_finite=skip"]))


WRITES_AND_IS_KILLED = """
import os, pathlib, signal, sys
from largebatch.train.reporting.reporter import Events
events = Events(pathlib.Path(sys.argv[1]))
for step in range(1, 4):
    events.write("skip", step=step, samples=8 * step, reason="inf", value=float("inf"), names=["w"])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_events_outlive_a_writer_that_is_killed_and_half_a_line_spoils_no_other(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-c", WRITES_AND_IS_KILLED, str(tmp_path)]
    done = forked.run(command, env=dict(os.environ), timeout=600)
    assert done.returncode == -signal.SIGKILL
    path = tmp_path / EVENTS
    path.write_bytes(path.read_bytes()[:-10])  # as if it had been killed while it wrote
    Events(tmp_path).write("rollback", step=9, samples=72, reason="again")
    first, second, half, last = path.read_text().splitlines()
    assert json.loads(first) | {"time": 0} == {
        "time": 0, "step": 1, "samples": 8, "kind": "skip", "reason": "inf",
        "value": None, "names": ["w"],
    }  # fmt: skip
    assert json.loads(second)["step"] == 2
    with pytest.raises(json.JSONDecodeError):
        json.loads(half)
    assert json.loads(last)["kind"] == "rollback"


def test_a_run_without_events_has_no_file_of_them(tmp_path: Path) -> None:
    Events(tmp_path)
    assert not (tmp_path / EVENTS).exists()
