"""torch's contract and this project's promises, kept by Shampoo and SOAP on one process."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_rows import make_grads, make_layers, same_bits, snapshot, take_steps
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from largebatch.optim import SOAP, Shampoo
from largebatch.optim.blockwise.blocks import blocks_of

Make = Callable[..., Any]

MAKES: dict[str, Make] = {
    "Shampoo": lambda params, **options: Shampoo(
        params, **{"lr": 0.01, "block_size": 3, "momentum": 0.5, "weight_decay": 0.1, **options}
    ),
    "SOAP": lambda params, **options: SOAP(
        params, **{"lr": 0.01, "block_size": 3, "weight_decay": 0.1, **options}
    ),
}
each = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)


def twins(dtype: torch.dtype = torch.float32) -> tuple[list[Parameter], list[Parameter]]:
    return make_layers(dtype), make_layers(dtype)


def copies(params: list[Parameter]) -> list[Parameter]:
    return [Parameter(param.detach().clone()) for param in params]


def set_amp(optimizer: torch.optim.Optimizer, found_inf: float, grad_scale: float | None) -> None:
    """Set what torch.amp.GradScaler sets before it calls `step`."""
    optimizer.found_inf = torch.tensor([found_inf])
    optimizer.grad_scale = None if grad_scale is None else torch.tensor(grad_scale)


@each
def test_two_runs_are_the_same_to_the_bit(make: Make) -> None:
    runs = []
    for params in twins():
        optimizer = make(params)
        take_steps(optimizer, params, make_grads(12))
        runs.append(snapshot(optimizer))
    assert same_bits(*runs)


@each
@pytest.mark.parametrize("steps_before", [5, 10])
def test_a_resumed_run_goes_on_as_if_never_stopped(make: Make, steps_before: int) -> None:
    """Within an interval, and where the next roots are due."""
    params, grads = make_layers(), make_grads(23)
    optimizer = make(params)
    take_steps(optimizer, params, grads[:steps_before])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed_params = copies(params)
    resumed = make(resumed_params, lr=123.0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    take_steps(optimizer, params, grads[steps_before:])
    take_steps(resumed, resumed_params, grads[steps_before:])
    assert same_bits(snapshot(optimizer), snapshot(resumed))


@each
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copy_goes_on_alike(make: Make, duplicate: Callable[[Any], Any]) -> None:
    params = make_layers()
    optimizer = make(params)
    take_steps(optimizer, params, make_grads(3))
    twin = duplicate(optimizer)
    twin_params = [param for group in twin.param_groups for param in group["params"]]
    for one, its_params in ((optimizer, params), (twin, twin_params)):
        take_steps(one, its_params, make_grads(12)[3:])
    assert same_bits(snapshot(optimizer), snapshot(twin))


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_parameters_keep_fp32_state(make: Make, dtype: torch.dtype) -> None:
    params = make_layers(dtype)
    optimizer = make(params)
    take_steps(optimizer, params, make_grads(5, dtype))
    resumed = make(copies(params))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same_bits(snapshot(optimizer), snapshot(resumed))
    states = [value for state in resumed.state.values() for value in state.values()]
    assert all(value.dtype == torch.float32 for value in states)
    assert all(param.dtype == dtype for param in params)


@each
def test_gradients_are_left_as_they_were(make: Make) -> None:
    params, (grads,) = make_layers(), make_grads(1)
    for options in ({}, {"decay": "l2"}, {"maximize": True}):
        optimizer = make(copies(params), **options)
        ours = [param for group in optimizer.param_groups for param in group["params"]]
        for param, grad in zip(ours, grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
        assert same_bits([param.grad for param in ours], grads)


@each
def test_maximize_goes_the_other_way(make: Make) -> None:
    down, up = twins()
    grads = make_grads(12)
    take_steps(make(down), down, grads)
    negated = [[-grad for grad in step_grads] for step_grads in grads]
    take_steps(make(up, maximize=True), up, negated)
    assert same_bits(down, up)


@each
def test_a_closure_is_called_with_gradients_enabled(make: Make) -> None:
    param = Parameter(torch.ones(3, 2))
    optimizer = make([param])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss.detach()

    assert float(optimizer.step(closure)) == 6
    assert not torch.equal(param, torch.ones(3, 2))
    assert optimizer.step() is None


@each
def test_a_learning_rate_in_a_tensor_is_read_at_each_step(make: Make) -> None:
    ours, theirs = twins()
    with_float, with_tensor = make(ours), make(theirs, lr=torch.tensor(0.01))
    for grads in make_grads(4):
        take_steps(with_float, ours, [grads])
        take_steps(with_tensor, theirs, [grads])
        for group in with_float.param_groups:
            group["lr"] *= 0.5
        with_tensor.param_groups[0]["lr"].mul_(0.5)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@each
@pytest.mark.parametrize("steps_before", [0, 3, 10])
def test_found_inf_changes_nothing_by_one_bit(make: Make, steps_before: int) -> None:
    """Neither then nor later: also where roots would have been taken, or the state begun."""
    (params, twin_params), grads = twins(), make_grads(24)
    optimizer, twin = make(params), make(twin_params)
    take_steps(optimizer, params, grads[:steps_before])
    take_steps(twin, twin_params, grads[:steps_before])
    values = (math.inf, math.nan, -math.inf, 1.0, math.nan, math.inf)
    bad = [torch.full_like(g, value) for g, value in zip(grads[0], values, strict=True)]
    before, state = copies(params), snapshot(optimizer)
    set_amp(optimizer, found_inf=1.0, grad_scale=None)
    take_steps(optimizer, params, [bad])
    assert same_bits(params, before)
    if steps_before:
        assert same_bits(snapshot(optimizer), state)
    set_amp(optimizer, found_inf=0.0, grad_scale=None)
    take_steps(optimizer, params, grads[steps_before:])
    take_steps(twin, twin_params, grads[steps_before:])
    assert same_bits(snapshot(optimizer), snapshot(twin))


@each
def test_gradients_are_divided_by_the_loss_scale(make: Make) -> None:
    (params, twin_params), grads = twins(), make_grads(12)
    take_steps(make(params), params, grads)
    optimizer = make(twin_params)
    set_amp(optimizer, found_inf=0.0, grad_scale=1024.0)
    take_steps(optimizer, twin_params, [[grad * 1024 for grad in step] for step in grads])
    assert same_bits(params, twin_params)


class NoHostSync(TorchDispatchMode):
    """Refuses every operator that makes the host wait for a value on the device."""

    FORBIDDEN = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert func.overloadpacket.__name__ not in self.FORBIDDEN, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@each
def test_a_step_waits_for_the_device_only_where_roots_are_taken(make: Make) -> None:
    param = Parameter(torch.randn(3, 3))  # one block
    optimizer = make([param], precondition_interval=4, lr=torch.tensor(0.01))
    set_amp(optimizer, found_inf=0.0, grad_scale=4.0)
    waited = []
    for step in range(1, 10):
        param.grad = torch.randn(3, 3)
        try:
            with NoHostSync():
                optimizer.step()
                optimizer.layer_stats()
            waited.append(False)
        except AssertionError:
            waited.append(True)
            optimizer._counts._travelling = None
            optimizer._counts._counts[param] = step
    assert waited == [True, True, False, False, True, False, False, False, True]


@each
def test_a_parameter_without_a_gradient_is_left_alone(make: Make) -> None:
    params = [Parameter(torch.ones(3, 2)), Parameter(torch.ones(3, 2)), Parameter(torch.ones(2))]
    params[1].requires_grad_(False)
    optimizer = make(params)
    params[0].grad = torch.ones(3, 2)
    optimizer.step()
    assert torch.equal(params[1], torch.ones(3, 2))
    assert torch.equal(params[2], torch.ones(2))
    assert [*optimizer.state] == [params[0]]
    assert [*optimizer.layer_stats()] == [0]
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.layer_stats() == {}


@each
def test_an_empty_parameter_is_stepped_without_harm(make: Make) -> None:
    (params, alone), (grads,) = twins(), make_grads(1)
    with_empty = [*params, Parameter(torch.empty(0, 4))]
    take_steps(make(with_empty), with_empty, [[*grads, torch.empty(0, 4)]])
    take_steps(make(alone), alone, [grads])
    assert same_bits(params, alone)


@each
def test_a_group_added_later_starts_by_itself(make: Make) -> None:
    """Its parameters count their own steps; an interval of 1, for it has one slot only."""
    first, (alone, later) = Parameter(torch.ones(3, 2)), twins()
    grads = make_grads(6)
    optimizer = make([first], precondition_interval=1)
    first.grad = torch.ones(3, 2)
    optimizer.step()
    optimizer.add_param_group({"params": later})
    first.grad = None
    take_steps(optimizer, later, grads)
    take_steps(make(alone, precondition_interval=1), alone, grads)
    assert float(optimizer.state[first]["step"]) == 1
    assert float(optimizer.state[later[0]]["step"]) == 6
    assert same_bits(alone, later)


@each
def test_layer_stats_say_what_the_step_was_like(make: Make) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 5)
    optimizer = make(model.named_parameters(), weight_decay=0.0, lr=1.0)
    before = [param.detach().clone() for param in model.parameters()]
    for param in model.parameters():
        param.grad = torch.randn(param.shape)
    optimizer.step()
    stats = optimizer.layer_stats()
    assert list(stats) == ["weight", "bias"]
    for (name, param), old in zip(model.named_parameters(), before, strict=True):
        moved, found = old - param.detach(), stats[name]
        torch.testing.assert_close(found["weight_norm"], old.norm())
        torch.testing.assert_close(found["update_norm"], moved.norm())
        cosine = torch.nn.functional.cosine_similarity(moved.flatten(), param.grad.flatten(), dim=0)
        torch.testing.assert_close(found["cosine"], cosine)
    assert set(stats["weight"]) == set(stats["bias"]) | {"condition_number"}
    assert float(stats["weight"]["condition_number"]) > 1


@each
def test_what_cannot_be_treated_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"takes real parameters, got torch.complex64"):
        make([Parameter(torch.ones(2, 2, dtype=torch.complex64))])
    flat = Parameter(torch.ones(4))
    flat._fsdp_flattened = True
    with pytest.raises(ValueError, match="FSDP1"):
        make([flat])
    optimizer = make([Parameter(torch.ones(2, 2))])
    with pytest.raises(ValueError, match="block_size must be a whole number >= 1, got 0"):
        optimizer.add_param_group({"params": Parameter(torch.ones(2)), "block_size": 0})
    assert len(optimizer.param_groups) == 1
    sparse = Parameter(torch.ones(2, 2))
    sparse.grad = torch.eye(2).to_sparse()
    before = sparse.detach().clone()
    with pytest.raises(RuntimeError, match="needs dense gradients, got a torch"):
        make([sparse]).step()
    assert torch.equal(sparse, before)


@each
def test_state_that_does_not_fit_is_refused(make: Make) -> None:
    param = Parameter(torch.ones(4, 3))
    optimizer = make([param])
    param.grad = torch.ones(4, 3)
    optimizer.step()
    other = torch.optim.AdamW([param])
    other.step()
    with pytest.raises(ValueError, match="saved by another"):
        optimizer.load_state_dict(other.state_dict())
    saved = optimizer.state_dict()  # what it was
    key = "block_0/factor_0"
    saved["state"][0] = {**saved["state"][0], key: torch.ones(9, 9)}
    with pytest.raises(ValueError, match=r"state 'block_0/factor_0' of parameter 0 must have"):
        optimizer.load_state_dict(saved)
    optimizer.step()
    assert float(optimizer.state[param]["step"]) == 2


def test_shapes_are_merged_and_cut_into_blocks() -> None:
    def shapes(shape: tuple[int, ...], block_size: int, merge_dims: bool = True) -> list[Any]:
        return [block.shape for block in blocks_of(shape, block_size, merge_dims)]

    assert shapes((64, 32, 3, 3), 1024) == [(64, 288)]
    assert shapes((64, 32, 3, 3), 64) == [(64, 32, 9)]
    assert shapes((64, 32, 3, 3), 64, merge_dims=False) == [(64, 32, 3, 3)]
    assert shapes((2, 3), 1024) == [(2, 3)]  # never merged into a vector
    assert shapes((7, 4), 3) == [(2, 2), (2, 2), (2, 2), (2, 2), (3, 2), (3, 2)]
    assert shapes((1, 8, 1, 8), 4) == [(4, 4)] * 4
    assert shapes((3, 1), 2) == shapes((), 2) == shapes((9,), 2) == shapes((0, 4), 2) == []


@pytest.mark.parametrize("shape", [(7, 5), (4, 3, 2, 6), (1, 6, 5)])
@pytest.mark.parametrize("block_size", [1, 2, 4, 100])
def test_blocks_cover_every_element_once(shape: tuple[int, ...], block_size: int) -> None:
    times = torch.zeros(shape)
    for block in blocks_of(shape, block_size, merge_dims=True):
        start, end = block.box.start, block.box.end
        times[tuple(map(slice, start, end))] += 1
        assert math.prod(block.shape) == block.box.numel
        assert all(length <= block_size for length in block.shape)
    assert bool((times == 1).all())


@each
def test_an_optimizer_whose_work_is_shared_is_not_copied(make: Make) -> None:
    """A copy would have the state of one rank, and not know of what."""
    optimizer = make([Parameter(torch.ones(2, 2))], process_group=object())
    with pytest.raises(ValueError, match="cannot be copied or pickled where ranks share"):
        copy.deepcopy(optimizer)
