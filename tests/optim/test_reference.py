"""The updates are the papers', number by number."""

import numpy as np
import pytest
import torch
from optimizer_references import lars_to_the_letter
from optimizer_rows import (
    LAMB_OPTIONS,
    LARS_OPTIONS,
    NUM_LAYERS,
    OUR_ROWS,
    ROWS,
    Row,
    make_grads,
    make_layers,
    same_bits,
    take_steps,
)
from torch import Tensor

from largebatch.optim import LAMB, LARS
from largebatch.optim.layerwise.chunks import CPU_CHUNK_ELEMENTS
from largebatch.optim.math.adam import bias_correction
from largebatch.optim.math.trust_ratio import trust_ratio

NUM_STEPS = 60
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}

each_of_ours = pytest.mark.parametrize("row", OUR_ROWS, ids=lambda row: row.name)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def warmup(lr: float) -> list[float]:
    return [lr * min(1.0, (step + 1) / 20) for step in range(NUM_STEPS)]


def relative_error(actual: Tensor, expected: np.ndarray, start: Tensor) -> float:
    """‖actual - expected‖ against the layer's size at the start or the end, whichever is larger.

    A layer that moved from 1 to 0.001 carries the rounding of numbers near 1.
    """
    difference, size = actual.detach().double().numpy() - expected, max(norm(start), norm(expected))
    return norm(difference) / size


def norm(values: Tensor | np.ndarray) -> float:
    return float(np.linalg.norm(np.ravel(values)))


@pytest.mark.parametrize(
    ("row", "dtype"),
    # The rounding of torch's own optimizers in FP32 is not ours to bound.
    [(row, dtype) for row in ROWS for dtype in TOLERANCE if row.ours or dtype == torch.float64],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_matches_the_reference_under_a_warmup(row: Row, dtype: torch.dtype) -> None:
    params, grads, lrs = make_layers(dtype), make_grads(NUM_STEPS, dtype), warmup(row.lr)
    expected = [
        row.expected(param, layer_grads, lrs)
        for param, layer_grads in zip(params, zip(*grads, strict=True), strict=True)
    ]
    optimizer = row.make(params)
    for lr, step_grads in zip(lrs, grads, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        take_steps(optimizer, params, [step_grads])
    for param, weights, start in zip(params, expected, make_layers(), strict=True):
        assert relative_error(param, weights, start.detach()) < TOLERANCE[dtype]


@each_dtype
@each_of_ours
def test_each_group_follows_its_own_options(row: Row, dtype: torch.dtype) -> None:
    params, grads = make_layers(dtype), make_grads(NUM_STEPS, dtype)
    half = NUM_LAYERS // 2
    settings = [{}] * half + [{"adapt": False, "weight_decay": 0.0}] * (NUM_LAYERS - half)
    lrs = [row.lr] * half + [row.lr / 10] * (NUM_LAYERS - half)
    expected = [
        row.expected(param, layer_grads, [lr] * NUM_STEPS, **setting)
        for param, layer_grads, lr, setting in zip(
            params, zip(*grads, strict=True), lrs, settings, strict=True
        )
    ]
    unscaled = {"params": params[half:], "adapt": False, "weight_decay": 0.0, "lr": row.lr / 10}
    optimizer = row.make([{"params": params[:half]}, unscaled])
    take_steps(optimizer, params, grads)
    for param, weights, start in zip(params, expected, make_layers(), strict=True):
        assert relative_error(param, weights, start.detach()) < TOLERANCE[dtype]


@each_of_ours
def test_bf16_parameters_take_the_fp32_step_rounded_once(row: Row) -> None:
    params, grads = make_layers(torch.bfloat16), make_grads(20, torch.bfloat16)
    twins = [torch.nn.Parameter(param.detach().float()) for param in params]
    optimizer, twin_optimizer = row.make(params), row.make(twins)
    for step_grads in grads:
        take_steps(optimizer, params, [step_grads])
        take_steps(twin_optimizer, twins, [[grad.float() for grad in step_grads]])
        assert same_bits(params, [twin.bfloat16() for twin in twins])
        for twin in twins:
            twin.data = twin.data.bfloat16().float()


def test_lars_is_algorithm_1_to_the_letter_while_lr_is_constant() -> None:
    options = {key: LARS_OPTIONS[key] for key in ("momentum", "weight_decay", "trust_coefficient")}
    params, grads = make_layers(torch.float64)[:-1], make_grads(NUM_STEPS, torch.float64)
    lrs = [0.5] * NUM_STEPS
    expected = [
        lars_to_the_letter(
            param.detach().numpy(), [step[layer].numpy() for step in grads], lrs, **options
        )
        for layer, param in enumerate(params)
    ]
    optimizer = LARS(params, lr=0.5, eps=0.0, **options)
    take_steps(optimizer, params, [step_grads[:-1] for step_grads in grads])
    for param, weights, start in zip(params, expected, make_layers()[:-1], strict=True):
        assert relative_error(param, weights, start.detach()) < 1e-13


def test_lamb_without_adaptation_is_torch_adamw() -> None:
    ours, theirs, grads = make_layers(), make_layers(), make_grads(NUM_STEPS)
    take_steps(LAMB([{"params": ours, "adapt": False}], **LAMB_OPTIONS), ours, grads)
    take_steps(torch.optim.AdamW(theirs, **LAMB_OPTIONS), theirs, grads)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_without_adaptation_is_torch_sgd(nesterov: bool) -> None:
    double = torch.float64
    ours, theirs, grads = make_layers(double), make_layers(double), make_grads(NUM_STEPS, double)
    options = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1, "nesterov": nesterov}
    take_steps(LARS([{"params": ours, "adapt": False}], **options), ours, grads)
    take_steps(torch.optim.SGD(theirs, **options), theirs, grads)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_lamb_step_moves_each_layer_by_lr_times_its_norm_from_the_first_step_on() -> None:
    params, grads = make_layers()[:-1], make_grads(10)
    optimizer = LAMB(params, lr=0.01)
    for step_grads in grads:
        before = [param.detach().clone() for param in params]
        take_steps(optimizer, params, [step_grads[:-1]])
        for param, old in zip(params, before, strict=True):
            moved = (param.detach() - old).norm() / old.norm()
            torch.testing.assert_close(moved, torch.tensor(0.01), rtol=1e-4, atol=0)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 0.999999])
@pytest.mark.parametrize("step", [1, 10, 1_000_000])
def test_bias_correction_keeps_fp32_accuracy(beta: float, step: int) -> None:
    corrected = bias_correction(torch.tensor(float(step)), beta)
    assert corrected.dtype == torch.float32
    assert corrected.item() == pytest.approx(float(1 - np.longdouble(beta) ** step), rel=3e-7)


@each_of_ours
def test_memory_layout_does_not_matter(row: Row) -> None:
    plain, grads = make_layers()[4:5], [step_grads[4:5] for step_grads in make_grads(10)]
    strided = [torch.nn.Parameter(plain[0].detach().to(memory_format=torch.channels_last))]
    take_steps(row.make(plain), plain, grads)
    take_steps(row.make(strided), strided, grads)
    assert not strided[0].is_contiguous()
    torch.testing.assert_close(strided, plain)


def test_a_zero_norm_gives_ratio_one() -> None:
    weight_norm, update_norm = (
        torch.tensor([0.0, 2.0, 0.0, 2.0]),
        torch.tensor([3.0, 0.0, 0.0, 4.0]),
    )
    ratio = trust_ratio(weight_norm, update_norm, trust_coefficient=0.1, weight_decay=0.5, eps=1.0)
    assert ratio.tolist() == pytest.approx([1.0, 1.0, 1.0, 0.1 * 2 / (4 + 0.5 * 2 + 1)])
    assert trust_ratio(weight_norm, update_norm, adapt=False).tolist() == [1.0] * 4


def test_a_large_layer_that_is_not_contiguous_has_the_right_norm() -> None:
    param = torch.nn.Parameter(torch.randn(2048, 2048, generator=torch.Generator()).t())
    param.grad = torch.ones_like(param)
    optimizer = LAMB([param], lr=1e-3)
    exact = param.detach().double().norm()
    optimizer.step()
    torch.testing.assert_close(
        optimizer.layer_stats()[0]["weight_norm"].double(), exact, rtol=2e-7, atol=0
    )


@each_of_ours
def test_a_layer_cut_into_many_chunks_has_the_norms_of_the_whole(row: Row) -> None:
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(3, CPU_CHUNK_ELEMENTS, generator=generator, dtype=torch.float64)
    params = [torch.nn.Parameter(large + 1), torch.nn.Parameter(torch.empty(0, 5))]
    weight_norm, update = params[0].detach().norm(), large.clone()
    optimizer = row.make(params, lr=1e-3)
    params[0].grad, params[1].grad = large.clone(), torch.empty(0, 5)
    optimizer.step()
    stats = optimizer.layer_stats()
    torch.testing.assert_close(stats[0]["weight_norm"], weight_norm)
    if row.optimizer is LARS:
        torch.testing.assert_close(stats[0]["update_norm"], update.norm())
    expected = row.expected((large + 1), [large], [1e-3])
    torch.testing.assert_close(params[0].detach(), torch.from_numpy(expected))
    assert stats[1]["weight_norm"] == 0
