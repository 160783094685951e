"""Each variant is its source's algorithm: ours against the oracles at every step of a scenario."""

import numpy as np
import pytest
import torch
from torch.nn import Parameter
from variant_cases import Case, each_case, make, named_case
from variant_layers import Layer
from variant_scenario import (
    NUM_STEPS,
    SPECS,
    make_grads,
    make_weights,
    relative_error,
    steps_of,
    to_numpy,
    warmup,
)
from variant_threads import one_thread as one_thread

from largebatch.optim import LAMB, LARS

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@each_dtype
@each_case
def test_every_step_is_the_sources(case: Case, dtype: torch.dtype) -> None:
    params = [Parameter(weight) for weight in make_weights(dtype)]
    start, grads, lrs = [to_numpy(param) for param in params], make_grads(dtype), warmup(case.lr)
    layers = [
        Layer(weight, case.weight_decay * spec.decays, spec.adapt)
        for weight, spec in zip(start, SPECS, strict=True)
    ]
    steps = [(lr, [to_numpy(g) for g in gs]) for lr, gs in zip(lrs, grads, strict=True)]
    trajectory = case.oracle(layers, steps, **case.shared)
    ours = steps_of(make(case, params), params, grads, lrs)
    for expected, actual in zip(trajectory, ours, strict=True):
        errors = map(relative_error, actual, expected, start)
        assert max(errors) < TOLERANCE[dtype]


def ratios_seen(case: Case) -> list[dict[str, float]]:
    """Every step's trust ratios in the scenario, by layer."""
    params = [Parameter(weight) for weight in make_weights(torch.float32)]
    optimizer = make(case, params)
    return [
        {name: float(stats["trust_ratio"]) for name, stats in optimizer.layer_stats().items()}
        for _ in steps_of(optimizer, params, make_grads(torch.float32), warmup(case.lr))
    ]


def test_the_scenario_has_steps_that_are_clipped_and_steps_that_are_not() -> None:
    sizes = [
        float(torch.cat([grad.flatten() for grad in grads]).norm())
        for grads in make_grads(torch.float32)
    ]
    for max_grad_norm in (0.1, 0.5, 1.0):
        assert 0.2 < sum(size > max_grad_norm for size in sizes) / NUM_STEPS < 0.8


@pytest.mark.parametrize(
    ("kind", "name", "bounds"),
    [
        (LAMB, "deepspeed", (0.01, 10.0)),
        (LAMB, "lambc+mu", (0.1, 2.0)),
        (LAMB, "lambc", (1.0,)),
        (LARS, "larc", (1.0,)),
    ],
)
def test_the_scenario_hits_every_bound_and_also_stays_between(
    kind: type[torch.optim.Optimizer], name: str, bounds: tuple[float, ...]
) -> None:
    adapted = {str(number) for number, spec in enumerate(SPECS) if spec.adapt and spec.weight_scale}
    seen = [
        ratio
        for step in ratios_seen(named_case(kind, name))[10:]  # none without a gradient from here
        for layer, ratio in step.items()
        if layer in adapted
    ]
    assert {float(np.float32(bound)) for bound in bounds} <= set(seen)
    assert len(set(seen)) > len(bounds) + 20
