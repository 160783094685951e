"""What a tensor's rates are multiplied by in a larger model is what keeps its steps' effect."""

import math

import pytest

from largebatch.optim.muon import SHAPE_RULES, shape_scale
from largebatch.schedules.transfer import STEPS, Factors, Fans, Placed, factors, step_of

WIDE, NARROW = Fans(512, 256), Fans(128, 64)
HIDDEN = Placed(WIDE, NARROW)
EMBEDDING = Placed(Fans(256, 1), Fans(64, 1))
HEAD = Placed(Fans(96, 256), Fans(96, 64), multiplier=1 / 4)


@pytest.mark.parametrize(
    ("optimizer", "options", "lr"),
    [
        ("AdamW", {}, lambda rows, columns: 1 / columns),
        ("Muon", {"shape_rule": "spectral"}, lambda rows, columns: 1.0),
        ("Shampoo", {"grafting": "none"}, lambda rows, columns: math.sqrt(rows / columns)),
        ("SGD", {}, lambda rows, columns: rows / columns),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hidden_matrices_go_by_the_published_table(
    optimizer: str, options: dict[str, str], lr: object
) -> None:
    """arXiv:2602.20937, and arXiv:2310.17813 for SGD."""
    assert callable(lr)
    tensor = Placed(Fans(512, 64), Fans(128, 128))  # shapes that do not grow alike
    found = factors(step_of(optimizer, options), tensor).lr
    assert found == pytest.approx(lr(512, 64) / lr(128, 128))


def test_lamb_s_published_rate_can_be_asked_for() -> None:
    """Θ(1), arXiv:2602.20937."""
    assert factors("relative", HIDDEN).lr == 1.0
    assert factors(step_of("LAMB", {}), HIDDEN).lr == pytest.approx(1 / 2)


def norm(step: str, fans: Fans) -> float:
    """The spectral norm of a step at the learning rate 1: few directions of Adam, else all."""
    if step in SHAPE_RULES:
        return shape_scale(step, int(fans.fan_out), int(fans.fan_in))
    return {
        "adam": math.sqrt(fans.fan_out * fans.fan_in),
        "orthogonal": 1.0,
        "gradient": math.sqrt(fans.fan_in / fans.fan_out),
    }[step]


@pytest.mark.parametrize("step", ["adam", "orthogonal", "gradient", *SHAPE_RULES])
def test_a_step_grows_as_the_spectral_condition_asks(step: str) -> None:
    def effect(fans: Fans, lr: float) -> float:
        return lr * norm(step, fans) / math.sqrt(fans.fan_out / fans.fan_in)

    for here in (WIDE, Fans(64, 256), Fans(704, 256)):
        lr = factors(step, Placed(here, NARROW)).lr
        assert effect(here, lr) == pytest.approx(effect(NARROW, 1.0))


def test_adamw_s_decay_a_step_stays_and_eps_falls_with_gradients() -> None:
    assert factors("adam", HIDDEN) == Factors(lr=1 / 4, weight_decay=4.0, eps=1 / 4)
    assert factors("adam", EMBEDDING) == Factors(eps=1 / 4)
    assert factors("adam", HEAD) == Factors(eps=1 / 4)


def test_a_multiplier_stands_for_a_smaller_rate() -> None:
    """Logits · m of rate lr, or m · weights: Adam's step of the latter is lr · m, SGD's lr · m²."""
    bare = Placed(HEAD.here, HEAD.base)
    for step, power in (("adam", 1), ("orthogonal", 1), ("gradient", 2)):
        assert factors(step, HEAD).lr * HEAD.multiplier**power == factors(step, bare).lr


def test_depth_leaves_rates_and_moves_eps_and_what_grows_with_gradients() -> None:
    deep = Placed(NARROW, NARROW, branch=1 / 3)
    assert factors("adam", deep) == Factors(eps=1 / 3)
    assert factors("gradient", deep).lr == pytest.approx(3.0)
    assert factors("match_rms", deep).lr == 1.0


@pytest.mark.parametrize(
    ("step", "direction"), [("relative", 1), ("relative_adam", 1), ("relative_gradient", 1 / 4)]
)
def test_decay_within_a_relative_step_shrinks_weights_by_as_much(
    step: str, direction: float
) -> None:
    # Weights of half the size: elements of Adam's direction stay, those of a gradient are a fourth.
    found = factors(step, HIDDEN)
    assert found.lr * found.weight_decay * (1 / 2) / direction == pytest.approx(1.0)


@pytest.mark.parametrize("step", ["relative_adam", "relative_gradient"])
def test_a_share_of_the_weights_in_few_directions_does_what_the_spectral_condition_asks(
    step: str,
) -> None:
    def effect(fans: Fans, size: float, lr: float) -> float:
        return (
            lr
            * size
            * math.sqrt(fans.fan_out * fans.fan_in)
            / math.sqrt(fans.fan_out / fans.fan_in)
        )

    for here in (WIDE, Fans(64, 256), Fans(704, 256)):  # weights of variance 1 / fan_in
        lr = factors(step, Placed(here, NARROW)).lr
        before = effect(NARROW, 1 / math.sqrt(NARROW.fan_in), 1.0)
        assert effect(here, 1 / math.sqrt(here.fan_in), lr) == pytest.approx(before)
    # What a multiplier keeps small has weights of one size; an embedding takes one of its rows.
    assert factors(step, HEAD).lr == factors(step, EMBEDDING).lr == 1.0


@pytest.mark.parametrize("step", STEPS)
def test_a_model_as_it_was_tuned_keeps_its_rates(step: str) -> None:
    assert factors(step, Placed(WIDE, WIDE)) == Factors()


@pytest.mark.parametrize(
    ("optimizer", "options", "step"),
    [
        ("Shampoo", {"grafting": "adam"}, "adam"),
        ("Shampoo", {"grafting": "sgd"}, "gradient"),
        ("Shampoo", {"grafting": "adam", "hyperball": True}, "relative_adam"),
        ("SOAP", {"hyperball": True}, "relative_adam"),
        ("Muon", {"shape_rule": "match_rms", "hyperball": True}, "relative"),
        ("SOAPMuon", {"shape_rule": "match_rms", "hyperball": True}, "relative"),
        ("KFAC", {"graft": "adam"}, "adam"),
        ("SOAPMuon", {"shape_rule": "match_rms", "hyperball": False}, "match_rms"),
    ],
)
def test_a_step_goes_by_what_gives_it_its_length(
    optimizer: str, options: dict[str, object], step: str
) -> None:
    assert step_of(optimizer, options) == step


def test_an_optimizer_without_a_rule_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"KFAC with graft=none .*scaling.step"):
        step_of("KFAC", {"graft": "none"})
    with pytest.raises(ValueError, match="rates of Lion move"):
        step_of("Lion", {})
