"""Gradients near the end of FP32's range, and betas that change on the way."""

import copy
import math
from typing import Any

import pytest
import torch
from optimizer_rows import OUR_ROWS, Row, make_grads, make_layers, take_steps, tensors_of
from torch.nn import Parameter

from largebatch.optim import LAMB, LARS

each_of_ours = pytest.mark.parametrize("row", OUR_ROWS, ids=lambda row: row.name)
BAD = 3  # the step whose gradient is huge


@each_of_ours
@pytest.mark.parametrize("elements", ["one", "all"])
@pytest.mark.parametrize("clip", [math.inf, 1.0])
def test_one_huge_finite_gradient_leaves_training_alive(
    row: Row, elements: str, clip: float
) -> None:
    params, grads = make_layers(), make_grads(9)
    for grad in grads[BAD]:
        (grad.view(-1)[:1] if elements == "one" else grad).fill_(1e30)
    optimizer = row.make(params, max_grad_norm=clip)
    take_steps(optimizer, params, grads[: BAD + 1])
    norms = [stats["update_norm"] for stats in optimizer.layer_stats().values()]
    assert all(torch.isfinite(norm) for norm in norms)
    take_steps(optimizer, params, grads[BAD + 1 : -1])
    before = [param.detach().clone() for param in params]
    take_steps(optimizer, params, grads[-1:])
    assert all(torch.isfinite(tensor).all() for tensor in tensors_of(optimizer))
    assert not any(map(torch.equal, before, params))


@pytest.mark.parametrize("shape", [(40, 50), (300, 400)], ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_the_norm_of_a_huge_gradient_is_that_of_fp64(shape: tuple[int, int], turned: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).t() if turned else torch.randn(shape)
    param = Parameter(weight.clone(memory_format=torch.preserve_format))
    param.grad = torch.randn_like(param) * 1e30
    optimizer = LARS([param], lr=0.5, momentum=0.0)
    before = param.detach().double()
    optimizer.step()
    (stats,) = optimizer.layer_stats().values()
    norm = param.grad.double().norm()
    torch.testing.assert_close(stats["update_norm"].double(), norm, rtol=1e-6, atol=0)
    step = 0.5 * 1e-3 * before.norm() / norm * param.grad.double()
    torch.testing.assert_close(param.detach().double(), before - step, rtol=1e-6, atol=1e-6)


def test_elements_whose_second_moment_has_overflown_begin_anew_and_are_counted() -> None:
    param = Parameter(torch.randn(6, 4))
    optimizer = LAMB([("weight", param)], lr=0.01)
    for step in range(4):
        param.grad = torch.ones_like(param)
        if step == 1:
            param.grad[0, :3] = torch.tensor([1e30, -1e25, 1e30])
        optimizer.step()
        assert torch.isfinite(optimizer.state[param]["exp_avg_sq"]).all()
        assert optimizer.layer_stats()["weight"]["dropped_elements"] == (3 if step else 0)


@pytest.mark.parametrize("bias_correction", ["moments", "lr"])
@pytest.mark.parametrize("how", ["in place", "saved before", "saved after", "copied"])
@pytest.mark.parametrize("at", [3, 40])
def test_the_bias_correction_counts_the_weight_that_the_moments_hold(
    bias_correction: str, how: str, at: int
) -> None:
    """Where betas change, also between the last step and saving."""

    def make(betas: tuple[float, float]) -> tuple[Parameter, Any]:
        param = Parameter(torch.zeros(50))
        group = {"params": [param], "adapt": False}
        options: dict[str, Any] = {"lr": 1.0, "eps": 0.0, "weight_decay": 0.0, "betas": betas}
        return param, LAMB([group], bias_correction=bias_correction, **options)

    def change(optimizer: Any) -> None:
        optimizer.param_groups[0]["betas"] = (0.9**4, 0.999**16)

    param, optimizer = make((0.9, 0.999))
    mean = square = torch.zeros(50, dtype=torch.float64)
    weights = [0.0, 0.0]
    torch.manual_seed(0)
    for step in range(at + 10):
        if step == at and how == "copied":
            change(optimizer)
            optimizer = copy.deepcopy(optimizer)
            (param,) = optimizer.param_groups[0]["params"]
        elif step == at:
            if how != "saved before":
                change(optimizer)
            state, old = copy.deepcopy(optimizer.state_dict()), param
            if how != "in place":
                param, optimizer = make((0.5, 0.6))
                param.data.copy_(old.data)
                optimizer.load_state_dict(state)
            if how == "saved before":
                change(optimizer)
        gradient = torch.randn(50) + 3
        param.grad, before = gradient, param.detach().double()
        optimizer.step()
        betas = optimizer.param_groups[0]["betas"]
        mean = mean * betas[0] + (1 - betas[0]) * gradient.double()
        square = square * betas[1] + (1 - betas[1]) * gradient.double() ** 2
        weights = [beta * w + 1 - beta for beta, w in zip(betas, weights, strict=True)]
        wanted = (mean / weights[0]) / (square / weights[1]).sqrt()
        torch.testing.assert_close(before - param.detach(), wanted, rtol=2e-5, atol=2e-5)


def test_a_state_without_a_change_of_betas_is_the_one_that_others_read() -> None:
    params = make_layers()
    optimizer = LAMB(params)
    take_steps(optimizer, params, make_grads(2))
    assert {key for state in optimizer.state.values() for key in state} == {
        "exp_avg",
        "exp_avg_sq",
        "step",
    }
