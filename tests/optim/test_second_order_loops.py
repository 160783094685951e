"""Shampoo and SOAP in other people's loops: edited groups, wrappers, compilers, extreme numbers."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_rows import same_bits, snapshot
from torch import Tensor, nn
from torch.nn import Parameter

from largebatch.optim import SOAP, Shampoo
from largebatch.optim.blockwise.blocks import blocks_of

Make = Callable[..., Any]

MAKES: dict[str, Make] = {
    "Shampoo": lambda params, **options: Shampoo(params, **{"lr": 0.01, **options}),
    "SOAP": lambda params, **options: SOAP(params, **{"lr": 0.01, **options}),
}
each = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def train(model: nn.Module, optimizer: Any, steps: range, shape: tuple[int, ...] = (6,)) -> None:
    for number in steps:
        x = torch.randn(16, *shape, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def in_two_groups(make: Make) -> tuple[nn.Sequential, Any]:
    model = network()
    groups = [{"params": [*model[0].parameters()]}, {"params": [*model[2].parameters()]}]
    optimizer = make(groups)
    train(model, optimizer, range(3))
    return model, optimizer


def moved(model: nn.Module, optimizer: Any) -> list[bool]:
    before = [param.detach().clone() for param in model.parameters()]
    train(model, optimizer, range(3, 4))
    pairs = zip(model.parameters(), before, strict=True)
    return [not torch.equal(param, old) for param, old in pairs]


@each
def test_a_group_that_is_gone_stands_still_and_may_come_back(make: Make) -> None:
    model, optimizer = in_two_groups(make)
    first = optimizer.param_groups.pop(0)
    assert moved(model, optimizer) == [False, False, True, True]
    assert [*optimizer.layer_stats()] == [0, 1]
    assert [*optimizer.state_dict()["state"]] == [0, 1]
    optimizer.param_groups.append(first)
    assert moved(model, optimizer) == [True] * 4
    steps = [float(optimizer.state[param]["step"]) for param in model.parameters()]
    assert steps == [4, 4, 5, 5]


@each
def test_options_follow_groups_that_change_places_or_dictionaries(make: Make) -> None:
    model, optimizer = in_two_groups(make)
    optimizer.param_groups.reverse()
    optimizer.param_groups[0]["lr"] = 0.0
    assert moved(model, optimizer) == [True, True, False, False]
    optimizer.param_groups[1] = {**optimizer.param_groups[1], "lr": 0.0}
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.1}
    assert moved(model, optimizer) == [False, False, True, True]


@each
def test_a_parameter_in_the_place_of_another_begins_by_itself(make: Make) -> None:
    model, optimizer = in_two_groups(make)
    old, new = model[2].weight, Parameter(model[2].weight.detach().clone())
    model[2].weight = new
    for group in optimizer.param_groups:
        group["params"] = [new if param is old else param for param in group["params"]]
    assert moved(model, optimizer) == [True] * 4
    assert float(optimizer.state[new]["step"]) == 1
    assert len(optimizer.state_dict()["state"]) == 4


@each
def test_a_parameter_that_is_cut_otherwise_begins_anew(make: Make) -> None:
    model, optimizer = in_two_groups(make)
    optimizer.param_groups[0]["precondition"] = False
    with pytest.warns(UserWarning, match="parameter 0 is cut into other blocks"):
        assert moved(model, optimizer) == [True] * 4
    assert "block_0/exp_avg" not in optimizer.state[model[0].weight]
    assert float(optimizer.state[model[0].weight]["step"]) == 1
    assert float(optimizer.state[model[2].weight]["step"]) == 4


@each
def test_state_of_others_is_kept(make: Make) -> None:
    """Of a wrapper, by parameter and of none, in the dtype that it has."""
    model = network()
    optimizer = make(model.named_parameters())
    train(model, optimizer, range(3))
    weight = model[0].weight
    slow = torch.arange(30.0, dtype=torch.bfloat16).view(5, 6)
    optimizer.state[weight] |= {"slow": slow, "count": 7, "table": torch.arange(3)}
    optimizer.state["lookahead"] = {"k": 5}
    twin = network()
    other = make(twin.named_parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    found = other.state[twin[0].weight]
    assert same_bits([found["slow"], found["table"]], [slow, torch.arange(3)])
    assert found["count"] == 7
    assert other.state["lookahead"] == {"k": 5}
    twin.load_state_dict(model.state_dict())
    train(model, optimizer, range(3, 6))
    train(twin, other, range(3, 6))
    assert same_bits(snapshot(optimizer), snapshot(other))


@each
def test_weights_may_change_their_strides(make: Make) -> None:
    runs = []
    for convert in (None, "to", "data"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).double()
        optimizer = make(model.parameters(), block_size=8)
        for number in range(6):
            if number == 3 and convert == "to":
                model.to(memory_format=torch.channels_last)
            elif number == 3 and convert == "data":
                backwards = model[0].weight.data.permute(3, 2, 1, 0).contiguous()
                model[0].weight.data = backwards.permute(3, 2, 1, 0)
            x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(number)).double()
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        runs.append([*model.parameters()])
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=1e-9, atol=1e-12)


@each
def test_a_compiled_training_step_is_the_plain_one(make: Make) -> None:
    """Two vectors of one shape: a graph would take the state of one for both."""
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 4))
        optimizer = make(model.parameters())

        def step(x: Tensor, model: nn.Module = model, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

        run = torch.compile(step, backend="eager") if compiled else step
        for number in range(3):
            run(torch.randn(8, 6, generator=torch.Generator().manual_seed(number)))
        runs.append(snapshot(optimizer))
    assert same_bits(*runs)


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_state_does_not_take_the_default_dtype(make: Make, dtype: torch.dtype) -> None:
    runs = []
    for default in (torch.float32, dtype):
        model = network()
        optimizer = make(model.parameters())
        torch.set_default_dtype(default)
        try:
            for number in range(4):
                for param in model.parameters():
                    generator = torch.Generator().manual_seed(number)
                    param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float32)
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        runs.append(snapshot(optimizer))
    assert same_bits(*runs)


@each
def test_a_finetuning_callback_adds_a_group_without_names(make: Make) -> None:
    model = network()
    optimizer = make(model[2].named_parameters())
    train(model, optimizer, range(3))
    optimizer.add_param_group({"params": [*model[0].parameters()], "lr": 0.001})
    assert moved(model, optimizer) == [True] * 4
    assert len(optimizer.layer_stats()) == 4


@each
@pytest.mark.parametrize("schedule", ["OneCycleLR", "CyclicLR"])
def test_schedules_that_cycle_a_momentum_move_beta1(make: Make, schedule: str) -> None:
    """Beside Shampoo's own momentum too, with effect: a copy made on the way goes on alike, and
    averages of one gradient stay that gradient."""
    options = {"momentum": 0.5} if make is MAKES["Shampoo"] else {}
    runs = []
    for cycled in (True, False):
        param = Parameter(torch.ones(4, 3))
        optimizer = make([param], **options)
        make_schedule = getattr(torch.optim.lr_scheduler, schedule)
        given = {"max_lr": 0.1, "cycle_momentum": cycled}
        given |= {"total_steps": 12} if schedule == "OneCycleLR" else {"base_lr": 0.01}
        scheduler = make_schedule(optimizer, **given)
        for number in range(8):
            if number == 5:
                twin = copy.deepcopy(optimizer)
            generator = torch.Generator().manual_seed(number)
            param.grad = torch.randn(4, 3, generator=generator)
            optimizer.step()
            if number == 5:
                (other,) = twin.param_groups[0]["params"]
                other.grad = param.grad.clone()
                twin.step()
                assert same_bits(snapshot(twin), snapshot(optimizer))
            scheduler.step()
        runs.append(param.detach())
        beta1 = optimizer.param_groups[0]["betas"][0]
        assert (beta1 != 0.9) == cycled
    assert not torch.equal(*runs)


# Numbers ------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("shape", [(6, 4), (5,)], ids=str)
@pytest.mark.parametrize(("at", "place"), [(0, ...), (0, 1), (3, ...), (3, 1)])
def test_a_huge_gradient_is_dropped_and_counted(
    make: Make, shape: tuple[int, ...], at: int, place: Any
) -> None:
    generator = torch.Generator().manual_seed(0)
    param = Parameter(torch.randn(shape, generator=generator))
    optimizer = make([param])
    for number in range(6):
        param.grad = torch.randn(shape, generator=generator)
        if number == at:
            param.grad.view(-1)[place] = -1e30
        before = param.detach().clone()
        optimizer.step()
        assert bool(torch.isfinite(param).all())
        if number != at:
            assert 0.1 < float((param.detach() - before).norm() / 0.01) < 6
        (stats,) = optimizer.layer_stats().values()
        assert all(math.isfinite(value) for value in stats.values())
        dropped = (param.numel() if place is ... else 1) if number == at else 0
        assert float(stats["dropped_elements"]) == dropped
    assert float(optimizer.state[param]["dropped_elements"]) == (1 if place == 1 else param.numel())


@each
@pytest.mark.parametrize("grafting", ["adam", "sgd", "none"])
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-23, 1e-21, 1e-19, 1e-17, 1e10, 1e16])
def test_a_gradient_of_any_scale_keeps_weights_finite(
    make: Make, grafting: str, scale: float
) -> None:
    if make is MAKES["SOAP"] and grafting != "adam":
        return
    options = {"grafting": grafting} if make is MAKES["Shampoo"] else {}
    generator = torch.Generator().manual_seed(0)
    param = Parameter(torch.ones(8, 6))
    optimizer = make([param], lr=1e-3, **options)
    for _ in range(5):
        column = torch.randn(8, 1, generator=generator)
        param.grad = column @ torch.randn(1, 6, generator=generator) * scale
        optimizer.step()
    assert bool(torch.isfinite(param).all())
    assert not optimizer.failures.total
    (stats,) = optimizer.layer_stats().values()
    assert all(math.isfinite(value) for value in stats.values())


@each
@pytest.mark.parametrize("shape", [(4, 3), (5,)], ids=str)
def test_bias_corrections_count_the_weight_after_a_change_of_betas(
    make: Make, shape: tuple[int, ...]
) -> None:
    """Averages of one and the same gradient are that gradient, whatever β was and is; also after
    the state was saved and loaded, and from a state that does not have the counts yet."""
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {"precondition_interval": 1, "eps": 0.0, "lr": 1e-3}
    changes = {3: (0.5, 0.9), 5: (0.0, 0.999), 8: (0.95, 0.0), 12: (0.9, 0.99)}
    plain, ramped = Parameter(torch.zeros_like(grad)), Parameter(torch.zeros_like(grad))
    one, other = make([plain], **options), make([ramped], **options)
    for step in range(16):
        if step in changes:
            other.param_groups[0]["betas"] = changes[step]
        if step in (6, 10):
            saved = copy.deepcopy(other.state_dict())
            other = make([ramped], **options)
            other.load_state_dict(saved)
        for param, optimizer in ((plain, one), (ramped, other)):
            param.grad = grad.clone()
            optimizer.step()
        # In steps: a count too many or too few moves by hundredths at least. In SOAP's basis all
        # but the diagonal of this gradient is null, which rounding moves by a thousandth each time.
        limit = 3e-3 * (step + 1) if make is MAKES["SOAP"] else 1e-5
        torch.testing.assert_close(ramped / 1e-3, plain / 1e-3, rtol=0, atol=limit)
    saved = copy.deepcopy(one.state_dict())
    for name in [*saved["state"][0]]:
        if name.endswith(("_extra_steps", "dropped_elements")):
            del saved["state"][0][name]
    resumed = make([ramped.detach_()], **options)
    ramped.copy_(plain.detach())
    resumed.load_state_dict(saved)
    for param, optimizer in ((plain, one), (ramped, resumed)):
        param.grad = grad.clone()
        optimizer.step()
    assert same_bits([plain.detach()], [ramped])


@pytest.mark.parametrize("interval", [1, 10])
def test_soap_keeps_still_in_a_null_space(interval: int) -> None:
    """Gradients of rank 4 in fixed spaces of 32 dimensions: what moves elsewhere is rounding."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(32, 32, generator=generator))[0] for _ in range(2))
    param = Parameter(torch.zeros(32, 32))
    optimizer = SOAP([param], lr=1.0, precondition_interval=interval)
    for step in range(20):
        core = torch.randn(4, 4, generator=generator)
        param.grad = left[:, :4] @ core @ right[:, :4].T
        before = param.detach().clone()
        optimizer.step()
        turned = left.T @ (param.detach() - before) @ right
        inside = turned[:4, :4].norm()
        turned[:4, :4] = 0
        if step >= 2:
            assert float(turned.norm() / inside) < 0.02


# Memory -------------------------------------------------------------------------------------------


def test_long_dimensions_have_no_factor_and_kernels_keep_their_outputs() -> None:
    def shapes(shape: tuple[int, ...], size: int, longest: int | None) -> list[Any]:
        return [(block.shape, block.dims) for block in blocks_of(shape, size, True, longest)]

    assert shapes((12, 4), 4, 10) == [((12, 4), (1,))]
    assert shapes((12, 9), 4, 10) == [((12, 3), (1,))] * 3
    assert shapes((12, 4), 4, None) == [((4, 4), (0, 1))] * 3
    assert shapes((12, 11), 4, 10) == shapes((12,), 4, 10) == []
    assert shapes((8, 4, 3, 3), 1024, 10_000) == [((8, 36), (0, 1))]
    assert shapes((2, 2, 300), 8, 200) == [((2, 2, 300), (0, 1))]


@each
def test_an_embedding_costs_what_its_features_do(make: Make) -> None:
    vocabulary = Parameter(torch.zeros(10_001, 4))
    both = Parameter(torch.zeros(11, 12))
    groups = [
        {"params": [("table.weight", vocabulary)]},
        {"params": [("wide", both)], "max_preconditioner_dim": 10},
    ]
    optimizer = make(groups)
    for param in (vocabulary, both):
        param.grad = torch.ones_like(param)
    optimizer.step()
    state = optimizer.state[vocabulary]
    assert state["block_0/factor_1"].shape == (4, 4)
    assert "block_0/factor_0" not in state
    assert not any(key.startswith("block_") for key in optimizer.state[both])
    taken = sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.dim())
    words = repr(optimizer)
    assert f"{taken * 4 / 1e6:.3g} MB for" in words
    assert "No factor along a long dimension: table.weight (10001, 4)" in words
    with pytest.raises(ValueError, match="max_preconditioner_dim must be a whole number >= 1 or"):
        make([both], max_preconditioner_dim=0)


def test_a_side_without_a_factor_leaves_the_other_its_exponent() -> None:
    """Shampoo: G (GᵀG)^(-1/2), from one factor; SOAP: Adam in the basis of one side."""
    grad = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    param = Parameter(torch.zeros_like(grad))
    optimizer = Shampoo(
        [param], lr=1.0, grafting="none", max_preconditioner_dim=10, ridge=1e-12, betas=(0.0, 0.9)
    )
    param.grad = grad.clone()
    optimizer.step()
    left, _, right = torch.linalg.svd(grad, full_matrices=False)
    torch.testing.assert_close(param.detach(), -left @ right)

    weight = Parameter(torch.zeros_like(grad))
    soap = SOAP([weight], lr=1.0, max_preconditioner_dim=10, eps=0.0, precondition_interval=1)
    for _ in range(2):
        before = weight.detach().clone()
        weight.grad = grad.clone()
        soap.step()
    basis = torch.linalg.eigh(grad.T @ grad)[1]
    step = (before - weight.detach()) @ basis
    torch.testing.assert_close(step, (grad @ basis).sign())
