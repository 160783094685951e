"""What Shampoo and SOAP promise beside the contract: when they wait, blocks, statistics."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract_rows import CONTRACT, NoHostSync, set_amp
from optimizer_rows import make_grads, make_layers, same_bits, take_steps
from torch.nn import Parameter

from largebatch.optim.blockwise.blocks import blocks_of

Make = Callable[..., Any]

MAKES: dict[str, Make] = {row.name: row.make for row in CONTRACT if row.name in ("Shampoo", "SOAP")}
each = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)


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
def test_a_group_added_later_starts_by_itself(make: Make) -> None:
    """Its parameters count their own steps; an interval of 1, for it has one slot only."""
    first, alone, later = Parameter(torch.ones(3, 2)), make_layers(), make_layers()
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
