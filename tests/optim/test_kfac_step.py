"""A step of K-FAC against what it should be, in FP64 by other means."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from kfac_networks import CASES, Case, only_layer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from largebatch.optim import KFAC
from largebatch.optim.kronecker.factors import averages

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
PLAIN = {"rule": "plain", "graft": "none", "factor_decay": 0.0, "inverse_interval": 1}
TIGHT = {"rtol": 1e-9, "atol": 1e-12}


def moved_by(optimizer: KFAC, params: list[nn.Parameter]) -> list[Tensor]:
    """What a step subtracts from the parameters."""
    before = [param.detach().clone() for param in params]
    optimizer.step()
    return [old - param.detach() for old, param in zip(before, params, strict=True)]


def flat(tensors: list[Tensor]) -> Tensor:
    """Weight and bias as the rows of one matrix, row after row."""
    weight, bias = tensors
    return torch.cat([weight, bias.unsqueeze(1)], dim=1).reshape(-1)


@pytest.mark.parametrize("form", ["factored_eigen", "factored_cholesky", "exact"])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_the_step_is_the_natural_gradient_where_kfac_is_exact(form: str, damping: float) -> None:
    """A linear layer whose inputs and gradients are independent: every pair of them occurs once.

    (F + λ)⁻¹ ∇ with F summed over the gradients of single examples; damped, only "exact" is that.
    """
    torch.manual_seed(0)
    layer = nn.Linear(3, 2).double()
    inputs, deltas = torch.randn(7, 3).double(), torch.randn(5, 2).double()
    pairs = [*product(inputs, deltas)]
    gradients = []
    for x, delta in pairs:
        gradients.append(flat([*torch.autograd.grad(layer(x) @ delta, [*layer.parameters()])]))
    stacked = torch.stack(gradients)
    fisher, gradient = stacked.T @ stacked / len(pairs), stacked.mean(dim=0)
    expected = torch.linalg.solve(fisher + damping * torch.eye(len(fisher)).double(), gradient)

    options = {"damping": damping, "relative_damping": False, "ridge": 0.0, "form": form}
    optimizer = KFAC(layer, lr=0.5, **PLAIN, **options)
    xs, targets = map(torch.stack, zip(*pairs, strict=True))
    (layer(xs) * targets).sum(dim=1).mean().backward()
    step = flat(moved_by(optimizer, [*layer.parameters()]))
    if damping == 0 or form == "exact":
        torch.testing.assert_close(step, 0.5 * expected, **TIGHT)
    else:
        assert not torch.allclose(step, 0.5 * expected, rtol=1e-2)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(("form", "p"), [("factored_eigen", 2), ("factored_cholesky", 1)])
def test_factored_damping_is_that_of_martens_and_grosse(form: str, p: int, relative: bool) -> None:
    """Section 6.3: π = √(tr A / dim A · dim G / tr G), by dense algebra over A ⊗ G; the condition
    number is that in the p-norm."""
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 2).double(), torch.randn(8, 3).double()
    options = {"damping": 0.04, "relative_damping": relative, "form": form}
    optimizer = KFAC(layer, lr=1.0, **options, **PLAIN)
    layer(x).square().sum(dim=1).mean().backward()
    gradient = flat([layer.weight.grad, layer.bias.grad])
    step = flat(moved_by(optimizer, [*layer.parameters()]))
    factor_in, factor_out = (
        f[0] for f in averages(only_layer(layer), optimizer.state[layer.weight])
    )
    mean_in, mean_out = factor_in.trace() / 4, factor_out.trace() / 2
    damping = 0.04 * (mean_in * mean_out if relative else 1.0)
    pi = (mean_in / mean_out).sqrt()
    damped_in = factor_in + pi * damping**0.5 * torch.eye(4).double()
    damped_out = factor_out + damping**0.5 / pi * torch.eye(2).double()
    expected = torch.linalg.solve(torch.kron(damped_out, damped_in), gradient)
    torch.testing.assert_close(step, expected, **TIGHT)
    stats = optimizer.layer_stats()["weight"]
    condition = torch.linalg.cond(torch.kron(damped_out, damped_in), p)
    torch.testing.assert_close(stats["condition_number"], condition, **TIGHT)
    cosine = nn.functional.cosine_similarity(expected, gradient, dim=0)
    torch.testing.assert_close(stats["cosine"], cosine, **TIGHT)
    torch.testing.assert_close(stats["update_norm"], expected.norm(), **TIGHT)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("max_factor_size", [100, 4])
def test_eigen_and_inverse_are_the_same_preconditioner(case: Case, max_factor_size: int) -> None:
    steps = {}
    for form in ("factored_eigen", "factored_cholesky"):
        module, x = case.layer()
        options = {"form": form, "damping": 1e-2, "max_factor_size": max_factor_size}
        optimizer = KFAC(module, lr=1.0, **PLAIN, **options)
        module(x).sin().square().mean().backward()
        steps[form] = moved_by(optimizer, [*module.parameters()])
    for one, other in zip(*steps.values(), strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("form", ["factored_eigen", "factored_cholesky", "exact"])
def test_each_group_of_a_convolution_is_preconditioned_as_a_layer_of_its_own(form: str) -> None:
    torch.manual_seed(0)
    grouped = nn.Conv2d(4, 6, 2, groups=2).double()
    x, options = torch.randn(5, 4, 3, 3).double(), {**PLAIN, "form": form, "damping": 0.1}
    apart = [nn.Conv2d(2, 3, 2).double() for _ in range(2)]
    for group, conv in enumerate(apart):
        conv.weight.data, conv.bias.data = (
            param.detach()[3 * group : 3 * group + 3].clone() for param in grouped.parameters()
        )
    optimizer = KFAC(grouped, lr=1.0, **options)
    grouped(x).sin().sum(dim=(1, 2, 3)).mean().backward()
    whole = moved_by(optimizer, [*grouped.parameters()])
    parts = []
    for group, conv in enumerate(apart):
        optimizer = KFAC(conv, lr=1.0, **options)
        conv(x[:, 2 * group : 2 * group + 2]).sin().sum(dim=(1, 2, 3)).mean().backward()
        parts.append(moved_by(optimizer, [*conv.parameters()]))
    for one, others in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(one, torch.cat(others), **TIGHT)


# Twelve steps of the whole, from the formulas, in numpy ------------------------------------------


class Reference:
    """K-FAC for one linear layer and AdamW for a vector, in numpy."""

    def __init__(self, weight: Any, bias: Any, **options: Any) -> None:
        self.w = np.concatenate([weight, bias[:, None]], axis=1)  # (out, in + 1)
        self.o, self.t = options, 0
        self.factors: list[Any] = [0.0, 0.0]
        self.first = self.second = self.m = self.b = 0.0
        self.roots: list[Any] = []
        self.asked: list[Any] = []

    def step(self, a: Any, delta: Any) -> None:
        """One step on inputs (n, in) and gradients of each example's loss (n, out)."""
        o, self.t = self.o, self.t + 1
        a = np.concatenate([a, np.ones((len(a), 1))], axis=1)
        gradient = delta.T @ a / len(a)
        decay, correction = o["factor_decay"], 1 - o["factor_decay"] ** self.t
        for index, rows in enumerate((a, delta)):
            new = rows.T @ rows / len(rows)
            self.factors[index] = decay * self.factors[index] + (1 - decay) * new
        if self.t - 1 in (0, 1, 2, 4, 8) or (self.t - 1) % o["inverse_interval"] == 0:
            corrected = [factor / correction for factor in self.factors]
            if o.get("refresh") == "beside":
                asked, self.asked = self.asked, corrected
                corrected = asked if self.t > o["inverse_interval"] else corrected
            self.roots = [
                np.linalg.inv(f + o["damping"] ** 0.5 * np.trace(f) / len(f) * np.eye(len(f)))
                for f in corrected
            ]
        u = self.roots[1] @ gradient @ self.roots[0]
        beta1, beta2 = o["betas"]
        self.first = beta1 * self.first + (1 - beta1) * gradient
        self.second = beta2 * self.second + (1 - beta2) * gradient**2
        mean, square = self.first / (1 - beta1**self.t), self.second / (1 - beta2**self.t)
        lengths = {
            "adam": np.linalg.norm(mean / (np.sqrt(square) + o["eps"])),
            "sgd": np.linalg.norm(mean),
            "none": np.linalg.norm(u),
        }
        u = u * lengths[o["graft"]] / np.linalg.norm(u)
        if o["kl_clip"] is not None:
            u = u * min(1.0, np.sqrt(o["kl_clip"] / (o["lr"] ** 2 * np.sum(u * gradient))))
        if o["rule"] == "average":
            self.m = beta1 * self.m + (1 - beta1) * u
            direction = self.m / (1 - beta1**self.t)
        else:
            self.b = o["momentum"] * self.b + u
            direction = u + o["momentum"] * self.b if o["nesterov"] else self.b
        self.w = self.w - o["lr"] * direction - o["lr"] * o["weight_decay"] * self.w


OPTIONS: dict[str, Any] = {
    "lr": 0.05,
    "betas": (0.8, 0.95),
    "eps": 1e-3,
    "weight_decay": 0.1,
    "damping": 0.02,
    "factor_decay": 0.7,
    "graft": "adam",
    "kl_clip": None,
    "rule": "average",
    "momentum": 0.6,
    "nesterov": False,
    "inverse_interval": 1,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"graft": "sgd"},
        {"graft": "none", "rule": "sgd", "kl_clip": 1e-3},
        {"rule": "sgd", "nesterov": True},
        {"inverse_interval": 9},
        {"inverse_interval": 2, "refresh": "beside"},
        {"inverse_interval": 1, "refresh": "beside"},
        {"kl_clip": 1e-2, "factor_decay": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["factored_eigen", "factored_cholesky"])
def test_twelve_steps_are_those_of_the_formulas(changes: dict[str, Any], form: str) -> None:
    options = {**OPTIONS, **changes}
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    reference = Reference(*(p.detach().numpy().copy() for p in layer.parameters()), **options)
    optimizer = KFAC(layer, form=form, ridge=0.0, **options)
    for _ in range(12):
        x, labels = torch.randn(6, 4).double(), torch.randint(0, 3, (6,))
        optimizer.zero_grad()
        logits = layer(x)
        cross_entropy(logits, labels).backward()
        p = logits.detach().softmax(dim=1)
        delta = p - nn.functional.one_hot(labels, 3)
        optimizer.step()
        reference.step(x.numpy(), delta.numpy())
    found = torch.cat([layer.weight, layer.bias.unsqueeze(1)], dim=1).detach()
    torch.testing.assert_close(found, torch.from_numpy(reference.w), rtol=1e-10, atol=1e-12)


def test_what_has_no_curvature_is_moved_as_adamw_moves_it() -> None:
    options = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
    weights = []
    for make in (KFAC, lambda model, **o: torch.optim.AdamW(model.parameters(), **o)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.LayerNorm(4), nn.PReLU(4)).double()
        optimizer = make(model, **options)
        for _ in range(5):
            optimizer.zero_grad()
            (model(torch.randn(3, 4).double()) ** 2).mean().backward()
            optimizer.step()
        weights.append([*model.parameters()])
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-12, atol=1e-14)


def test_the_learning_rate_of_the_fallback_is_a_ratio() -> None:
    moved = []
    for ratio in (1.0, 0.25):
        torch.manual_seed(0)
        model = nn.LayerNorm(4).double()
        optimizer = KFAC(model, lr=0.1, fallback="sgd", fallback_lr_ratio=ratio)
        (model(torch.randn(3, 4).double()) ** 3).mean().backward()
        moved.append(moved_by(optimizer, [*model.parameters()])[0])
    torch.testing.assert_close(moved[0], 4 * moved[1])


@pytest.mark.parametrize("relative", [False, True])
def test_damping_moves_geometrically_with_the_items_seen(relative: bool) -> None:
    """Of 0.5 to 0.02 over 40 items, in passes of 10: after 20 of them it is at √(0.5 · 0.02)."""
    steps = {}
    fixed = {"damping": (0.5 * 0.02) ** 0.5, "relative_damping": relative}
    moving = {"damping": 0.5, "final_damping": 0.02, "damping_items": 40}
    for name, options in {"fixed": fixed, "moving": {**fixed, **moving}}.items():
        torch.manual_seed(0)
        layer = nn.Linear(3, 2).double()
        optimizer = KFAC(layer, lr=1.0, **PLAIN, **options)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        for number in range(2):
            optimizer.zero_grad()
            layer(torch.randn(10, 3).double()).square().mean().backward()
            if number == 1:
                optimizer.param_groups[0]["lr"] = 1.0
            steps[name] = moved_by(optimizer, [*layer.parameters()])
    for one, other in zip(steps["fixed"], steps["moving"], strict=True):
        torch.testing.assert_close(one, other, **TIGHT)


@pytest.mark.parametrize("form", ["factored_eigen", "factored_cholesky", "exact"])
@pytest.mark.parametrize("damping", [1e-1, 1e-3])
def test_of_one_sample_in_fp32_the_step_is_that_of_fp64(form: str, damping: float) -> None:
    """Factors of rank one: all but one of their eigenvalues are damping.

    What FP32 can hold is limited by the condition number, and by nothing else.
    """
    steps, conditions = [], []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        layer = nn.Linear(20, 10)
        x = torch.randn(1, 20)
        layer, x = layer.to(dtype), x.to(dtype)
        optimizer = KFAC(layer, lr=1.0, **PLAIN, form=form, damping=damping)
        cross_entropy(layer(x), torch.tensor([3])).backward()
        steps.append(flat(moved_by(optimizer, [*layer.parameters()])).double())
        conditions.append(optimizer.layer_stats()["weight"]["condition_number"])
    torch.testing.assert_close(conditions[0].double(), conditions[1], rtol=1e-3, atol=0)
    limit = 4 * torch.finfo(torch.float32).eps * conditions[1]
    assert 0 < (steps[0] - steps[1]).norm() <= limit * steps[1].norm()


@pytest.mark.parametrize("form", ["factored_eigen", "factored_cholesky", "exact"])
@pytest.mark.parametrize("relative", [False, True])
def test_without_any_samples_a_layer_is_not_preconditioned(form: str, relative: bool) -> None:
    """A gradient from elsewhere, of a layer that no pass has seen."""
    layer = nn.Linear(3, 2).double()
    options = {**PLAIN, "form": form, "relative_damping": relative}
    optimizer = KFAC(layer, lr=1.0, **options)
    grads = [torch.randn_like(param) for param in layer.parameters()]
    for param, grad in zip(layer.parameters(), grads, strict=True):
        param.grad = grad
    with pytest.warns(UserWarning, match="seen no pass through 'weight'"):
        steps = moved_by(optimizer, [*layer.parameters()])
    torch.testing.assert_close(steps, grads)


def test_a_layer_in_two_places_of_the_network_sums_over_both() -> None:
    torch.manual_seed(0)
    layer = only_layer(nn.Linear(3, 3).double())
    twice = nn.Sequential(layer.module, nn.Tanh(), layer.module)
    optimizer = KFAC(twice, lr=0.0, **PLAIN)
    x = torch.randn(5, 3).double()
    first = layer.module(x).detach()
    output = twice(x)
    output.square().sum(dim=1).mean().backward()
    optimizer.step()
    ones = torch.ones(5, 1).double()
    rows = torch.cat([torch.cat([x, ones], 1), torch.cat([first.tanh(), ones], 1)])
    last = 2 * output.detach()
    before = (last @ layer.weight.detach()) * (1 - first.tanh() ** 2)
    factor_in, factor_out = averages(layer, optimizer.state[layer.weight])
    torch.testing.assert_close(factor_in[0], rows.T @ rows / 10, **TIGHT)
    torch.testing.assert_close(factor_out[0], (last.T @ last + before.T @ before) / 5, **TIGHT)


def test_conv1d_of_transformers_is_stepped_as_the_linear_layer_of_its_transposed_weight() -> None:
    from transformers.pytorch_utils import Conv1D

    found = []
    for transposed in (True, False):
        torch.manual_seed(0)
        weight, x = torch.randn(3, 4).double(), torch.randn(8, 5, 3).double()
        layer: Any = (Conv1D(4, 3) if transposed else nn.Linear(3, 4)).double()
        with torch.no_grad():
            layer.weight.copy_(weight if transposed else weight.T)
            layer.bias.fill_(0.1)
        optimizer = KFAC(layer, lr=0.1)
        torch.tanh(layer(x)).square().mean().backward()
        optimizer.step()
        assert [*optimizer.layer_stats()] == ["weight"]
        moved = layer.weight.detach()
        found.append([moved if transposed else moved.T, layer.bias.detach()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **TIGHT)
