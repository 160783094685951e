"""torch's contract, kept by every optimizer of the table (torch's own included)."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_rows import (
    ROWS,
    Row,
    make_grads,
    make_layers,
    same_bits,
    snapshot,
    take_steps,
    tensors_of,
)
from torch import Tensor
from torch.nn import Parameter

each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


@each_row
def test_two_runs_are_the_same_to_the_bit(row: Row) -> None:
    runs = []
    for _ in range(2):
        params = make_layers()
        optimizer = row.make(params)
        take_steps(optimizer, params, make_grads(10))
        runs.append(snapshot(optimizer))
    assert same_bits(*runs)


@each_row
def test_a_run_resumed_from_a_saved_state_dict_goes_on_as_if_never_stopped(row: Row) -> None:
    grads = make_grads(10)
    params = make_layers()
    optimizer = row.make(params)
    take_steps(optimizer, params, grads[:5])

    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed_params = [Parameter(param.detach().clone()) for param in params]
    resumed = row.make(resumed_params, lr=123.0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.param_groups[0]["lr"] == row.lr

    take_steps(optimizer, params, grads[5:])
    take_steps(resumed, resumed_params, grads[5:])
    assert same_bits(snapshot(optimizer), snapshot(resumed))


@each_row
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copied_or_pickled_optimizer_goes_on_alike(
    row: Row, duplicate: Callable[..., Any]
) -> None:
    params, grads = make_layers(), make_grads(10)
    optimizer = row.make(params)
    take_steps(optimizer, params, grads[:5])
    twin = duplicate(optimizer)
    take_steps(optimizer, params, grads[5:])
    take_steps(twin, twin.param_groups[0]["params"], grads[5:])
    assert same_bits(snapshot(optimizer), snapshot(twin))


@each_row
def test_a_zero_gradient_leaves_everything_finite(row: Row) -> None:
    params = make_layers()
    optimizer = row.make(params)
    take_steps(optimizer, params, [[torch.zeros_like(param) for param in params]] * 3)
    assert all(tensor.isfinite().all() for tensor in tensors_of(optimizer))
    assert not params[-1].any(), "a layer of zeros without a gradient has nowhere to go"


@each_row
def test_a_parameter_without_gradient_is_left_alone(row: Row) -> None:
    params, grads = make_layers(), make_grads(1)[0]
    idle, moving = params[::2], params[1::2]
    before = [param.detach().clone() for param in idle]
    optimizer = row.make(params)
    for param, grad in zip(moving, grads[1::2], strict=True):
        param.grad = grad
    optimizer.step()
    assert same_bits(idle, before)
    assert all(param not in optimizer.state for param in idle)

    alone = make_layers()[1::2]
    take_steps(row.make(alone), alone, [grads[1::2]])
    assert same_bits(moving, alone)


@each_row
def test_a_step_without_any_gradient_does_nothing(row: Row) -> None:
    params = make_layers()
    optimizer = row.make(params)
    optimizer.step()
    assert same_bits(params, make_layers())
    assert not optimizer.state


@each_row
@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_learning_rate_is_read_from_the_group_at_each_step(row: Row, as_tensor: bool) -> None:
    params, grads = make_layers(), make_grads(3)
    optimizer = row.make(params, lr=torch.tensor(row.lr) if as_tensor else row.lr)
    take_steps(optimizer, params, grads[:1])
    before = [param.detach().clone() for param in params]
    if as_tensor:
        optimizer.param_groups[0]["lr"].zero_()
    else:
        optimizer.param_groups[0]["lr"] = 0.0
    take_steps(optimizer, params, grads[1:2])
    assert same_bits(params, before)
    optimizer.param_groups[0]["lr"] += row.lr
    take_steps(optimizer, params, grads[2:])
    assert not any(torch.equal(param, old) for param, old in zip(params, before, strict=True))


@each_row
def test_a_tensor_learning_rate_steps_like_a_float(row: Row) -> None:
    with_float, with_tensor, grads = make_layers(), make_layers(), make_grads(5)
    take_steps(row.make(with_float), with_float, grads)
    take_steps(row.make(with_tensor, lr=torch.tensor(row.lr)), with_tensor, grads)
    torch.testing.assert_close(with_tensor, with_float, rtol=1e-6, atol=1e-7)


@each_row
def test_maximize_equals_negated_gradients(row: Row) -> None:
    up, down, grads = make_layers(), make_layers(), make_grads(5)
    take_steps(row.make(up, maximize=True), up, grads)
    take_steps(row.make(down), down, [[-grad for grad in step_grads] for step_grads in grads])
    assert same_bits(up, down)


@each_row
@pytest.mark.parametrize("maximize", [False, True])
def test_gradients_are_left_as_they_were(row: Row, maximize: bool) -> None:
    params, grads = make_layers(), make_grads(3)
    optimizer = row.make(params, maximize=maximize)
    for step_grads in grads:
        take_steps(optimizer, params, [step_grads])
        assert same_bits([param.grad for param in params], step_grads)


@each_row
def test_a_closure_runs_with_gradients_enabled_and_its_loss_is_returned(row: Row) -> None:
    params, reference = make_layers(), make_layers()
    optimizer = row.make(params)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.stack([(param**2).sum() for param in params]).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    expected = torch.stack([(param.detach() ** 2).sum() for param in reference]).sum()
    torch.testing.assert_close(loss.detach(), expected)
    take_steps(row.make(reference), reference, [[2 * param.detach() for param in reference]])
    torch.testing.assert_close(params, reference)


@each_row
def test_a_group_added_late_starts_its_own_history(row: Row) -> None:
    params, grads = make_layers(), make_grads(8)
    early, late = params[:3], params[3:]
    optimizer = row.make(early)
    take_steps(optimizer, early, [step_grads[:3] for step_grads in grads[:5]])
    optimizer.add_param_group({"params": late})
    take_steps(optimizer, params, grads[5:])

    fresh = make_layers()[3:]
    take_steps(row.make(fresh), fresh, [step_grads[3:] for step_grads in grads[5:]])
    assert same_bits(late, fresh)


@each_row
def test_a_parameter_whose_gradients_start_late_starts_its_own_history(row: Row) -> None:
    params, grads = make_layers(), make_grads(8)
    optimizer = row.make(params)
    take_steps(optimizer, params[:3], [step_grads[:3] for step_grads in grads[:5]])
    take_steps(optimizer, params, grads[5:])

    fresh = make_layers()[3:]
    take_steps(row.make(fresh), fresh, [step_grads[3:] for step_grads in grads[5:]])
    assert same_bits(params[3:], fresh)
