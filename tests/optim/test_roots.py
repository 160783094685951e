"""Inverse roots and eigenbases against what defines them, in FP64, and what happens where there is
none."""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from largebatch.optim.math.matrix_roots import (
    FailureReports,
    Failures,
    RootError,
    eigenbasis,
    full_precision,
    inverse_root,
    refined_basis,
    symmetric_eigen,
)

UNIT = 2.0**-24  # FP32's rounding error


def spd(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A symmetric FP64 matrix of these eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    n = eigenvalues.numel()
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    matrix = (basis * eigenvalues.double()) @ basis.T
    return (matrix + matrix.T) / 2


def ridged(matrix: Tensor, ridge: float) -> Tensor:
    """A + ridge · λ_max · I in FP64."""
    exact = matrix.double()
    largest = torch.linalg.eigvalsh(exact)[-1]
    return exact + ridge * largest * torch.eye(matrix.shape[0], dtype=torch.float64)


def residual(root: Tensor, matrix: Tensor, p: int) -> float:
    """‖Rᵖ A - I‖₂: how far R is from an inverse p-th root of A."""
    product = torch.linalg.matrix_power(root.double(), p) @ matrix
    return float(torch.linalg.matrix_norm(product - torch.eye(matrix.shape[0]), 2))


@pytest.fixture
def medium_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


LARGE = pytest.param(1024, marks=pytest.mark.matrix)


@pytest.mark.parametrize("n", [1, 2, 17, 128, LARGE])
@pytest.mark.parametrize("p", [2, 4, 6])
def test_root_of_a_well_conditioned_matrix(n: int, p: int) -> None:
    """FP32: an error of each root of a few units n turns into p times as much of a residual."""
    matrix = spd(torch.linspace(1, 10, n)).float()
    root = inverse_root(matrix, p)
    assert residual(root.matrix, ridged(matrix, 1e-6), p) < 20 * p * math.sqrt(n) * 10 * UNIT
    assert torch.equal(root.matrix, root.matrix.T)


@pytest.mark.parametrize("n", [17, 128, LARGE])
@pytest.mark.parametrize(("p", "ridge"), [(2, 1e-6), (4, 1e-6), (4, 1e-4)])
def test_root_of_an_ill_conditioned_matrix(n: int, p: int, ridge: float) -> None:
    """The residual is bounded by what the condition number, 1 / ridge at most, leaves of FP32."""
    matrix = spd(torch.logspace(-12, 0, n)).float()
    root = inverse_root(matrix, p, ridge)
    assert residual(root.matrix, ridged(matrix, ridge), p) < 4 * math.sqrt(n) * UNIT / ridge
    assert float(root.condition) == pytest.approx(1 / ridge, rel=0.2 if ridge < 1e-5 else 0.01)


@pytest.mark.parametrize("n", [17, 128, LARGE])
@pytest.mark.parametrize("p", [1, 2, 4, 2.5])
def test_root_in_fp64_is_exact(n: int, p: float) -> None:
    values = torch.logspace(-9, 0, n, dtype=torch.float64)
    root = inverse_root(spd(values), p, ridge=1e-6)
    reference = spd((values + 1e-6) ** (-1 / p))
    error = torch.linalg.matrix_norm(root.matrix - reference, 2)
    assert float(error / torch.linalg.matrix_norm(reference, 2)) < 1e-8
    assert float(root.condition) == pytest.approx((1 + 1e-6) / (1e-9 + 1e-6), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e12])
def test_the_ridge_is_relative(scale: float) -> None:
    """Gradients s times as large give a root s^(-2/p) times as large, nothing else."""
    matrix = spd(torch.logspace(-3, 0, 24)).float()
    scaled, plain = inverse_root(matrix * scale, 4), inverse_root(matrix, 4)
    torch.testing.assert_close(scaled.matrix * scale**0.25, plain.matrix, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(scaled.condition, plain.condition, rtol=1e-3, atol=0)


@pytest.mark.parametrize("rank", [1, 5, 31])
def test_rank_deficient_matrices_have_a_bounded_root(rank: int) -> None:
    """G Gᵀ of few samples: beyond its range the root is that of the ridge."""
    generator = torch.Generator().manual_seed(rank)
    samples = torch.randn(32, rank, generator=generator, dtype=torch.float64)
    matrix = samples @ samples.T
    root = inverse_root(matrix.float(), 4, ridge=1e-4)
    reference = inverse_root(matrix, 4, ridge=1e-4)
    largest = float(torch.linalg.matrix_norm(reference.matrix, 2))
    assert float((root.matrix - reference.matrix).abs().max()) < 1e-3 * largest
    lam = float(torch.linalg.eigvalsh(matrix)[-1])
    assert largest == pytest.approx((1e-4 * lam) ** -0.25, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_root_of_zero_is_the_identity(dtype: torch.dtype) -> None:
    root = inverse_root(torch.zeros(5, 5, dtype=dtype), 4)
    assert torch.equal(root.matrix, torch.eye(5, dtype=dtype))
    assert float(root.condition) == 1


def test_subnormal_matrices_have_finite_roots() -> None:
    root = inverse_root(spd(torch.ones(4)).float() * 1e-38, 4)
    assert bool(torch.isfinite(root.matrix).all())


@pytest.mark.parametrize(("p", "ridge", "name"), [(0, 1e-6, "p"), (4, 0.0, "ridge")])
def test_options_out_of_range_are_refused(p: float, ridge: float, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be > 0"):
        inverse_root(torch.eye(2), p, ridge)


def test_global_precision_does_not_matter(medium_precision: None) -> None:
    """Neither is it changed; the products alone would differ where the processor has bf16."""
    matrix = spd(torch.logspace(-6, 0, 256)).float()
    seen = []
    eigh = torch.linalg.eigh

    def spy(*args: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(torch.get_float32_matmul_precision())
        return eigh(*args)

    with mock.patch.object(torch.linalg, "eigh", spy):
        loose = inverse_root(matrix, 4), refined_basis(matrix, torch.eye(256)).basis
    assert seen == ["highest"]
    assert torch.get_float32_matmul_precision() == "medium"
    torch.set_float32_matmul_precision("highest")
    tight = inverse_root(matrix, 4), refined_basis(matrix, torch.eye(256)).basis
    assert torch.equal(loose[0].matrix, tight[0].matrix)
    assert torch.equal(loose[1], tight[1])


def test_precision_set_by_backend_is_put_back() -> None:
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "bf16"
        with full_precision():
            assert backend.fp32_precision == "ieee"
        assert backend.fp32_precision == "bf16"
    finally:
        backend.fp32_precision = before
    torch.set_float32_matmul_precision("highest")


class Broken:
    """An eigh that fails in the dtypes named, by raising or by NaN."""

    def __init__(self, how: str, *dtypes: torch.dtype) -> None:
        self.how, self.dtypes, self.eigh = how, dtypes, torch.linalg.eigh

    def __call__(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = self.eigh(matrix)
        if matrix.dtype not in self.dtypes:
            return values, vectors
        if self.how == "raises":
            raise torch.linalg.LinAlgError("no convergence")
        return values, vectors * math.nan


@pytest.mark.parametrize("how", ["raises", "nan"])
def test_a_failed_decomposition_is_tried_again_in_fp64(how: str) -> None:
    matrix = spd(torch.logspace(-3, 0, 16)).float()
    expected = inverse_root(matrix, 4).matrix
    with mock.patch.object(torch.linalg, "eigh", Broken(how, torch.float32)):
        found = inverse_root(matrix, 4).matrix
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["raises", "nan"])
def test_a_decomposition_that_fails_twice_says_so(how: str) -> None:
    with (
        mock.patch.object(torch.linalg, "eigh", Broken(how, torch.float32, torch.float64)),
        pytest.raises(RootError, match=r"\(16, 16\) matrix does not converge"),
    ):
        symmetric_eigen(torch.eye(16))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_matrix_that_is_not_finite_has_no_root(value: float) -> None:
    matrix = torch.eye(3)
    matrix[1, 1] = value
    with pytest.raises(RootError, match="non-finite numbers"):
        inverse_root(matrix, 2)


def test_failures_are_passed_over_counted_and_then_raised() -> None:
    failures, bad = Failures(tolerated=2), torch.full((2, 2), math.nan)
    good = torch.eye(2)
    for matrix in (bad, bad, good, bad, bad):
        root = failures.attempt(lambda m=matrix: inverse_root(m, 2), "mlp.up", part=0)
        assert (root is None) == (matrix is bad)
    assert failures.attempt(lambda: inverse_root(bad, 2), "mlp.up", part=1) is None
    assert failures.attempt(lambda: inverse_root(bad, 2), "head", part=0) is None
    assert failures.total == {"mlp.up": 5, "head": 1}
    with pytest.raises(RootError, match=r"layer 'mlp.up': .* 3 times in a row"):
        failures.attempt(lambda: inverse_root(bad, 2), "mlp.up", part=0)


@pytest.mark.parametrize("n", [1, 17, 256])
def test_the_eigenbasis_diagonalises(n: int) -> None:
    values = torch.logspace(-4, 0, n).flip(0)
    matrix = spd(values)
    found = eigenbasis(matrix.float())
    basis = found.basis.double()
    assert float(found.condition) == pytest.approx(float(values[0] / values[-1]), rel=0.01)
    diagonal = basis.T @ matrix @ basis
    assert float((basis.T @ basis - torch.eye(n)).abs().max()) < 1e-5
    assert float((diagonal - torch.diag(values.double())).abs().max()) < 1e-5


def test_qr_steps_converge_to_the_eigenbasis() -> None:
    """At the rate of orthogonal iteration: an angle shrinks by λ_j / λ_i = 1/2 a step."""
    values = 2.0 ** -torch.arange(8, dtype=torch.float64)
    matrix, exact = spd(values), eigenbasis(spd(values)).basis
    basis = torch.eye(8, dtype=torch.float64)
    for _ in range(10):
        basis = refined_basis(matrix, basis).basis
    early = (basis.T @ exact).abs().fill_diagonal_(0).max()
    for _ in range(10):
        _, _, condition = refined = refined_basis(matrix, basis)
        basis = refined.basis
    assert float(condition) == pytest.approx(2.0**7, rel=1e-3)
    late = (basis.T @ exact).abs().fill_diagonal_(0).max()
    assert float(late / early) == pytest.approx(2.0**-10, rel=0.2)
    torch.testing.assert_close(
        (basis.T @ exact).abs(), torch.eye(8, dtype=torch.float64), atol=1e-4, rtol=0
    )


def test_a_qr_step_tells_the_condition_while_the_basis_turns() -> None:
    """From no basis at all: at once within a factor of 5, where the diagonal says 6."""
    matrix = spd(torch.logspace(-3, 0, 24))
    basis, told = torch.eye(24, dtype=torch.float64), []
    for _ in range(3):
        refined = refined_basis(matrix, basis)
        basis, told = refined.basis, [*told, float(refined.condition)]
    assert told[0] > 1000 / 5
    assert told[-1] == pytest.approx(1000, rel=0.15)


def test_a_qr_step_keeps_an_eigenbasis_and_sorts_it() -> None:
    """The columns come in the order of the eigenvalues, none of them turned around."""
    values = torch.tensor([1.0, 4.0, 2.0, 8.0], dtype=torch.float64)
    refined = refined_basis(torch.diag(values), torch.eye(4, dtype=torch.float64))
    assert torch.equal(refined.basis, torch.eye(4, dtype=torch.float64)[:, [3, 1, 2, 0]])
    assert refined.order.tolist() == [3, 1, 2, 0]
    assert float(refined.condition) == 8


def test_a_qr_step_on_a_rank_deficient_matrix_stays_orthonormal() -> None:
    matrix = spd(torch.tensor([1.0] + [0.0] * 7)).float()
    basis = refined_basis(matrix, eigenbasis(spd(torch.ones(8), seed=1)).basis.float()).basis
    torch.testing.assert_close(basis.T @ basis, torch.eye(8), atol=1e-6, rtol=0)


def test_a_qr_step_that_is_not_finite_says_so() -> None:
    with pytest.raises(RootError, match="QR of a"):
        refined_basis(torch.full((2, 2), math.nan), torch.eye(2))


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("exponent", [-44, -42, -40, -37, -35, -25, -10, 20, 36])
def test_a_root_is_finite_at_every_scale(p: float, exponent: int) -> None:
    """It is that of the plain matrix, scaled; below 1e-36 a matrix is zero."""
    matrix = spd(torch.tensor([1.0, 0.5, 0.1]))
    root = inverse_root((matrix * 10.0**exponent).float(), p).matrix.double()
    plain = inverse_root(matrix, p).matrix * 10.0 ** (-exponent / p)
    expected = plain if exponent > -36 else torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(root, expected, rtol=1e-5, atol=1e-5 * float(expected.max()))


def test_a_root_that_fp32_does_not_hold_is_a_failed_one() -> None:
    with pytest.raises(RootError, match="left non-finite numbers"):
        inverse_root(torch.eye(2) * 1e-30, 2 / 3)


@pytest.mark.parametrize("scale", [1e-44, 1e-37, 1e-30, 1e30])
def test_a_basis_is_orthonormal_at_every_scale(scale: float) -> None:
    """And that of a matrix that counts as zero is the one before."""
    matrix, before = spd(torch.tensor([4.0, 2.0, 1.0, 0.0])).float(), torch.eye(4).roll(1, 0)
    refined = refined_basis(matrix * scale, before)
    as_before = before, torch.arange(4), torch.ones(())
    plain = refined_basis(matrix, before) if scale > 1e-36 else as_before
    torch.testing.assert_close(tuple(refined), tuple(plain))
    basis = eigenbasis(matrix * scale).basis
    torch.testing.assert_close(basis.T @ basis, torch.eye(4), atol=1e-6, rtol=0)


def test_failures_that_others_wait_for_are_noted() -> None:
    failures, bad = Failures(tolerated=1), torch.full((2, 2), math.nan)
    reports = FailureReports(failures)
    work_group: Any = SimpleNamespace(
        names=["down", "up"], device=torch.device("cpu"), dtype=torch.float32, group="of others"
    )
    for matrix in (bad, bad, bad):
        assert failures.attempt(lambda m=matrix: inverse_root(m, 2), "up", 0, raises=False) is None
    reports.receive(work_group, reports.own(work_group))
    expected = r"layer 'up': .* asked of non-finite numbers, 2 times in a row"
    with pytest.raises(RootError, match=expected):
        reports.heed()
    assert failures.attempt(lambda: inverse_root(bad, 2), "up", 0, raises=False) is None
    failures.attempt(lambda: inverse_root(torch.eye(2), 2), "up", 0, raises=False)
    reports.receive(work_group, counts := reports.own(work_group))
    assert torch.equal(counts, torch.zeros(6))
    reports.heed()
