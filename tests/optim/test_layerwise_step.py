"""What LARS and LAMB promise beside the contract: one call for norms, no waiting, statistics."""

from collections import Counter
from typing import Any

import pytest
import torch
from contract_rows import NoHostSync, set_amp
from optimizer_rows import OUR_ROWS, Row, make_grads, make_layers, take_steps, tensors_of
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from largebatch.optim import LAMB, LARS

each_of_ours = pytest.mark.parametrize("row", OUR_ROWS, ids=lambda row: row.name)


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
    """On an accelerator; here one without values."""
    params = [Parameter(param.detach().to("meta")) for param in make_layers()]
    optimizer = row.make([{"params": params[:3]}, {"params": params[3:]}])
    with CountCalls() as calls:
        take_steps(optimizer, params, [[torch.empty_like(param) for param in params]])
    assert calls.counts["_foreach_norm"] == 4  # of weights and of updates, in either group
    assert not any("norm" in name for name in calls.counts if name != "_foreach_norm")


@each_of_ours
def test_a_cpu_makes_no_more_calls_for_more_small_layers(row: Row) -> None:
    def calls_for(count: int) -> Counter[str]:
        params = [Parameter(torch.randn(5, 3)) for _ in range(count)]
        optimizer = row.make(params)
        grads = [[torch.randn(5, 3) for _ in params] for _ in range(2)]
        take_steps(optimizer, params, grads[:1])
        with CountCalls() as calls:
            take_steps(optimizer, params, grads[1:])
        views = {"view", "detach", "clone", "select", "slice", "split", "alias", "unbind"}
        return Counter({name: n for name, n in calls.counts.items() if name not in views})

    assert calls_for(40) == calls_for(3)


@each_of_ours
def test_a_step_runs_where_no_value_exists(row: Row) -> None:
    params = [Parameter(param.detach().to("meta")) for param in make_layers(torch.bfloat16)]
    optimizer = row.make(params)
    take_steps(optimizer, params, [[torch.empty_like(param) for param in params]] * 2)
    assert all(tensor.is_meta for tensor in tensors_of(optimizer))
    stats = optimizer.layer_stats().values()
    on_device = [v for layer in stats for key, v in layer.items() if key != "adapts"]
    assert all(value.is_meta for value in on_device)


@each_of_ours
def test_layer_stats_are_the_norms_and_ratio_of_the_last_step(row: Row) -> None:
    params, (grads,) = make_layers(), make_grads(1)
    names = [f"layer{index}" for index in range(len(params))]
    norms = [param.detach().norm() for param in params]
    optimizer = row.make(zip(names, params, strict=True))
    assert optimizer.layer_stats() == {}
    take_steps(optimizer, params, [grads])
    stats = optimizer.layer_stats()
    assert list(stats) == names
    for layer, grad, weight_norm in zip(stats.values(), grads, norms, strict=True):
        dropped = ["dropped_elements"] if row.optimizer is LAMB else []
        assert list(layer) == ["weight_norm", "update_norm", "trust_ratio", "adapts", *dropped]
        assert all(value.dim() == 0 for value in layer.values())
        torch.testing.assert_close(layer["weight_norm"], weight_norm)
        update_norm, decay = layer["update_norm"], row.options["weight_decay"]
        if row.optimizer is LARS:
            torch.testing.assert_close(update_norm, grad.norm())
            denominator = update_norm + decay * weight_norm + row.options["eps"]
            ratio = row.options["trust_coefficient"] * weight_norm / denominator
        else:
            ratio = weight_norm / update_norm
        expected = ratio if weight_norm > 0 else torch.tensor(1.0)
        torch.testing.assert_close(layer["trust_ratio"], expected)


@each_of_ours
def test_layer_stats_of_unnamed_parameters_are_keyed_by_index_over_all_groups(row: Row) -> None:
    params, (grads,) = make_layers(), make_grads(1)
    optimizer = row.make([{"params": params[:2]}, {"params": params[2:], "adapt": False}])
    params[1].grad, params[2].grad, params[5].grad = grads[1], grads[2], grads[5]
    optimizer.step()
    stats = optimizer.layer_stats()
    assert list(stats) == [1, 2, 5]
    assert stats[1]["trust_ratio"] != 1
    assert [bool(layer["adapts"]) for layer in stats.values()] == [True, False, False]
    assert stats[2]["trust_ratio"] == stats[5]["trust_ratio"] == 1


def test_state_keys_are_the_ones_others_read() -> None:
    params, grads = make_layers(), make_grads(1)
    optimizers = [
        (LAMB(params), ["exp_avg", "exp_avg_sq", "step"]),
        (LARS(params, lr=0.1), ["momentum_buffer"]),
    ]
    for optimizer, keys in optimizers:
        take_steps(optimizer, params, grads)
        assert all(sorted(optimizer.state[param]) == keys for param in params)
    without_momentum = LARS(params, lr=0.1, momentum=0.0)
    take_steps(without_momentum, params, grads)
    assert not without_momentum.state


def test_an_int_step_of_another_optimizers_checkpoint_is_accepted() -> None:
    params, grads = make_layers(), make_grads(2)
    optimizer = LAMB(params)
    take_steps(optimizer, params, grads[:1])
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state["step"] = 1
    optimizer.load_state_dict(saved)
    take_steps(optimizer, params, grads[1:])
    assert all(state["step"].item() == 2 for state in optimizer.state.values())
