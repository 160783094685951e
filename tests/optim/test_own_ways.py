"""What could go wrong in our own state, plans and groups, and does not."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_rows import make_grads, make_layers, same_bits, snapshot, take_steps

from largebatch.optim import LAMB, LARS

RESUMED: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "lr inside": lambda params: LARS(params, lr=0.01, variant="lr_inside"),
    "master weights": lambda params: LAMB(params, lr=0.01, master_weights=True),
    "bounds": lambda params: LAMB(params, lr=0.01, trust_bounds=(0.5, 2.0)),
}


@pytest.mark.parametrize("make", RESUMED.values(), ids=RESUMED)
def test_a_state_dict_can_be_loaded_again_and_again(
    make: Callable[[Any], torch.optim.Optimizer],
) -> None:
    params = make_layers(torch.bfloat16)
    optimizer = make(params)
    take_steps(optimizer, params, make_grads(2, torch.bfloat16))
    first = snapshot(optimizer)
    keys = [sorted(group) for group in optimizer.param_groups]
    options = [{**group, "params": 0} for group in optimizer.param_groups]
    for _ in range(3):
        resumed = make(params)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer = copy.deepcopy(resumed)
        optimizer.load_state_dict(resumed.state_dict())
        assert same_bits(snapshot(optimizer), first)
        assert [sorted(group) for group in optimizer.param_groups] == keys
        assert [{**group, "params": 0} for group in optimizer.param_groups] == options


def test_a_state_of_another_shape_is_refused_and_the_old_one_kept() -> None:
    params = make_layers()
    optimizer = LAMB(params, lr=0.01)
    take_steps(optimizer, params, make_grads(1))
    before, state_dict = snapshot(optimizer), copy.deepcopy(optimizer.state_dict())
    state_dict["state"][3]["exp_avg"] = torch.arange(3.0)  # would broadcast to (5, 3)
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter 3 must be .* shape \(5, 3\)"):
        optimizer.load_state_dict(state_dict)
    assert same_bits(snapshot(optimizer), before)


def test_a_group_that_is_refused_in_any_way_is_not_left_behind() -> None:
    optimizer = LAMB(make_layers(), lr=0.01)
    with pytest.raises(TypeError):
        optimizer.add_param_group({"params": make_layers(), "weight_decay": None})
    assert len(optimizer.param_groups) == 1


def test_a_split_of_a_strided_parameter_is_that_of_its_contiguous_copy() -> None:
    strided = torch.nn.Parameter(torch.randn(7, 3, generator=torch.Generator()).t()[:, ::2])
    plain = torch.nn.Parameter(strided.detach().contiguous())
    for param in (strided, plain):
        split = {"params": [param], "norm_groups": 4, "norm_dim": 1}
        optimizer = LAMB([split], lr=0.1)
        for step in range(3):
            param.grad = torch.arange(12.0).view(3, 4).sin() + step
            optimizer.step()
    torch.testing.assert_close(strided, plain)


def test_a_parameter_that_became_another_in_place_is_seen_as_it_is_now() -> None:
    (param,) = params = [torch.nn.Parameter(torch.ones(3, 4))]
    optimizer = LAMB(params, lr=0.1)
    take_steps(optimizer, params, [[torch.ones(3, 4)]])
    optimizer.state.clear()
    param.grad, param.data = None, torch.ones(2, 2, dtype=torch.float64)
    take_steps(optimizer, params, [[torch.ones(2, 2, dtype=torch.float64)]])
    assert optimizer.layer_stats()[0]["weight_norm"] == 2.0
    assert optimizer.layer_stats()[0]["weight_norm"].dtype == torch.float64
