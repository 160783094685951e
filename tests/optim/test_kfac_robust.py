"""K-FAC with numbers at the ends of FP32, with groups as users edit them, and what it says."""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.nn.functional import cross_entropy

from largebatch.optim import KFAC
from largebatch.optim.kronecker.damping import FORMS, Damping, decomposed
from largebatch.optim.math.matrix_roots import RootError

OPTIONS = [
    {},
    {"graft": "none"},
    {"form": "exact", "kl_clip": 1e-3},
    {"form": "factored_eigen"},
    {"relative_damping": False},
    {"rule": "sgd", "graft": "sgd"},
]


class Scaled(nn.Module):
    """A classifier whose output is multiplied by a number, and so are all gradients."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.factor = nn.Linear(6, 5), nn.Linear(5, 3), factor

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x))) * self.factor


def train(
    model: nn.Module,
    optimizer: KFAC,
    numbers: range,
    loss_factors: dict[int, float] | None = None,
) -> None:
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        x, y = torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)
        optimizer.zero_grad()
        (cross_entropy(model(x), y) * (loss_factors or {}).get(number, 1.0)).backward()
        assert all(param.grad.isfinite().all() for param in model.parameters())
        optimizer.step()


def are_finite(model: nn.Module) -> bool:
    return all(bool(param.isfinite().all()) for param in model.parameters())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("relative", [False, True])
def test_factors_of_any_scale_have_finite_inverses_or_are_failures(
    form: str, relative: bool
) -> None:
    for scale in (0.0, 1e-44, 1e-42, 1e-38, 1e-37, 1e-36, 1e-34, 1.0, 1e37):
        factor = torch.diag(torch.tensor([1.0, 0.5, 0.0]))[None] * scale
        roots = decomposed(
            form, Damping(0.03, relative, 1e-6), torch.eye(3)[None], factor, (False, False)
        )
        assert all(bool(value.isfinite().all()) for value in roots.values()), scale
    infinite = torch.eye(3)[None] * torch.inf
    with pytest.raises(RootError):
        decomposed(form, Damping(0.03, relative, 1e-6), infinite, infinite, (False, False))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tiny_gradients_leave_weights_finite(options: dict[str, Any]) -> None:
    for factor in (1e-16, 1e-18, 1e-19, 1e-20, 1e-21):
        model = Scaled(factor)
        optimizer = KFAC(model, lr=0.1, **options)
        train(model, optimizer, range(4))
        assert are_finite(model), factor


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("factor", [1e10, 1e18, 1e30])
def test_one_huge_finite_gradient_leaves_weights_finite_and_is_counted(
    options: dict[str, Any], factor: float
) -> None:
    model = Scaled()
    optimizer = KFAC(model, lr=0.01, **options)
    train(model, optimizer, range(8), {3: factor})
    assert are_finite(model)
    states = [optimizer.state[param] for param in model.parameters()]
    assert (sum(float(s["dropped_elements"]) for s in states) > 0) == (factor > 1e17)
    assert (float(states[0]["dropped_updates"]) == 1) == (factor == 1e30)


# Groups -----------------------------------------------------------------------------------------


def two_groups() -> tuple[Scaled, KFAC]:
    model = Scaled()
    groups = [{"params": [*layer.parameters()]} for layer in (model.first, model.last)]
    optimizer = KFAC(model, lr=0.01, params=groups)
    train(model, optimizer, range(1))
    return model, optimizer


def deleted(model: Scaled, optimizer: KFAC) -> list[bool]:
    del optimizer.param_groups[0]
    return [False, False, True, True]


def reversed_with_a_rate_of_zero(model: Scaled, optimizer: KFAC) -> list[bool]:
    optimizer.param_groups.reverse()
    optimizer.param_groups[0]["lr"] = 0.0
    return [True, True, False, False]


def other_dictionaries(model: Scaled, optimizer: KFAC) -> list[bool]:
    optimizer.param_groups[:] = [{**group} for group in optimizer.param_groups]
    optimizer.param_groups[1]["lr"] = 0.0
    return [True, True, False, False]


def a_parameter_replaced(model: Scaled, optimizer: KFAC) -> list[bool]:
    old, model.last.weight = model.last.weight, nn.Parameter(model.last.weight.detach().clone())
    for group in optimizer.param_groups:
        group["params"] = [model.last.weight if p is old else p for p in group["params"]]
    return [True, True, True, True]


def a_parameter_left_out(model: Scaled, optimizer: KFAC) -> list[bool]:
    optimizer.param_groups[1]["params"] = [model.last.weight]
    return [True, True, True, False]


def a_bare_dictionary(model: Scaled, optimizer: KFAC) -> list[bool]:
    optimizer.param_groups[1:] = [{"params": [*model.last.parameters()], "lr": 0.01}]
    return [True, True, True, True]


@pytest.mark.parametrize(
    "edit",
    [
        *(deleted, reversed_with_a_rate_of_zero, other_dictionaries, a_parameter_replaced),
        *(a_parameter_left_out, a_bare_dictionary),
    ],
    ids=lambda edit: edit.__name__,
)
def test_groups_are_read_at_each_step(edit: Callable[[Scaled, KFAC], list[bool]]) -> None:
    model, optimizer = two_groups()
    moves = edit(model, optimizer)
    before = [param.detach().clone() for param in model.parameters()]
    train(model, optimizer, range(1, 3))
    after = [*model.parameters()]
    assert [not torch.equal(p, b) for p, b in zip(after, before, strict=True)] == moves
    curved = {"first.weight"} if edit is not deleted else set()
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(layer.weight)] for layer in optimizer._owned()}
    assert found == curved | {"last.weight"}


def test_what_is_unfrozen_later_and_given_without_names_has_curvature_from_its_first_pass() -> None:
    model = Scaled()
    model.first.weight.requires_grad_(False)
    optimizer = KFAC(model, lr=0.01, params=model.last.named_parameters())
    train_last = {*optimizer.layer_stats()}
    assert not train_last
    model.first.bias.requires_grad_(False)
    x, y = torch.randn(16, 6), torch.randint(3, (16,))
    cross_entropy(model(x), y).backward()
    optimizer.step()
    assert [*optimizer.layer_stats()] == ["weight"]
    model.first.requires_grad_(True)
    optimizer.add_param_group({"params": [*model.first.parameters()], "lr": 0.001})
    train(model, optimizer, range(1, 2))
    assert {*optimizer.layer_stats()} == {"weight", "first.weight"}
    assert float(optimizer.state[model.first.weight]["items"]) == 16


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_layer_frozen_at_first_and_again_later_keeps_its_curvature(frozen: str) -> None:
    model = Scaled()
    part = model.first.get_parameter(frozen)
    part.requires_grad_(False)
    optimizer = KFAC(model, lr=0.01)
    items = []
    for number in range(4):
        part.requires_grad_(number in (1, 3))
        x, y = torch.randn(16, 6), torch.randint(3, (16,))
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        items.append(float(optimizer.state[model.first.weight].get("items", torch.zeros(1))))
    # A layer's matrix is another with the bias: its averages begin again.
    assert items == ([0, 16, 16, 32] if frozen == "weight" else [16, 16, 32, 48])


# State ------------------------------------------------------------------------------------------


def test_state_of_wrappers_is_saved_and_loaded_with_its_own() -> None:
    model = Scaled()
    optimizer = KFAC(model, lr=0.01)
    train(model, optimizer, range(2))
    optimizer.state["lookahead"] = {"steps": 3}
    optimizer.state[model.first.bias]["slow"] = torch.arange(5.0)
    saved = optimizer.state_dict()
    other = Scaled()
    resumed = KFAC(other, lr=0.01)
    resumed.load_state_dict(saved)
    assert resumed.state["lookahead"] == {"steps": 3}
    assert torch.equal(resumed.state[other.first.bias]["slow"], torch.arange(5.0))


def test_a_checkpoint_of_before_an_option_or_a_count_existed_loads() -> None:
    model = Scaled()
    optimizer = KFAC(model, lr=0.01)
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state.pop("dropped_elements")
        state.pop("dropped_updates", None)
    del saved["param_groups"][0]["ridge"]
    other = Scaled()
    resumed = KFAC(other, lr=0.01)
    resumed.load_state_dict(saved)
    train(other, resumed, range(2, 4))
    assert float(resumed.state[other.first.weight]["dropped_updates"]) == 0


def test_a_state_dict_of_doubled_groups_is_written() -> None:
    model = Scaled()
    optimizer = KFAC(model, lr=0.01)
    train(model, optimizer, range(1))
    optimizer.param_groups.append(dict(optimizer.param_groups[0]))
    assert len(optimizer.state_dict()["param_groups"]) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_steps_are_counted_in_fp32_whatever_the_default_dtype(dtype: torch.dtype) -> None:
    model = nn.Linear(2, 2)
    torch.set_default_dtype(dtype)
    try:
        optimizer = KFAC(model, lr=torch.tensor([1e-3]))
        model(torch.ones(3, 2, dtype=torch.float32)).sum().backward()
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    for key in ("step", "dropped_elements", "factor_in", "items"):
        assert optimizer.state[model.weight][key].dtype == torch.float32


# What it says -----------------------------------------------------------------------------------


def test_parameters_in_the_place_of_the_model_are_refused_with_the_line_to_write() -> None:
    for wrong in (nn.Linear(2, 2).parameters(), [nn.Parameter(torch.ones(2))]):
        with pytest.raises(TypeError, match=r"takes the model.*write KFAC\(model, lr=…\)"):
            KFAC(wrong, lr=0.1)


def test_its_repr_names_what_the_whole_optimizer_does() -> None:
    said = repr(KFAC(Scaled(), lr=0.01, rule="sgd", inverse_interval=7))
    for part in ("rule='sgd'", "fallback='adam'", "inverse_interval=7", "2 of 2 weights, 100%"):
        assert part in said


def test_it_logs_once_how_much_has_curvature(caplog: pytest.LogCaptureFixture) -> None:
    model = Scaled()
    optimizer = KFAC(model, lr=0.01)
    with caplog.at_level(logging.INFO, logger="largebatch.optim"):
        train(model, optimizer, range(3))
    assert [record.message for record in caplog.records] == [
        "KFAC has curvature for 2 of 2 weights, 100% of their elements"
    ]


class Functional(Scaled):
    """Its last layer's weight is used without the module."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.tanh(self.first(x)), self.last.weight, self.last.bias)


class Matrices(Scaled):
    """Most of its weights are in no layer with curvature."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(6) + torch.ones(6, 6) / 9)
        self.other = nn.Parameter(torch.eye(6))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x @ self.matrix @ self.other)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Functional, r"seen no pass through 'last\.weight', which have gradients"),
        (Matrices, r"2 of 4 weights, 38% of their elements; its fallback moves 'matrix', 'other'"),
    ],
)
def test_it_warns_once_of_what_has_no_curvature(make: Callable[[], Scaled], message: str) -> None:
    model = make()
    optimizer = KFAC(model, lr=0.01)
    with pytest.warns(UserWarning, match=message):
        train(model, optimizer, range(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, range(1, 3))


def test_making_the_state_to_load_into_says_nothing_of_passes() -> None:
    """Torch makes it by a step of zero gradients, with a learning rate of 0."""
    model = Functional()
    optimizer = KFAC(model, lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_optimizer_state_dict(model, optimizer)
    with pytest.warns(UserWarning, match=r"seen no pass through 'last\.weight', which"):
        train(model, optimizer, range(1))
