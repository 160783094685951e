"""Inverse roots by matrix products: what defines them, in FP64, and what tells a wrong one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import second_order_references as references
import torch
from test_roots import residual, ridged, spd
from test_shampoo import DEFAULTS, error, problem, stepped
from torch import Tensor, nn

from largebatch.optim import KFAC
from largebatch.optim.kronecker.damping import Damping, decomposed, inverses_by_products
from largebatch.optim.math import decompositions
from largebatch.optim.math.matrix_roots import inverse_root
from largebatch.optim.math.newton_schulz import Polynomial
from largebatch.optim.math.root_products import (
    ORDERS,
    inverse_roots,
    largest_eigenvalues,
    polynomials,
)

SPECTRA = {
    "even": torch.linspace(1, 10, 48),
    "steep": torch.logspace(-12, 0, 48),
    "low rank": torch.cat([torch.zeros(40), torch.linspace(0.1, 1, 8)]),
    "one": torch.cat([torch.zeros(47), torch.ones(1)]),
    "equal": torch.ones(48),
}
each_spectrum = pytest.mark.parametrize("name", SPECTRA)


def by_products(matrix: Tensor, p: int, ridge: float) -> tuple[Any, bool]:
    (root,), holds = inverse_roots([matrix], p, ridge)
    return root, bool(holds)


def exact(matrix: Tensor, p: int, ridge: float) -> Tensor:
    values, vectors = np.linalg.eigh(ridged(matrix, ridge).numpy())
    return torch.from_numpy((vectors * values ** (-1 / p)) @ vectors.T)


def far(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@each_spectrum
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("ridge", [1e-5, 1e-3])
def test_roots_are_as_near_as_those_of_eigh(name: str, p: int, ridge: float) -> None:
    """Of a steep spectrum far nearer; at most twice as far where `eigh` meets equal eigenvalues."""
    matrix = spd(SPECTRA[name]).float()
    root, holds = by_products(matrix, p, ridge)
    assert holds
    assert torch.equal(root.matrix, root.matrix.T)
    expected, by_eigh = exact(matrix, p, ridge), inverse_root(matrix, p, ridge)
    bound = (0.2 if name == "steep" else 2.5) * far(by_eigh.matrix, expected)
    assert far(root.matrix, expected) < max(bound, 2e-6 * p)
    condition = torch.linalg.cond(ridged(matrix, ridge))
    assert float(root.condition) == pytest.approx(float(condition), rel=0.02)


@each_spectrum
@pytest.mark.parametrize("p", ORDERS)
def test_roots_in_fp64_are_exact(name: str, p: int) -> None:
    matrix = spd(SPECTRA[name])
    root, holds = by_products(matrix, p, 1e-6)
    assert holds
    assert far(root.matrix, exact(matrix, p, 1e-6)) < 1e-8
    assert residual(root.matrix, ridged(matrix, 1e-6), p) < 1e-6


@each_spectrum
def test_the_largest_eigenvalue_is_found_among_near_ones(name: str) -> None:
    found = largest_eigenvalues(spd(SPECTRA[name])[None])
    assert float(found) == pytest.approx(float(SPECTRA[name].amax()), rel=1e-6)
    near = torch.cat([torch.ones(1), torch.full((47,), 1 - 1e-5)]).double()
    assert float(largest_eigenvalues(spd(near)[None])) == pytest.approx(1, rel=1e-7)


@pytest.mark.parametrize("least", [1e-6, 1e-4, 1e-3, 0.004, 0.05, 0.2, 0.7])
def test_polynomials_take_all_from_the_least_to_one(least: float) -> None:
    """And a little above, where rounding puts a largest eigenvalue."""
    x = np.geomspace(least, 1.005, 10_000)
    for a, b, c in polynomials(least):
        x = a * x + b * x**3 + c * x**5
    assert np.abs(x - 1).max() < 1e-11


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e12, 1e30])
def test_the_ridge_is_relative(scale: float) -> None:
    matrix = spd(torch.logspace(-3, 0, 24)).float()
    (plain, scaled), holds = inverse_roots([matrix, matrix * scale], 4, 1e-5)
    assert holds.tolist() == [True, True]
    torch.testing.assert_close(scaled.matrix * scale**0.25, plain.matrix, rtol=1e-4, atol=1e-4)


def test_zeros_have_the_identity_and_what_is_not_finite_nothing() -> None:
    zeros, good = torch.zeros(5, 5), spd(torch.linspace(1, 2, 5)).float()
    bad = [good.clone(), good.clone()]
    bad[0][3, 1], bad[1][1, 1] = torch.nan, torch.inf
    found, holds = inverse_roots([zeros, *bad, good, zeros + 1e-37 * torch.eye(5)], 4, 1e-5)
    assert holds.tolist() == [True, False, False, True, True]
    for root in (found[0], found[-1]):
        assert torch.equal(root.matrix, torch.eye(5))
        assert float(root.condition) == 1
    alone, _ = by_products(good, 4, 1e-5)
    torch.testing.assert_close(found[3].matrix, alone.matrix)


def test_what_the_dtype_cannot_tell_does_not_hold() -> None:
    """A ridge below FP32's digits, and an eigenvalue below 0."""
    matrix = spd(SPECTRA["low rank"]).float()
    assert not by_products(matrix, 4, 1e-9)[1]
    assert not by_products(spd(torch.tensor([-0.5, 1.0, 1.0])).float(), 2, 1e-5)[1]


@pytest.mark.parametrize("p", ORDERS)
def test_an_eigenvalue_that_eats_the_ridge_up_does_not_hold(p: int) -> None:
    """As rounding may leave it: `inverse_root` takes it for 0."""
    values = torch.cat([torch.linspace(0.1, 1, 15), torch.tensor([-0.9e-3])])
    assert not by_products(spd(values).float(), p, 1e-3)[1]
    assert by_products(spd(values.clamp(min=0)).float(), p, 1e-3)[1]


@pytest.mark.parametrize("p", ORDERS)
def test_a_root_of_what_overflows_is_no_zero(p: int) -> None:
    """λ_max is 8 times the largest entry, and more than FP32 holds."""
    root, holds = by_products(torch.full((8, 8), 8e37), p, 1e-3)
    exact_root = exact(torch.full((8, 8), 8e37).double(), p, 1e-3)
    assert holds
    assert far(root.matrix, exact_root) < 1e-4


def test_too_few_steps_do_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """One direction of 48 that has not come to 1."""
    matrix = spd(torch.cat([torch.ones(47), torch.zeros(1)])).float()
    assert by_products(matrix, 2, 1e-5)[1]

    def few(least: float) -> list[Polynomial]:
        return polynomials(least)[:5]

    monkeypatch.setattr("largebatch.optim.math.root_products.polynomials", few)
    assert not by_products(matrix, 2, 1e-5)[1]


# Optimizers on a device without decompositions ---------------------------------------------------


@pytest.fixture
def no_decompositions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that has none, and no host to ask."""

    def refuse(*_: object) -> None:
        raise AssertionError("the host was asked")

    monkeypatch.setattr(decompositions, "DECOMPOSE", frozenset())
    monkeypatch.setattr(decompositions, "_on_host", refuse)
    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", refuse)


@pytest.mark.parametrize(
    "options",
    [
        {"precondition_interval": 1},
        {"precondition_interval": 3},
        {"exponent": 0.5, "precondition_interval": 1},
        {"exponent": 1.0, "precondition_interval": 1, "grafting": "none", "ridge": 1e-2},
        {"sides": "one", "precondition_interval": 1},
        {"betas": (0.0, 0.99), "factor_beta": 1.0, "grafting": "none", "precondition_interval": 1},
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_decompositions")
def test_shampoo_is_that_of_the_formula(options: dict[str, Any]) -> None:
    for dtype, limit in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        weight, grads = problem((6, 4), 10, dtype)
        arrays = [grad.double().numpy() for grad in grads]
        every = DEFAULTS | options
        expected = references.run(
            references.ShampooBlock, weight.double().numpy(), arrays, every, None
        )
        found, _ = stepped(weight, grads, merge_dims=False, **options)
        assert error(found, expected) < limit


@pytest.mark.parametrize("form", ["factored_eigen", "factored_cholesky"])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_damped_inverses_are_those_of_decompositions(
    form: str, relative: bool, scale: float
) -> None:
    """Of three layers of two groups, a diagonal on one side: as if they were groups of one."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(6, 16, 4, generator=generator, dtype=torch.float64)
    dense = columns @ columns.mT * scale
    diagonal = torch.rand(6, 9, generator=generator, dtype=torch.float64)
    damping = Damping(0.03, relative, 1e-6)
    roots, hold = inverses_by_products(form, damping, diagonal, dense, (True, False))
    assert bool(hold.all())
    for group in range(6):
        own = diagonal[group : group + 1], dense[group : group + 1]
        expected = decomposed(form, damping, *own, (True, False))
        for name in ("inverse_in", "inverse_out"):
            assert far(roots[name][group], expected[name][0]) < 1e-7
        assert float(roots["condition"][group]) == pytest.approx(
            float(expected["condition"]), rel=0.02
        )


def test_damped_inverses_of_what_is_not_finite_do_not_hold() -> None:
    good, bad = torch.eye(3)[None], torch.full((1, 3, 3), torch.inf)
    damping = Damping(0.03, False, 1e-6)
    _, hold = inverses_by_products(
        "factored_eigen", damping, torch.cat([good, good]), torch.cat([good, bad]), (False, False)
    )
    assert hold.tolist() == [True, False]


def kfac_trained(steps: int = 6, **options: Any) -> tuple[nn.Module, KFAC]:
    """Layers of one shape and of others, convolutions in groups; two groups of parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Embedding(7, 8), *(nn.Linear(8, 8) for _ in range(3)), nn.Unflatten(1, (4, 2))),
        *(nn.Conv1d(4, 4, 2, groups=2), nn.Conv1d(4, 4, 1, groups=2), nn.Conv1d(4, 4, 1, groups=2)),
        *(nn.Flatten(), nn.Linear(4, 7)),
    ).double()
    params = [*model.parameters()]
    groups = [{"params": params[:5]}, {"params": params[5:], "damping": 0.1}]
    optimizer = KFAC(model, lr=0.1, params=groups, inverse_interval=4, **options)
    for step in range(steps):
        x, y = torch.randint(7, (2, 32), generator=torch.Generator().manual_seed(step)).unbind()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("form", ["factored_eigen", "factored_cholesky"])
@pytest.mark.parametrize(
    "options",
    [{}, {"final_damping": 1e-4, "damping_items": 100}, {"ridge": 0.0}, {"ridge": 1e-30}],
    ids=str,
)
def test_kfac_takes_the_steps_of_decompositions(
    form: str, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    options = {"graft": "none", "form": form, **options}
    expected, _ = kfac_trained(**options)
    request.getfixturevalue("no_decompositions")
    found, _ = kfac_trained(**options)
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.usefixtures("no_decompositions")
@pytest.mark.parametrize("steps", [1, 6])
def test_inverses_that_were_made_together_do_not_keep_each_other(steps: int) -> None:
    _, optimizer = kfac_trained(steps)
    inverses = [
        state[name]
        for state in optimizer.state.values()
        for name in ("inverse_in", "inverse_out")
        if name in state
    ]
    assert len(inverses) > 10
    assert all(each.untyped_storage().nbytes() == each.nbytes for each in inverses)


def test_alike_are_made_together_and_one_that_fails_goes_to_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[int, ...]] = []

    def compute(several: Sequence[Sequence[Tensor]]) -> tuple[list[tuple[Tensor]], Tensor]:
        stack = torch.stack([tensor for (tensor,) in several])
        calls.append(tuple(stack.shape))
        return [(each,) for each in -stack], stack.amax(dim=1) < 3

    def on_host(asked: Sequence[Any], device: torch.device) -> list[Any]:
        return [lambda ready=ready: ("host", *ready.tensors) for ready in asked]

    monkeypatch.setattr(decompositions, "DECOMPOSE", frozenset())
    monkeypatch.setattr(decompositions, "_on_host", on_host)

    def ask(value: float, size: int, way: bool = True) -> decompositions.Decomposition[Any]:
        return decompositions.Decomposition(
            lambda tensor: (tensor,),
            lambda: [torch.full((size,), float(value))],
            torch.device("cpu"),
            decompositions.ByProducts(size, compute) if way else None,
        )

    asked = [ask(1, 4), ask(2, 5), ask(3, 4), ask(0, 4, way=False), ask(2, 4)]
    found = [outcome() for outcome in decompositions.decompose(asked)]
    assert calls == [(3, 4), (1, 5)]
    assert [each[0] == "host" for each in found] == [False, False, True, True, False]
    values = [float(each[-1][0]) for each in found]
    assert values == [-1, -2, 3, 0, -2]
    calls.clear()
    monkeypatch.setattr(decompositions, "BATCH", 1)
    decompositions.decompose(asked)
    assert calls == [(1, 4), (1, 4), (1, 4), (1, 5)]
