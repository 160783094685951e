"""SOAP's steps are those of its paper's formulas: Adam's, in the eigenbasis."""

import copy
from typing import Any

import numpy as np
import pytest
import second_order_references as references
import torch
from torch import Tensor
from torch.nn import Parameter

from largebatch.optim import SOAP

DEFAULTS: dict[str, Any] = {
    "lr": 3e-3,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "factor_beta": None,
    "precondition_interval": 10,
    "decay": "decoupled",
}
VARIATIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "often": {"precondition_interval": 1},
    "decay": {"weight_decay": 0.1, "precondition_interval": 3},
    "l2": {"weight_decay": 0.1, "decay": "l2", "precondition_interval": 3},
    "factor-beta": {"factor_beta": 0.6, "precondition_interval": 2},
    "kl": {"factors": "kl", "precondition_interval": 1},
    "kl-seldom": {"factors": "kl", "precondition_interval": 3, "factor_beta": 0.8},
    "beside": {"refresh": "beside", "precondition_interval": 2},
    "beside-kl": {"refresh": "beside", "precondition_interval": 1, "factors": "kl"},
    "rms": {"update_rms": 0.2, "weight_decay": 0.1},
}


def problem(shape: tuple[int, ...], steps: int) -> tuple[Tensor, list[Tensor]]:
    """A weight and gradients whose factors have full rank and eigenvalues well apart: where they
    have not, the eigenbasis is not unique, and so is SOAP."""
    generator = torch.Generator().manual_seed(0)
    make = {"generator": generator, "dtype": torch.float64}
    scale = torch.logspace(0, -1, shape[-1], dtype=torch.float64)
    grads = [torch.randn(shape, **make) * scale for _ in range(steps)]
    return torch.randn(shape, **make), grads


def stepped(weight: Tensor, grads: list[Tensor], **options: Any) -> Tensor:
    param = Parameter(weight.clone())
    optimizer = SOAP([param], **options)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize("shape", [(4, 4), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("name", VARIATIONS)
def test_steps_are_those_of_the_formula(name: str, shape: tuple[int, ...]) -> None:
    weight, grads = problem(shape, 8)
    options = VARIATIONS[name]
    found = stepped(weight, grads, merge_dims=False, **options)
    arrays = [grad.numpy() for grad in grads]
    expected = references.run(references.SOAPBlock, weight.numpy(), arrays, DEFAULTS | options)
    assert np.linalg.norm(found.numpy() - expected) / np.linalg.norm(expected) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_in_a_full_rank_basis_is_adams_in_the_rotated_space(dtype: torch.dtype) -> None:
    """torch's Adam on the rotated weights, with the rotated average, against SOAP's step."""
    shape, generator = (12, 8), torch.Generator().manual_seed(3)
    weight, mean, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    squares = (torch.rand(shape, generator=generator) + 0.1).to(dtype)
    samples = [torch.randn(n, 3 * n, generator=generator).to(dtype) for n in shape]
    factors = [sample @ sample.T for sample in samples]
    left, right = (torch.linalg.eigh(factor.double())[1].to(dtype) for factor in factors)

    param = Parameter(weight.clone())
    optimizer = SOAP([param], lr=0.01)
    param.grad = grad.clone()
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0] |= {
        "step": torch.tensor(7.0),
        "block_0/exp_avg": mean,
        "block_0/exp_avg_sq": squares,
        "block_0/factor_0": factors[0],
        "block_0/factor_1": factors[1],
        "block_0/basis_0": left,
        "block_0/basis_1": right,
    }
    optimizer.load_state_dict(copy.deepcopy(saved))
    param.data.copy_(weight)
    param.grad = grad.clone()
    optimizer.step()

    rotated = Parameter((left.T @ weight @ right).double())
    adam = torch.optim.Adam([rotated], lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    rotated.grad = (left.T @ grad @ right).double()
    adam.state[rotated] = {
        "step": torch.tensor(7.0),
        "exp_avg": (left.T @ mean @ right).double(),
        "exp_avg_sq": squares.double(),
    }
    adam.step()
    expected = left.double() @ rotated.detach() @ right.double().T
    difference = (param.detach().double() - expected).norm() / expected.norm()
    assert float(difference) < (1e-12 if dtype == torch.float64 else 1e-6)


def test_the_first_step_is_adams() -> None:
    weight, grads = problem((5, 3), 1)
    twin = Parameter(weight.clone())
    adam = torch.optim.AdamW([twin], lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    twin.grad = grads[0].clone()
    adam.step()
    torch.testing.assert_close(stepped(weight, grads), twin.detach())


def test_the_basis_diagonalises_the_factors() -> None:
    """With a gradient of one distribution, QR steps find the eigenvectors of its covariance."""
    generator = torch.Generator().manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    scale = 4.0 ** -torch.arange(6, dtype=torch.float64)
    param = Parameter(torch.zeros(6, 40, dtype=torch.float64))
    optimizer = SOAP([param], precondition_interval=1, factor_beta=0.995)
    for _ in range(400):
        noise = torch.randn(6, 40, generator=generator, dtype=torch.float64)
        param.grad = turn @ (scale[:, None] * noise)
        optimizer.step()
    overlap = (optimizer.state[param]["block_0/basis_0"].T @ turn).abs()
    torch.testing.assert_close(overlap, torch.eye(6, dtype=torch.float64), atol=0.02, rtol=0)
    # v belongs to the same order: largest first, and 16 times as small from row to row.
    rows = optimizer.state[param]["block_0/exp_avg_sq"].mean(dim=1)
    torch.testing.assert_close(
        rows[:-1] / rows[1:], torch.full((5,), 16.0).double(), rtol=0.3, atol=0
    )


def test_the_second_moment_follows_an_exchange_of_columns() -> None:
    """Factors whose eigenvalues have changed places: the columns do, and v with them."""
    param = Parameter(torch.zeros(3, 2, dtype=torch.float64))
    optimizer = SOAP([param], precondition_interval=1, betas=(0.9, 0.9))
    param.grad = torch.ones(3, 2, dtype=torch.float64)
    optimizer.step()
    saved = optimizer.state_dict()
    squares = torch.arange(1.0, 7.0, dtype=torch.float64).view(3, 2)
    saved["state"][0] |= {
        "block_0/factor_0": torch.diag(torch.tensor([1.0, 3.0, 2.0])).double(),
        "block_0/factor_1": torch.diag(torch.tensor([2.0, 1.0])).double(),
        "block_0/basis_0": torch.eye(3).double(),
        "block_0/basis_1": torch.eye(2).double(),
        "block_0/exp_avg_sq": squares,
    }
    optimizer.load_state_dict(copy.deepcopy(saved))
    param.grad = torch.zeros(3, 2, dtype=torch.float64)
    optimizer.step()
    state = optimizer.state[param]
    torch.testing.assert_close(state["block_0/exp_avg_sq"], 0.9 * squares[[1, 2, 0]])
    torch.testing.assert_close(state["block_0/basis_0"], torch.eye(3).double()[:, [1, 2, 0]])


def test_rank_deficient_gradients_take_finite_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    param = Parameter(torch.zeros(8, 6))
    optimizer = SOAP([param], precondition_interval=2)
    for _ in range(6):
        left = torch.randn(8, 1, generator=generator)
        left[::2] = 0
        param.grad = left @ torch.randn(1, 6, generator=generator)
        optimizer.step()
    assert bool(torch.isfinite(param).all())
    for name in ("basis_0", "basis_1"):
        basis = optimizer.state[param][f"block_0/{name}"]
        torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis)), atol=1e-5, rtol=0)


def test_kl_factors_do_not_know_the_scale_of_gradients() -> None:
    """Nor do their first gradients, which may be zeros."""
    weight, grads = problem((5, 4), 6)
    found = []
    for scale in (1.0, 1e-3):
        param = Parameter(weight.clone())
        optimizer = SOAP([param], factors="kl", precondition_interval=1, eps=1e-30)
        for grad in [torch.zeros_like(weight), *grads]:
            param.grad = scale * grad
            optimizer.step()
        found.append(param.detach())
        for dim in (0, 1):
            found.append(optimizer.state[param][f"block_0/factor_{dim}"] / scale)
    for one, other in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(one, other)


def test_kl_factors_of_a_matrix_normal_are_its_covariances() -> None:
    """G = A^½ Z B^½ has them, up to a number that one gives the other."""
    generator = torch.Generator().manual_seed(0)
    make = {"generator": generator, "dtype": torch.float64}
    roots = [torch.diag(torch.logspace(0, -power, 4, dtype=torch.float64)) for power in (1, 0.5)]
    param = Parameter(torch.zeros(4, 4, dtype=torch.float64))
    optimizer = SOAP([param], factors="kl", precondition_interval=1, factor_beta=0.99)
    for _ in range(250):
        param.grad = roots[0] @ torch.randn(4, 4, **make) @ roots[1]
        optimizer.step()
    for dim, root in enumerate(roots):
        factor = optimizer.state[param][f"block_0/factor_{dim}"]
        expected = root @ root
        difference = factor / factor.trace() - expected / expected.trace()
        assert float(difference.abs().max()) < 0.1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"factors": "mine"}, "factors must be one of 'shampoo', 'kl', got 'mine'"),
        ({"update_rms": 0.0}, "update_rms must be > 0 or None, got 0.0"),
        ({"sides": "left"}, "sides must be one of 'both', 'one', got 'left'"),
        ({"hyperball": True, "weight_decay": 0.1}, "weight_decay must be 0 with hyperball"),
    ],
)
def test_options_that_there_are_not_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SOAP([Parameter(torch.ones(2, 2))], **options)


def test_a_factor_beta_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"factor_beta must be in \[0, 1\) or None, got 1"):
        SOAP([Parameter(torch.ones(2, 2))], factor_beta=1.0)
