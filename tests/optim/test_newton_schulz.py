"""Newton-Schulz against exact arithmetic, step by step: how near, in how many products."""

import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from largebatch.optim.math import newton_schulz
from largebatch.optim.math.newton_schulz import COEFFICIENTS, NewtonSchulz

FP64 = torch.float64


def found(method: NewtonSchulz, matrices: list[Tensor]) -> list[Tensor]:
    copies = [matrix.clone() for matrix in matrices]
    method(copies)
    return copies


def step_by_step(matrix: Tensor, coefficients: str, steps: int) -> Tensor:
    known = COEFFICIENTS[coefficients]
    x = matrix.double() / (known.slack * matrix.double().norm())
    for a, b, c in known.of(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def spectral(values: Tensor, columns: int) -> Tensor:
    """A matrix of these singular values, FP32."""
    left, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=FP64))
    right, _ = torch.linalg.qr(torch.randn(columns, len(values), dtype=FP64))
    return ((left * values) @ right.T).float()


def test_matrices_of_one_shape_go_together_and_come_out_as_alone() -> None:
    shapes = [(4, 6), (6, 4), (4, 6), (5, 5), (4, 6)]
    matrices = [torch.randn(shape, dtype=FP64) for shape in shapes]
    method = NewtonSchulz(bf16=False)
    real = NewtonSchulz.of_batch
    with mock.patch.object(NewtonSchulz, "of_batch", autospec=True, side_effect=real) as of_batch:
        together = found(method, matrices)
    assert sorted(len(call.args[1]) for call in of_batch.call_args_list) == [1, 4]
    for matrix, one in zip(matrices, together, strict=True):
        torch.testing.assert_close(one, found(method, [matrix])[0])


def test_polar_express_converges_where_jordans_does_not() -> None:
    left, _, right = torch.linalg.svd(torch.randn(20, 30, dtype=FP64))
    matrix = left @ torch.diag(torch.logspace(-2, 0, 20, dtype=FP64)) @ right[:20]
    for coefficients, worst in (("polar_express", 1e-6), ("jordan", 0.4)):
        (one,) = found(NewtonSchulz(8, coefficients, bf16=False), [matrix])
        off = (torch.linalg.svdvals(one) - 1).abs().max()
        assert worst / 10 < float(off) + 1e-7 < worst


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_two_steps_at_once_are_two_steps(coefficients: str, steps: int) -> None:
    torch.manual_seed(0)
    for shape in ((6, 20), (20, 6), (6, 10)):
        matrix = torch.randn(shape, dtype=FP64)
        expected = 3 * step_by_step(matrix, coefficients, steps)
        for dtype, worst in ((FP64, 1e-12), (torch.float32, 1e-4)):
            method = NewtonSchulz(steps, coefficients, bf16=False, length=3.0)
            (one,) = found(method, [matrix.to(dtype)])
            assert one.dtype == dtype
            assert float((one - expected).abs().max()) < worst


SPECTRA = {
    "random": None,
    "slow": torch.arange(1, 65, dtype=FP64) ** -0.5,
    "fast": torch.arange(1, 65, dtype=FP64) ** -2.0,
    "exponential": torch.logspace(0, -6, 64, dtype=FP64),
    "low rank": torch.cat([torch.ones(8, dtype=FP64), torch.zeros(56, dtype=FP64)]),
    "low rank and a rest": torch.cat([torch.ones(4, dtype=FP64), torch.full((60,), 1e-2).double()]),
}


@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA)
def test_in_bf16_two_at_once_are_as_near_as_one_by_one(values: Tensor | None) -> None:
    """Of a matrix and by its singular values, against exact steps, over a few matrices."""
    torch.manual_seed(0)
    matrices = [torch.randn(64, 256) if values is None else spectral(values, 256) for _ in range(4)]
    exact = [step_by_step(matrix, "jordan", 5) for matrix in matrices]
    one_by_one = {"jordan": replace(COEFFICIENTS["jordan"], most_by_twos=0)}
    by_twos = found(NewtonSchulz(), matrices)
    with mock.patch.object(newton_schulz, "COEFFICIENTS", one_by_one):
        singly = found(NewtonSchulz(), matrices)
    assert not torch.equal(by_twos[0], singly[0])
    for off in (
        lambda one, other: (one - other).norm() / other.norm(),
        lambda one, other: (torch.linalg.svdvals(one) - torch.linalg.svdvals(other)).abs().max(),
    ):
        errors = [
            sum(float(off(a.double(), b)) for a, b in zip(way, exact, strict=True)) / len(exact)
            for way in (by_twos, singly)
        ]
        assert errors[0] < 1.25 * errors[1] + 0.005


@pytest.mark.parametrize(
    ("coefficients", "steps", "bound"),
    [("jordan", 5, 1.27), ("jordan", 6, 1.27), ("jordan", 9, 1.27), ("polar_express", 5, 1.14)],
)
def test_in_bf16_no_singular_value_explodes(coefficients: str, steps: int, bound: float) -> None:
    """Jordan's polynomial takes those above 1.264 ever further away. The worst are some large ones
    beside many alike that are small."""
    torch.manual_seed(0)
    matrices = []
    for large in (1, 4, 16, 28):
        for small in torch.logspace(-0.3, -3, 40, dtype=FP64):
            values = torch.cat([torch.ones(large, dtype=FP64), small.expand(32 - large)])
            matrices.append(spectral(values, 64))
    together = torch.stack(found(NewtonSchulz(steps, coefficients), matrices))
    assert float(torch.linalg.matrix_norm(together, 2).max()) < bound


@pytest.mark.parametrize("shape", [(16, 64), (64, 16)])
def test_the_long_side_is_met_twice_in_two_steps(shape: tuple[int, int]) -> None:
    """Of 2 · 16³ operations 13 in two steps and 9 in one, in place of 9 in each."""
    torch_leaves_out = {torch.ops.aten.baddbmm_: lambda *shapes, **_: 2 * math.prod(shapes[1]) * 16}
    with FlopCounterMode(display=False, custom_mapping=torch_leaves_out) as counter:
        NewtonSchulz()([torch.randn(shape)])
    assert counter.get_total_flops() == (13 + 13 + 9) * 2 * 16**3
