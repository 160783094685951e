"""This project's promises, kept by every optimizer that is masked on the device."""

import contextlib
import copy
import itertools
import math

import pytest
import torch
from contract_rows import INTERVAL, MASKED, SEVERAL, ContractRow, NoHostSync, each, set_amp
from optimizer_rows import same_bits

each_of_ours = each("row", MASKED)
BAD_VALUES = (math.inf, math.nan, -math.inf, 1.0, math.nan, math.inf)


def test_the_host_sync_detector_detects() -> None:
    with NoHostSync(), pytest.raises(AssertionError, match="waits for the device"):
        bool(torch.tensor(1.0) > 0)


PRECISIONS = [
    (row, dtype)
    for row in MASKED
    for dtype in (torch.bfloat16, torch.float16)
    if dtype == torch.bfloat16 or not row.watches
]


@each("row, dtype", PRECISIONS)
def test_low_precision_parameters_keep_fp32_state_across_load_state_dict(
    row: ContractRow, dtype: torch.dtype
) -> None:
    run, resumed = row.start(dtype), row.start(dtype)
    run.train(0, INTERVAL + 1)
    resumed.set_weights(run.weights())
    resumed.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    for number in (INTERVAL + 1, INTERVAL + 2):
        assert same_bits(run.tensors(), resumed.tensors())
        states = [value for s in resumed.optimizer.state.values() for value in s.values()]
        assert all(value.dtype == torch.float32 for value in states)
        assert all(param.dtype == dtype for param in resumed.params)
        for one in (run, resumed):
            one.train(number, number + 1)


@each_of_ours
def test_load_state_dict_runs_the_users_hooks_around_the_whole_load(row: ContractRow) -> None:
    run, resumed = row.start(torch.bfloat16), row.start(torch.bfloat16)
    run.train(0, 2)
    saved, seen = copy.deepcopy(run.optimizer.state_dict()), []
    resumed.set_weights(run.weights())
    optimizer = resumed.optimizer
    optimizer.register_load_state_dict_pre_hook(lambda _, state_dict: {**state_dict, **saved})
    optimizer.register_load_state_dict_post_hook(lambda _: seen.extend(resumed.tensors()))
    optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert same_bits(seen, run.tensors())
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1
    assert len(optimizer._optimizer_load_state_dict_post_hooks) == 1


@each_of_ours
@pytest.mark.parametrize(
    ("dtype", "steps_before"),
    [
        (torch.float32, 0),
        (torch.bfloat16, 2),
        (torch.float32, INTERVAL),
        pytest.param(torch.float32, 2, marks=pytest.mark.matrix),
        pytest.param(torch.bfloat16, 0, marks=pytest.mark.matrix),
        pytest.param(torch.bfloat16, INTERVAL, marks=pytest.mark.matrix),
    ],
    ids=str,
)
def test_found_inf_changes_neither_parameters_nor_state_by_one_bit(
    row: ContractRow, dtype: torch.dtype, steps_before: int
) -> None:
    """Neither then nor later: also where roots would have been taken, or the state begun."""
    run, twin = row.start(dtype), row.start(dtype)
    for one in (run, twin):
        one.params[2].data.view(-1)[0] = -0.0
        one.train(0, steps_before)
    run.backward(3)
    for param, value in zip(run.params, itertools.cycle(BAD_VALUES), strict=False):
        param.grad.fill_(value)
    before, state = run.weights(), run.tensors()
    set_amp(run.optimizer, found_inf=1.0, grad_scale=None)
    run.optimizer.step()
    assert same_bits(run.weights(), before)
    if steps_before:
        assert same_bits(run.tensors(), state)
    del run.optimizer.found_inf, run.optimizer.grad_scale
    for one in (run, twin):
        one.train(steps_before, steps_before + SEVERAL)
    assert same_bits(run.tensors(), twin.tensors())


@each_of_ours
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_found_inf_of_zero_changes_no_bit_of_a_step(row: ContractRow, dtype: torch.dtype) -> None:
    plain, guarded = row.start(dtype), row.start(dtype)
    set_amp(guarded.optimizer, found_inf=0.0, grad_scale=None)
    for one in (plain, guarded):
        one.train(0, SEVERAL)
    assert same_bits(plain.tensors(), guarded.tensors())


@each_of_ours
def test_grad_scale_equals_gradients_unscaled_beforehand(row: ContractRow) -> None:
    plain, scaled = row.start(), row.start()
    set_amp(scaled.optimizer, found_inf=0.0, grad_scale=1024.0)
    plain.train(0, SEVERAL)
    scaled.train(0, SEVERAL - 1, factor=1024.0)
    before = scaled.backward(SEVERAL - 1, factor=1024.0)
    scaled.optimizer.step()
    assert same_bits(plain.weights(), scaled.weights())
    assert same_bits(scaled.grads(), before)


@each_of_ours
@pytest.mark.parametrize("unscale_first", [False, True])
def test_grad_scaler_skips_an_infinite_gradient_and_unscales_the_others(
    row: ContractRow, unscale_first: bool
) -> None:
    run, plain = row.start(), row.start()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scales = []
    for number in range(3):
        scales.append(scaler.get_scale())
        scaler.scale(torch.zeros(()))  # lets the scaler create its scale tensor
        run.backward(number, factor=scaler.get_scale())
        if number == 1:
            run.params[1].grad.view(-1)[0] = math.inf
        if unscale_first:
            scaler.unscale_(run.optimizer)
        before = run.grads()
        with NoHostSync() if row.never_waits else contextlib.nullcontext():
            scaler.step(run.optimizer)
        assert same_bits(run.grads(), before)
        scaler.update()
    assert scales == [1024.0, 1024.0, 512.0]
    plain.train(0, 1)
    plain.train(2, 3)
    assert same_bits(plain.tensors(), run.tensors())
