"""torch's contract, kept by every optimizer of the table (torch's own included)."""

import copy
import functools
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from contract_rows import CONTRACT, INTERVAL, SEVERAL, ContractRow, Trial, each
from optimizer_rows import make_grads, make_layers, same_bits, take_steps, tensors_of
from torch import Tensor
from torch.nn import Parameter

each_row = each("row", CONTRACT)
LAYERS = [row for row in CONTRACT if not row.watches]
each_of_layers = each("row", LAYERS)
LATE = [row for row in LAYERS if row.late is not None]
each_with_late_ones = each("row", LATE)


@each_row
def test_two_runs_are_the_same_to_the_bit(row: ContractRow) -> None:
    runs = [row.start() for _ in range(2)]
    for run in runs:
        run.train(0, SEVERAL)
    assert same_bits(*(run.tensors() for run in runs))


@dataclass(frozen=True)
class Saved:
    file: bytes
    weights: list[Tensor]
    tensors: list[Tensor]


@functools.cache
def never_stopped(name: str) -> tuple[dict[int, Saved], list[Tensor]]:
    """What a run saves before each step, and its tensors at the end."""
    (run,) = (row.start() for row in CONTRACT if row.name == name)
    saved = {}
    for number in range(2 * INTERVAL + SEVERAL):
        file = io.BytesIO()
        torch.save(run.optimizer.state_dict(), file)
        saved[number] = Saved(file.getvalue(), run.weights(), run.tensors())
        run.train(number, number + 1)
    return saved, run.tensors()


@each_row
@pytest.mark.parametrize(
    "saved_after",
    [
        *(1, INTERVAL + 1, 2 * INTERVAL),
        *(pytest.param(after, marks=pytest.mark.matrix) for after in (0, INTERVAL)),
    ],
)
def test_a_run_resumed_from_a_saved_state_dict_continues_as_if_never_stopped(
    row: ContractRow, saved_after: int
) -> None:
    """Within an interval of refreshes, and where the next are due."""
    saved, at_the_end = never_stopped(row.name)
    resumed = row.start(lr=123.0)
    resumed.set_weights(saved[saved_after].weights)
    file = io.BytesIO(saved[saved_after].file)
    resumed.optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.optimizer.param_groups[0]["lr"] == row.lr
    assert same_bits(saved[saved_after].tensors, resumed.tensors())
    resumed.train(saved_after, 2 * INTERVAL + SEVERAL)
    assert same_bits(at_the_end, resumed.tensors())


@each_row
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copied_or_pickled_optimizer_continues_alike(
    row: ContractRow, duplicate: Callable[..., Any]
) -> None:
    run = row.start()
    run.train(0, INTERVAL + 1)
    twin = run.duplicated(duplicate)
    for one in (run, twin):
        one.train(INTERVAL + 1, 2 * INTERVAL + 1)
    assert same_bits(run.tensors(), twin.tensors())


@each_row
def test_a_zero_gradient_leaves_everything_finite(row: ContractRow) -> None:
    run = row.start()
    for _ in range(3):
        run.backward(0)
        for param in run.params:
            param.grad.zero_()
        run.optimizer.step()
    assert all(tensor.isfinite().all() for tensor in tensors_of(run.optimizer))
    if not row.watches:
        assert not run.params[-1].any(), "a layer of zeros without a gradient has nowhere to go"


@each_of_layers
def test_a_parameter_without_gradient_is_left_alone(row: ContractRow) -> None:
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
def test_a_step_without_any_gradient_does_nothing(row: ContractRow) -> None:
    run = row.start()
    before = run.weights()
    assert run.optimizer.step() is None
    assert same_bits(run.weights(), before)
    assert not run.optimizer.state


@each_row
@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_learning_rate_is_read_from_the_group_at_each_step(
    row: ContractRow, as_tensor: bool
) -> None:
    run = row.start(lr=torch.tensor(row.lr) if as_tensor else row.lr)
    run.train(0, 1)
    before = run.weights()
    for group in run.optimizer.param_groups:
        if as_tensor:
            group["lr"].zero_()
        else:
            group["lr"] = 0.0
    run.train(1, 2)
    assert same_bits(run.weights(), before)
    for group in run.optimizer.param_groups:
        group["lr"] = row.lr
    run.train(2, 3)
    assert not any(torch.equal(param, old) for param, old in zip(run.params, before, strict=True))


@each_row
def test_a_tensor_learning_rate_steps_like_a_float(row: ContractRow) -> None:
    with_float, with_tensor = row.start(), row.start(lr=torch.tensor(row.lr))
    for number in range(5):
        for run in (with_float, with_tensor):
            run.train(number, number + 1)
        for group in with_float.optimizer.param_groups:
            group["lr"] *= 0.5
        with_tensor.optimizer.param_groups[0]["lr"].mul_(0.5)  # one tensor for all groups
    torch.testing.assert_close(with_tensor.params, with_float.params, rtol=1e-6, atol=1e-7)


@each("row", [row for row in CONTRACT if row.maximizes])
def test_maximize_equals_negated_gradients(row: ContractRow) -> None:
    up, down = row.start(maximize=True), row.start()
    up.train(0, SEVERAL)
    down.train(0, SEVERAL, factor=-1.0)
    assert same_bits(up.weights(), down.weights())


@each_row
def test_gradients_are_left_as_they_were(row: ContractRow) -> None:
    for options in ({}, *row.options, *({"maximize": True},) * row.maximizes):
        run = row.start(**options)
        for number in range(3):
            before = run.backward(number)
            run.optimizer.step()
            assert same_bits(run.grads(), before)


@each_row
def test_a_closure_runs_with_gradients_enabled_and_its_loss_is_returned(row: ContractRow) -> None:
    run, plain = row.start(), row.start()

    def closure() -> Tensor:
        run.optimizer.zero_grad()
        loss = run.loss(0)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = run.optimizer.step(closure)
    torch.testing.assert_close(loss.detach(), plain.loss(0).detach())
    plain.train(0, 1)
    assert same_bits(run.tensors(), plain.tensors())


@each_row
def test_step_hooks_run_around_the_step(row: ContractRow) -> None:
    run, seen = row.start(), []
    start = run.weights()
    run.optimizer.register_step_pre_hook(lambda *_: seen.append(same_bits(run.weights(), start)))
    run.optimizer.register_step_post_hook(lambda *_: seen.append(same_bits(run.weights(), start)))
    run.train(0, 1)
    assert seen == [True, False]


@each_with_late_ones
def test_a_group_added_late_starts_its_own_history(row: ContractRow) -> None:
    params, grads = make_layers(), make_grads(8)
    early, late = params[:3], params[3:]
    optimizer = row.make(early, **row.late)
    take_steps(optimizer, early, [step_grads[:3] for step_grads in grads[:5]])
    optimizer.add_param_group({"params": late})
    take_steps(optimizer, params, grads[5:])
    assert same_bits(late, alone(row, grads))


@each_with_late_ones
def test_a_parameter_whose_gradients_start_late_starts_its_own_history(row: ContractRow) -> None:
    params, grads = make_layers(), make_grads(8)
    optimizer = row.make(params, **row.late)
    take_steps(optimizer, params[:3], [step_grads[:3] for step_grads in grads[:5]])
    take_steps(optimizer, params, grads[5:])
    assert same_bits(params[3:], alone(row, grads))


def alone(row: ContractRow, grads: list[list[Tensor]]) -> list[Parameter]:
    """The last layers, stepped by an optimizer of their own from the sixth gradient on."""
    fresh = make_layers()[3:]
    take_steps(row.make(fresh, **row.late), fresh, [step_grads[3:] for step_grads in grads[5:]])
    return fresh


@each_of_layers
def test_an_empty_parameter_is_stepped_without_harm(row: ContractRow) -> None:
    (grads,) = make_grads(1)
    params, others = make_layers(), make_layers()
    with_empty = [*params, Parameter(torch.empty(0, 4))]
    take_steps(row.make(with_empty), with_empty, [[*grads, torch.empty(0, 4)]])
    take_steps(row.make(others), others, [grads])
    assert same_bits(params, others)


def test_a_trial_has_the_gradients_of_the_table() -> None:
    run = Trial(None, make_layers())
    run.optimizer = torch.optim.SGD(run.params)
    assert same_bits(run.backward(3, 2.0), [2 * grad for grad in make_grads(4)[3]])
