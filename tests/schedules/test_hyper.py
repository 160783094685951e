"""Hyperparameters are checked where they are written, and read from any optimizer's group."""

from typing import Any

import pytest

from largebatch.schedules import Hyper


def test_all_but_the_learning_rate_has_a_default() -> None:
    hyper = Hyper(lr="1e-3")  # type: ignore[arg-type]
    assert hyper == Hyper(lr=0.001, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    assert (hyper.ema_decay, hyper.warmup_samples) == (None, 0)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"lr": 0}, r"^lr must be a number > 0, got 0$"),
        ({"betas": (0.9,)}, r"^betas must be two numbers, got \(0\.9,\)$"),
        ({"betas": 0.9}, r"^betas must be two numbers, got 0\.9$"),
        ({"betas": (0.9, 1)}, r"^betas\[1\] must be below 1, got 1$"),
        ({"betas": (-0.1, 0.9)}, r"^betas\[0\] must be a number >= 0 and <= 1, got -0\.1$"),
        ({"eps": -1e-8}, r"^eps must be a number >= 0, got -1e-08$"),
        ({"weight_decay": -1}, r"^weight_decay must be a number >= 0, got -1$"),
        ({"ema_decay": 1.0}, r"^ema_decay must be below 1, got 1\.0$"),
        ({"warmup_samples": 0.5}, r"^warmup_samples must be a whole number .*, got 0\.5$"),
    ],
)
def test_impossible_values_are_refused_by_name(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Hyper(**{"lr": 0.1} | values)


@pytest.mark.parametrize(
    ("group", "betas", "eps", "weight_decay"),
    [
        ({"betas": [0.9, 0.99], "eps": 1e-6, "weight_decay": 0}, (0.9, 0.99), 1e-6, 0.0),
        ({"momentum": 0.9, "weight_decay": 0.1}, None, None, 0.1),
        ({"betas": (0.9, 0.99, 0.999), "eps": (1e-30, 1e-3)}, None, None, None),
        ({}, None, None, None),
    ],
)
def test_a_group_gives_what_it_has(
    group: dict[str, Any],
    betas: tuple[float, float] | None,
    eps: float | None,
    weight_decay: float | None,
) -> None:
    expected = Hyper(lr=0.1, betas=betas, eps=eps, weight_decay=weight_decay)
    assert Hyper.of_group(group, 0.1) == expected
