"""Mano's steps are those of its paper's Algorithm 1."""

from typing import Any

import numpy as np
import pytest
import second_order_references as references
import torch
from torch import Tensor
from torch.nn import Parameter

from largebatch.optim import Mano

OPTIONS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "mu": 0.9, "nesterov": False}
# A tensor, how its group is split, and its matrices as indices and shapes.
CUTS: dict[str, tuple[tuple[int, ...], dict[str, Any], list[tuple[Any, tuple[int, int]]]]] = {
    "matrix": ((6, 4), {}, [(..., (6, 4))]),
    "kernel": ((6, 3, 2, 2), {"algorithm": "mano"}, [(..., (6, 12))]),
    "columns": (
        (4, 7), {"norm_groups": (3, 4), "norm_dim": 1},
        [((slice(None), slice(0, 3)), (4, 3)), ((slice(None), slice(3, 7)), (4, 4))],
    ),
    "experts": ((3, 4, 5), {"norm_groups": 3}, [(k, (4, 5)) for k in range(3)]),
}  # fmt: skip


def problem(shape: tuple[int, ...], steps: int = 5) -> tuple[Tensor, list[Tensor]]:
    make = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
    return torch.randn(shape, **make), [torch.randn(shape, **make) for _ in range(steps)]


def stepped(weight: Tensor, group: dict[str, Any], grads: list[Tensor], **options: Any) -> Tensor:
    param = Parameter(weight.clone())
    optimizer = Mano([("other", Parameter(torch.ones(2, 2)))], **options)
    optimizer.add_param_group({"params": [("weight", param)], **group})
    for grad in grads:
        param.grad = grad.to(param.dtype)
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_steps_are_those_of_the_paper_for_each_matrix(cut: Any, nesterov: bool) -> None:
    shape, group, matrices = cut
    weight, grads = problem(shape)
    ours = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
    found = stepped(weight, group, grads, **ours).numpy()
    for index, own in matrices:
        matrix = references.ManoMatrix(
            weight.numpy()[index].reshape(own), OPTIONS | {"nesterov": nesterov}
        )
        for grad in grads:
            matrix.step(grad.numpy()[index].reshape(own))
        assert np.abs(found[index].reshape(own) - matrix.w).max() < 1e-12


def test_fp32_steps_are_near() -> None:
    weight, grads = problem((30, 20))
    exact = stepped(weight, {}, grads, lr=0.02)
    torch.testing.assert_close(stepped(weight.float(), {}, grads, lr=0.02), exact.float())


def test_columns_without_weights_or_gradients_are_defined() -> None:
    """A column of zeros has no direction to leave out; one without a gradient keeps still."""
    weight, (grad,) = problem((4, 3), 1)
    weight[:, 0], grad[:, 1] = 0.0, 0.0
    moved = (weight - stepped(weight, {}, [grad], lr=0.1)) / (0.1 * 0.2 * 2)
    torch.testing.assert_close(moved[:, 0], grad[:, 0] / grad[:, 0].norm())
    assert not moved[:, 1].any()


def test_a_gradient_along_the_weights_leaves_rounding_alone() -> None:
    """Where nothing is across them, what is left is shorter than a step, and finite."""
    weight, _ = problem((8, 8))
    weight = weight.float()
    moved = weight - stepped(weight, {}, [weight.double()], lr=1.0)
    assert bool(moved.isfinite().all())
    assert float(moved.norm()) < 0.2 * 0.2 * 8
