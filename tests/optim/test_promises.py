"""This project's promises, kept by every optimizer of ours in the table."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from optimizer_rows import (
    OUR_ROWS,
    Row,
    make_grads,
    make_layers,
    same_bits,
    snapshot,
    take_steps,
    tensors_of,
)
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

each_of_ours = pytest.mark.parametrize("row", OUR_ROWS, ids=lambda row: row.name)
BAD_VALUES = (float("inf"), float("nan"), -float("inf"), 1.0, float("nan"), float("inf"))


class NoHostSync(TorchDispatchMode):
    """Refuses every operator that makes the host wait for a value on the device."""

    FORBIDDEN = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert func.overloadpacket.__name__ not in self.FORBIDDEN, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


class CountCalls(TorchDispatchMode):
    """Counts the operators called."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def set_amp(optimizer: torch.optim.Optimizer, found_inf: float, grad_scale: float | None) -> None:
    """Set what torch.amp.GradScaler sets before it calls `step`."""
    optimizer.found_inf = torch.tensor([found_inf])  # one element; 0-d where torch sets it
    optimizer.grad_scale = None if grad_scale is None else torch.tensor(grad_scale)


def test_the_host_sync_detector_detects() -> None:
    with NoHostSync(), pytest.raises(AssertionError, match="waits for the device"):
        bool(torch.tensor(1.0) > 0)


@each_of_ours
@pytest.mark.parametrize("amp", [False, True])
def test_a_step_never_waits_for_the_device(row: Row, amp: bool) -> None:
    params, grads = make_layers(), make_grads(3)
    optimizer = row.make(params, lr=torch.tensor(row.lr))
    if amp:
        set_amp(optimizer, found_inf=0.0, grad_scale=4.0)
    with NoHostSync():
        take_steps(optimizer, params, grads)
        optimizer.layer_stats()


@each_of_ours
def test_the_norms_of_many_layers_are_taken_in_one_call(row: Row) -> None:
    params, grads = make_layers(), make_grads(1)
    optimizer = row.make([{"params": params[:3]}, {"params": params[3:]}])
    with CountCalls() as calls:
        take_steps(optimizer, params, grads)
    assert calls.counts["_foreach_norm"] == 4  # of weights and of updates, in either group
    assert not any("norm" in name for name in calls.counts if name != "_foreach_norm")


@each_of_ours
def test_an_empty_parameter_is_stepped_without_harm(row: Row) -> None:
    params, (grads,) = make_layers(), make_grads(1)
    alone = make_layers()
    with_empty = [*params, Parameter(torch.empty(0, 4))]
    take_steps(row.make(with_empty), with_empty, [[*grads, torch.empty(0, 4)]])
    take_steps(row.make(alone), alone, [grads])
    assert same_bits(params, alone)


@each_of_ours
def test_a_step_runs_where_no_value_exists(row: Row) -> None:
    params = [Parameter(param.detach().to("meta")) for param in make_layers(torch.bfloat16)]
    optimizer = row.make(params)
    take_steps(optimizer, params, [[torch.empty_like(param) for param in params]] * 2)
    assert all(tensor.is_meta for tensor in tensors_of(optimizer))
    stats = optimizer.layer_stats().values()
    assert all(value.is_meta for layer in stats for value in layer.values())


@each_of_ours
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_parameters_keep_fp32_state_across_load_state_dict(
    row: Row, dtype: torch.dtype
) -> None:
    params = make_layers(dtype)
    optimizer = row.make(params)
    take_steps(optimizer, params, make_grads(5, dtype))
    resumed = row.make([Parameter(param.detach().clone()) for param in params])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same_bits(snapshot(optimizer), snapshot(resumed))
    states = [value for state in resumed.state.values() for value in state.values()]
    assert all(value.dtype == torch.float32 for value in states)


@each_of_ours
def test_load_state_dict_runs_the_users_hooks_around_the_whole_load(row: Row) -> None:
    params = make_layers(torch.bfloat16)
    optimizer = row.make(params)
    take_steps(optimizer, params, make_grads(2, torch.bfloat16))
    saved, seen = copy.deepcopy(optimizer.state_dict()), []
    resumed = row.make([Parameter(param.detach().clone()) for param in params])
    resumed.register_load_state_dict_pre_hook(lambda _, state_dict: {**state_dict, **saved})
    resumed.register_load_state_dict_post_hook(lambda loaded: seen.extend(snapshot(loaded)))
    resumed.load_state_dict({"state": {}, "param_groups": []})
    assert same_bits(seen, snapshot(optimizer))
    assert len(resumed._optimizer_load_state_dict_pre_hooks) == 1
    assert len(resumed._optimizer_load_state_dict_post_hooks) == 1


@each_of_ours
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps_before", [0, 3])
def test_found_inf_changes_neither_parameters_nor_state_by_one_bit(
    row: Row, dtype: torch.dtype, steps_before: int
) -> None:
    params, grads = make_layers(dtype), make_grads(5, dtype)
    params[2].data[0] = -0.0
    optimizer, twin_params = row.make(params), [Parameter(p.detach().clone()) for p in params]
    twin = row.make(twin_params)
    take_steps(optimizer, params, grads[:steps_before])
    take_steps(twin, twin_params, grads[:steps_before])

    bad = [torch.full_like(grad, value) for grad, value in zip(grads[3], BAD_VALUES, strict=True)]
    before = [param.detach().clone() for param in params]
    set_amp(optimizer, found_inf=1.0, grad_scale=None)
    take_steps(optimizer, params, [bad])
    assert same_bits(params, before)
    if steps_before:
        assert same_bits(snapshot(optimizer), snapshot(twin))
    del optimizer.found_inf, optimizer.grad_scale

    take_steps(optimizer, params, grads[4:])
    take_steps(twin, twin_params, grads[4:])
    assert same_bits(snapshot(optimizer), snapshot(twin))


@each_of_ours
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_found_inf_of_zero_changes_no_bit_of_a_step(row: Row, dtype: torch.dtype) -> None:
    plain, guarded, grads = make_layers(dtype), make_layers(dtype), make_grads(5, dtype)
    plain_optimizer, guarded_optimizer = row.make(plain), row.make(guarded)
    set_amp(guarded_optimizer, found_inf=0.0, grad_scale=None)
    take_steps(plain_optimizer, plain, grads)
    take_steps(guarded_optimizer, guarded, grads)
    assert same_bits(snapshot(plain_optimizer), snapshot(guarded_optimizer))


@each_of_ours
def test_grad_scale_equals_gradients_unscaled_beforehand(row: Row) -> None:
    plain, scaled, grads = make_layers(), make_layers(), make_grads(5)
    scaled_optimizer = row.make(scaled)
    set_amp(scaled_optimizer, found_inf=0.0, grad_scale=1024.0)
    take_steps(row.make(plain), plain, grads)
    scaled_grads = [[grad * 1024 for grad in step_grads] for step_grads in grads]
    take_steps(scaled_optimizer, scaled, scaled_grads)
    assert same_bits(plain, scaled)
    assert same_bits([param.grad for param in scaled], scaled_grads[-1])


@each_of_ours
@pytest.mark.parametrize("unscale_first", [False, True])
def test_grad_scaler_skips_an_infinite_gradient_and_unscales_the_others(
    row: Row, unscale_first: bool
) -> None:
    params, plain, grads = make_layers(), make_layers(), make_grads(3)
    optimizer, scaler = row.make(params), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scales = []
    for number, step_grads in enumerate(grads):
        scales.append(scaler.get_scale())
        scaler.scale(torch.zeros(()))  # lets the scaler create its scale tensor
        for param, grad in zip(params, step_grads, strict=True):
            param.grad = grad * scaler.get_scale()
        if number == 1:
            params[1].grad[0] = float("inf")
        if unscale_first:
            scaler.unscale_(optimizer)
        seen_grads = [param.grad.clone() for param in params]
        with NoHostSync():
            scaler.step(optimizer)
        assert same_bits([param.grad for param in params], seen_grads)
        scaler.update()
    assert scales == [1024.0, 1024.0, 512.0]

    plain_optimizer = row.make(plain)
    take_steps(plain_optimizer, plain, [grads[0], grads[2]])
    assert same_bits(snapshot(plain_optimizer), snapshot(optimizer))
