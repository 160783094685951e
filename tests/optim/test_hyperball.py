"""Weights on a sphere, whose steps are a fraction of its radius, for optimizers of matrices."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import second_order_references as references
import torch
from contract_rows import set_amp
from torch import Tensor
from torch.nn import Parameter

from largebatch.optim import SOAP, Muon, Shampoo, SOAPMuon

LR, STEPS = 0.1, 6
Make = Callable[..., torch.optim.Optimizer]
MAKES: dict[str, Make] = {
    "Muon": lambda params, **more: Muon(params, ns_precision="fp32", **more),
    "SOAP": lambda params, **more: SOAP(params, precondition_interval=2, **more),
    "Shampoo": lambda params, **more: Shampoo(params, precondition_interval=2, **more),
    "SOAPMuon": lambda params, **more: SOAPMuon(params, ns_precision="fp32", **more),
}
each = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)


def problem() -> tuple[Tensor, list[Tensor]]:
    make = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
    scale = torch.logspace(0, -1, 4, dtype=torch.float64)
    return torch.randn(5, 4, **make), [torch.randn(5, 4, **make) * scale for _ in range(STEPS)]


def trajectory(make: Make, weight: Tensor, grads: list[Tensor], **options: Any) -> list[Tensor]:
    """The weights after each step, beside a vector."""
    param, bias = Parameter(weight.clone()), Parameter(torch.ones(3, dtype=weight.dtype))
    optimizer = make([("layer", param), ("bias", bias)], **options)
    found = [weight.clone()]
    for grad in grads:
        param.grad, bias.grad = grad.clone(), torch.ones_like(bias)
        optimizer.step()
        found.append(param.detach().clone())
    return found


@each
def test_steps_are_the_optimizers_own_turned_onto_the_sphere(make: Make) -> None:
    """With given gradients its own steps are those of the optimizer by itself."""
    weight, grads = problem()
    plain = trajectory(make, weight, grads, lr=1.0)
    found = trajectory(make, weight, grads, lr=LR, hyperball=True)
    radius, expected = float(np.float32(weight.norm())), weight.numpy()
    for step, (before, after) in enumerate(itertools.pairwise(plain)):
        u = (before - after).numpy()
        expected = references.on_sphere(expected, u, radius, LR)
        assert np.abs(found[step + 1].numpy() - expected).max() < 1e-9
        cosine = abs(np.sum(expected * u)) / np.linalg.norm(expected) / np.linalg.norm(u)
        assert abs(float(found[step + 1].norm()) / radius - 1) < LR * (cosine + 2 * LR)


@each
def test_directions_are_the_papers(make: Make) -> None:
    """Which goes back to the sphere at the end of the step; here the next one begins so."""
    weight, grads = problem()
    plain = trajectory(make, weight, grads, lr=1.0)
    found = trajectory(make, weight, grads, lr=LR, hyperball=True)[-1]
    radius, w = float(weight.norm()), weight.numpy()
    for before, after in itertools.pairwise(plain):
        u = (before - after).numpy()
        w = w - LR * radius * u / np.linalg.norm(u)
        w = radius * w / np.linalg.norm(w)
    turned = found.numpy() / np.linalg.norm(found.numpy())
    assert np.abs(turned - w / radius).max() < 1e-7


def test_a_layer_of_zeros_takes_the_optimizers_own_steps() -> None:
    _, grads = problem()
    zeros = torch.zeros(5, 4, dtype=torch.float64)
    plain = trajectory(MAKES["Muon"], zeros, grads, lr=LR)
    found = trajectory(MAKES["Muon"], zeros, grads, lr=LR, hyperball=True)
    for one, other in zip(plain, found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_masked_step_keeps_weights_and_radius_and_a_state_is_resumed() -> None:
    weight, grads = problem()
    param = Parameter(weight.clone())
    optimizer = Muon([("layer", param)], lr=LR, hyperball=True)
    set_amp(optimizer, found_inf=1.0, grad_scale=None)
    param.grad = torch.full_like(param, float("nan"))
    optimizer.step()
    assert torch.equal(param, weight)
    assert float(optimizer.state[param]["radius"]) == 0
    set_amp(optimizer, found_inf=0.0, grad_scale=None)
    param.grad = grads[0]
    optimizer.step()
    resumed = Parameter(param.detach() * 3)
    other = Muon([("layer", resumed)], lr=LR, hyperball=True)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, one_optimizer in ((param, optimizer), (resumed, other)):
        one.grad = grads[1]
        one_optimizer.step()
    torch.testing.assert_close(param, resumed)


def test_a_decay_or_another_momentum_beside_it_is_refused() -> None:
    matrix = [("layer", Parameter(torch.ones(2, 2)))]
    with pytest.raises(ValueError, match=r"weight_decay must be 0 with hyperball, .* got 0.1"):
        Muon(matrix, weight_decay=0.1, hyperball=True)
    with pytest.raises(ValueError, match=r"momentum must be 0 with hyperball"):
        Shampoo(matrix, momentum=0.5, hyperball=True)
    bias = ("bias", Parameter(torch.ones(2)))
    optimizer = Muon([*matrix, bias], hyperball=True, adamw_weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]
