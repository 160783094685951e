"""Shampoo's steps are those of its papers' formulas."""

import copy
from typing import Any
from unittest import mock

import numpy as np
import pytest
import second_order_references as references
import torch
from torch import Tensor
from torch.nn import Parameter

from largebatch.optim import Shampoo
from largebatch.optim.math.matrix_roots import RootError

DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.99),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "factor_beta": None,
    "grafting": "adam",
    "exponent": None,
    "ridge": 1e-5,
    "precondition_interval": 10,
    "start_preconditioning_step": 1,
    "momentum": 0.0,
    "nesterov": False,
    "decay": "decoupled",
}
VARIATIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "often": {"precondition_interval": 1},
    "paper-2018": {
        "betas": (0.0, 0.99),
        "factor_beta": 1.0,
        "grafting": "none",
        "precondition_interval": 1,
    },
    "sgd": {"grafting": "sgd", "precondition_interval": 3},
    "adagrad": {"grafting": "adagrad", "precondition_interval": 3},
    "rmsprop": {"grafting": "rmsprop", "precondition_interval": 3},
    "none": {"grafting": "none", "precondition_interval": 3},
    "exponent": {"exponent": 0.5, "precondition_interval": 1},
    "start": {"start_preconditioning_step": 4, "precondition_interval": 1},
    "start-none": {
        "start_preconditioning_step": 4,
        "precondition_interval": 1,
        "grafting": "none",
    },
    "momentum": {"momentum": 0.7, "weight_decay": 0.1},
    "nesterov": {"momentum": 0.7, "nesterov": True, "decay": "l2", "weight_decay": 0.1},
    "factor-beta": {"factor_beta": 0.5, "precondition_interval": 1},
    "one-sided": {"sides": "one", "precondition_interval": 1},
    "beside": {"refresh": "beside", "precondition_interval": 2},
    "beside-often": {"refresh": "beside", "precondition_interval": 1},
}
MOMENTS = ("exp_avg", "exp_avg_sq")
ADAMW_STATE = {"step", *MOMENTS, *(f"{name}_extra_steps" for name in MOMENTS), "dropped_elements"}
SHAPES = {"matrix": (6, 4), "tensor": (3, 5, 4)}


def problem(shape: tuple[int, ...], steps: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """A weight and as many gradients, of an uneven spectrum."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    scale = torch.logspace(0, -1.5, shape[-1], dtype=torch.float64)
    grads = [
        torch.randn(shape, generator=generator, dtype=torch.float64) * scale for _ in range(steps)
    ]
    return weight.to(dtype), [grad.to(dtype) for grad in grads]


def stepped(weight: Tensor, grads: list[Tensor], **options: Any) -> tuple[Tensor, Shampoo]:
    param = Parameter(weight.clone())
    optimizer = Shampoo([param], **options)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach(), optimizer


def error(found: Tensor, expected: references.Array) -> float:
    reference = torch.from_numpy(expected)
    return float((found.double() - reference).norm() / reference.norm())


def reference(weight: Tensor, grads: list[Tensor], blocks: Any = None, **options: Any) -> Any:
    arrays = [grad.double().numpy() for grad in grads]
    every = DEFAULTS | options
    start = weight.double().numpy()
    return references.run(references.ShampooBlock, start, arrays, every, blocks)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", VARIATIONS)
def test_ten_steps_are_those_of_the_formula(name: str, shape: tuple[int, ...]) -> None:
    options = VARIATIONS[name]
    for dtype, limit in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        weight, grads = problem(shape, 10, dtype)
        found, _ = stepped(weight, grads, merge_dims=False, **options)
        assert error(found, reference(weight, grads, **options)) < limit


@pytest.mark.parametrize("name", VARIATIONS)
def test_every_option_makes_a_difference(name: str) -> None:
    """Or the test above would not see it ignored."""
    weight, grads = problem((6, 4), 10, torch.float64)
    plain = reference(weight, grads, precondition_interval=2)
    other = reference(weight, grads, **VARIATIONS[name])
    assert np.linalg.norm(plain - other) / np.linalg.norm(other) > 1e-6


@pytest.mark.parametrize("grafting", ["adam", "none"])
def test_one_step_from_given_statistics(grafting: str) -> None:
    """Factors and averages as after a long time, loaded; then a step of FP32."""
    shape, step = (24, 16), 1000.0
    weight, (grad, mean) = problem(shape, 2, torch.float32)
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randn(n, 4 * n, generator=generator) for n in shape]
    factors = [sample @ sample.T / (4 * len(sample)) for sample in samples]
    squares = torch.rand(shape, generator=generator) + 0.1
    _, optimizer = stepped(weight, [grad], grafting=grafting, precondition_interval=1)
    saved = optimizer.state_dict()
    given = saved["state"][0]
    given |= {"step": torch.tensor(step), "block_0/exp_avg": mean}
    given |= {f"block_0/factor_{dim}": factor for dim, factor in enumerate(factors)}
    if grafting == "adam":
        given["block_0/grad_sq"] = squares
    param = Parameter(weight.clone())
    resumed = Shampoo([param])
    resumed.load_state_dict(copy.deepcopy(saved))
    param.grad = grad.clone()
    resumed.step()

    every = DEFAULTS | {"grafting": grafting, "precondition_interval": 1}
    block = references.ShampooBlock(shape, every)
    block.factors = [factor.double().numpy() for factor in factors]
    block.m, block.v = mean.double().numpy(), squares.double().numpy()
    block.t = int(step)
    direction, own = block.step(grad.double().numpy())
    u = direction * np.linalg.norm(own) / np.linalg.norm(direction)
    moved = torch.from_numpy(weight.double().numpy() - 1e-3 * u)
    assert error(param.detach(), moved.numpy()) < 1e-6
    # Of the step itself, which the weight's own rounding hides: taken from a weight of zeros.
    origin = Parameter(torch.zeros(shape))
    from_zero = Shampoo([origin])
    from_zero.load_state_dict(copy.deepcopy(saved))
    origin.grad = grad.clone()
    from_zero.step()
    assert error(origin.detach(), -1e-3 * u) < 2e-6


def test_the_grafting_norm_is_that_of_the_whole_tensor() -> None:
    """Blocks differ in scale by 100: with norms of their own they would all take equal steps."""
    weight, grads = problem((7, 9), 6, torch.float64)
    for grad in grads:
        grad[4:] *= 100
    # Of 7 rows three parts up to 3, of 9 columns three of 3.
    rows, columns = (0, 2, 4, 7), (0, 3, 6, 9)
    blocks = [
        (slice(rows[i], rows[i + 1]), slice(columns[j], columns[j + 1]))
        for i in range(3)
        for j in range(3)
    ]
    options = {"grafting": "sgd", "precondition_interval": 1}
    found, optimizer = stepped(weight, grads, block_size=3, **options)
    assert error(found, reference(weight, grads, blocks, **options)) < 1e-11
    (stats,) = optimizer.layer_stats().values()
    whole = grads[0] * 0
    for t, grad in enumerate(grads):
        whole = 0.9 * whole + 0.1 * grad
        expected = whole / (1 - 0.9 ** (t + 1))
    torch.testing.assert_close(stats["update_norm"], expected.norm().double())


@pytest.mark.parametrize("shape", [(5,), (1, 5), (5, 1, 1), ()])
def test_what_is_no_matrix_is_stepped_by_adamw(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = Parameter(torch.randn(shape, generator=generator))
    theirs = Parameter(ours.detach().clone())
    options = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    optimizer, adamw = Shampoo([ours], **options), torch.optim.AdamW([theirs], **options)
    for _ in range(10):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert set(optimizer.state[ours]) == ADAMW_STATE


def test_groups_may_be_left_to_adamw() -> None:
    params = [Parameter(torch.ones(4, 3)) for _ in range(2)]
    optimizer = Shampoo([{"params": params[0]}, {"params": params[1], "precondition": False}])
    for param in params:
        param.grad = torch.arange(12.0).view(4, 3)
    optimizer.step()
    assert "block_0/factor_0" in optimizer.state[params[0]]
    assert set(optimizer.state[params[1]]) == ADAMW_STATE


def roots_taken(num_layers: int, num_steps: int, **options: Any) -> list[list[int]]:
    """For each step the layers that have a new root."""
    params = [Parameter(torch.randn(4, 3)) for _ in range(num_layers)]
    optimizer = Shampoo(params, **options)
    taken = []
    for _ in range(num_steps):
        for param in params:
            param.grad = torch.randn(4, 3)
        before = [optimizer.state[p].get("block_0/root_0", torch.eye(4)).clone() for p in params]
        optimizer.step()
        after = [optimizer.state[param]["block_0/root_0"] for param in params]
        taken.append([i for i in range(num_layers) if not torch.equal(before[i], after[i])])
    return taken


def test_roots_are_spread_over_the_steps_of_an_interval() -> None:
    """20 layers, an interval of 5: four layers' roots a step, each layer's in every fifth."""
    taken = roots_taken(20, 15, precondition_interval=5, start_preconditioning_step=5)
    assert [len(layers) for layers in taken] == [4] * 15
    assert sorted(layer for layers in taken[:5] for layer in layers) == list(range(20))
    assert taken[:5] == taken[5:10] == taken[10:]


def test_young_factors_have_new_roots_more_often() -> None:
    """All at the first step, and once in steps 2 to 3, 4 to 7 and 8 to 15, each time spread."""
    taken = roots_taken(32, 48, precondition_interval=16)
    assert [len(layers) for layers in taken] == [32, *[16] * 2, *[8] * 4, *[4] * 8, *[2] * 33]
    for start, end in ((0, 1), (1, 3), (3, 7), (7, 15), (16, 32), (32, 48)):
        assert sorted(layer for layers in taken[start:end] for layer in layers) == [*range(32)]


def test_a_failed_root_keeps_the_last_good_one_and_is_counted() -> None:
    weight, grads = problem((6, 4), 3, torch.float32)
    param = Parameter(weight)
    optimizer = Shampoo([("mlp.up", param)], precondition_interval=1, tolerated_failures=1)
    param.grad = grads[0]
    optimizer.step()
    good = optimizer.state[param]["block_0/root_0"].clone()
    factor = optimizer.state[param]["block_0/factor_0"].clone()

    def broken(matrix: Tensor) -> Any:
        raise torch.linalg.LinAlgError("no convergence")

    with mock.patch.object(torch.linalg, "eigh", broken):
        param.grad = grads[1]
        optimizer.step()
        assert torch.equal(optimizer.state[param]["block_0/root_0"], good)
        assert not torch.equal(optimizer.state[param]["block_0/factor_0"], factor)
        assert optimizer.failures.total == {"mlp.up": 2}  # one for each dimension
        param.grad = grads[2]
        with pytest.raises(RootError, match=r"layer 'mlp.up': .*2 times in a row"):
            optimizer.step()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 1)])
def test_rank_deficient_gradients_take_finite_steps_of_the_grafted_length(
    rows: int, columns: int
) -> None:
    """One sample, or half of the rows and columns never used: the factors are singular."""
    generator = torch.Generator().manual_seed(0)
    param = Parameter(torch.zeros(8, 6))
    optimizer = Shampoo([param], precondition_interval=1)
    for _ in range(5):
        left = torch.randn(8, 1, generator=generator)
        left[:: rows + 1] = 0 if rows > 1 else left[:: rows + 1]
        param.grad = left @ torch.randn(1, 6, generator=generator)
        optimizer.step()
    assert bool(torch.isfinite(param).all())
    (stats,) = optimizer.layer_stats().values()
    assert 0 < float(stats["update_norm"]) <= 48**0.5 * 2
    assert 0 < float(stats["cosine"]) <= 1
    assert 1e4 < float(stats["condition_number"]) < 1.1e5  # the ridge's


def test_zero_gradients_move_nothing() -> None:
    param = Parameter(torch.ones(4, 3))
    optimizer = Shampoo([param], lr=1.0)
    param.grad = torch.zeros(4, 3)
    optimizer.step()
    assert torch.equal(param, torch.ones(4, 3))
    assert all(
        bool(torch.isfinite(v)) for s in optimizer.layer_stats().values() for v in s.values()
    )


@pytest.mark.parametrize(
    ("option", "value", "accepted"),
    [
        ("factor_beta", 1.1, "in [0, 1] or None"),
        ("exponent", 0.0, "> 0 or None"),
        ("ridge", 0.0, "in (0, 1)"),
        ("momentum", 1.0, "in [0, 1)"),
        ("start_preconditioning_step", 0, "a whole number >= 1"),
        ("precondition_interval", 1.5, "a whole number >= 1"),
        ("block_size", 0, "a whole number >= 1"),
        ("grafting", "lamb", "one of 'adam', 'rmsprop', 'adagrad', 'sgd', 'none'"),
        ("decay", "both", "one of 'decoupled', 'l2'"),
        ("betas", (0.9, 1.0), "two numbers in [0, 1)"),
        ("lr", -1.0, "in [0, inf)"),
        ("weight_decay", float("nan"), "in [0, inf)"),
        ("tolerated_failures", -1, ">= 0"),
    ],
)
def test_options_out_of_range_are_refused(option: str, value: Any, accepted: str) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 - the message is compared whole
        Shampoo([Parameter(torch.ones(2, 2))], **{option: value})
    shown = repr(value) if isinstance(value, str) else value
    assert str(refusal.value) == f"{option} must be {accepted}, got {shown}"


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(ValueError, match="momentum must be > 0 with nesterov"):
        Shampoo([Parameter(torch.ones(2, 2))], nesterov=True)
