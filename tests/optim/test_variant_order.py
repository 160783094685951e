"""The order of composition: clip, decay in gradient, moments, u, φ, bounds, zero rule, adapt."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from optimizer_rows import take_steps
from torch.nn import Parameter
from variant_bundles import BUNDLES, INF

from largebatch.optim import LAMB, LARS

W, G = (3.0, 4.0), (6.0, -8.0)  # norms 5 and 10
U = (1.0, -1.0)  # Adam's first direction for G without eps


def one_step(
    kind: type[torch.optim.Optimizer],
    weight: Sequence[float] = W,
    grad: Sequence[float] = G,
    *,
    group: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[float, list[float]]:
    """The trust ratio of the first step of one layer, and how far it moved in units of lr."""
    lr = options.setdefault("lr", 0.5)
    defaults = {"weight_decay": 0.0, "eps": 1e-300}  # next to nothing, and yet 0/ε is 0
    if kind is LARS:
        defaults |= {"trust_coefficient": 1.0, "momentum": 0.0}
    param = Parameter(torch.tensor(weight, dtype=torch.float64))
    optimizer: Any = kind([{"params": [param], **(group or {})}], **{**defaults, **options})
    take_steps(optimizer, [param], [[torch.tensor(grad, dtype=torch.float64)]])
    (stats,) = optimizer.layer_stats().values()
    moved = (torch.tensor(weight, dtype=torch.float64) - param.detach()) / lr
    return float(stats["trust_ratio"]), moved.tolist()


def approx(*values: float) -> Any:
    return pytest.approx(list(values), rel=1e-12, abs=1e-15)


def test_the_clip_comes_before_the_moments() -> None:
    # With eps 1, the direction depends on the gradient's size; afterwards a clip would scale it.
    _, moved = one_step(LAMB, eps=1.0, max_grad_norm=1.0, group={"adapt": False})
    assert moved == approx(0.6 / 1.6, -0.8 / 1.8)


def test_the_clip_comes_before_a_decay_in_the_gradient() -> None:
    options = {"weight_decay": 1.0, "decay": "gradient", "max_grad_norm": 1.0, "eps": 1.0}
    _, moved = one_step(LAMB, group={"adapt": False}, **options)
    assert moved == approx(3.6 / 4.6, 3.2 / 4.2)  # (0.6 + 3) and (-0.8 + 4), not clipped again


def test_the_clip_sees_all_groups() -> None:
    params = [Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2)]
    groups = [{"params": [param], "adapt": False} for param in params]
    groups[1]["lr"] = 2.0
    optimizer = LAMB(groups, lr=1.0, eps=1.0, weight_decay=0.0, max_grad_norm=1.0)
    grads = [torch.tensor([value], dtype=torch.float64) for value in (3.0, 4.0)]
    take_steps(optimizer, params, [grads])
    assert [-param.item() for param in params] == approx(0.6 / 1.6, 2 * 0.8 / 1.8)


@pytest.mark.parametrize("kind", BUNDLES)
def test_groups_that_do_not_share_the_clip_are_refused(kind: type[torch.optim.Optimizer]) -> None:
    groups = [
        {"params": [Parameter(torch.ones(1))], "max_grad_norm": bound} for bound in (1.0, 2.0)
    ]
    with pytest.raises(ValueError, match=r"max_grad_norm.*1\.0.*2\.0"):
        kind(groups, lr=0.1)


def test_a_gradient_within_the_bound_is_not_scaled_up() -> None:
    assert one_step(LAMB, eps=1.0, max_grad_norm=10.0) == one_step(LAMB, eps=1.0)
    assert one_step(LARS, max_grad_norm=10.0) == one_step(LARS)


def test_gradients_are_unscaled_before_the_clip() -> None:
    param = Parameter(torch.tensor(W, dtype=torch.float64))
    optimizer: Any = LAMB([param], lr=1.0, eps=1.0, weight_decay=0.0, max_grad_norm=40.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    take_steps(optimizer, [param], [[1024 * torch.tensor(G, dtype=torch.float64)]])
    ratio, moved = one_step(LAMB, lr=1.0, eps=1.0)
    assert float(optimizer.layer_stats()[0]["trust_ratio"]) == pytest.approx(ratio, rel=1e-12)
    assert (torch.tensor(W, dtype=torch.float64) - param.detach()).tolist() == approx(*moved)


def test_the_decay_in_the_update_is_in_its_norm_and_the_decoupled_one_is_not() -> None:
    ratio, moved = one_step(LAMB, weight_decay=1.0)
    assert ratio == pytest.approx(5 / math.hypot(1 + 3, -1 + 4))
    assert moved == approx(ratio * 4, ratio * 3)
    ratio, moved = one_step(LAMB, weight_decay=1.0, decay="decoupled")
    assert ratio == pytest.approx(5 / math.sqrt(2))
    assert moved == approx(ratio * 1 + 3, -ratio * 1 + 4)  # the decay is not scaled by the ratio


def test_phi_comes_before_the_bounds() -> None:
    # 5/√2 = 3.5 would lie within the bounds; φ makes it 20/√2 = 14.1, and then they hold it.
    options = {"weight_norm_bounds": (20.0, INF), "trust_bounds": (0.0, 10.0)}
    assert one_step(LAMB, **options)[0] == 10.0
    options = {"weight_norm_bounds": (0.0, 1.0), "trust_bounds": (0.0, 10.0)}
    assert one_step(LAMB, **options)[0] == pytest.approx(1 / math.sqrt(2))


def test_the_bounds_come_before_the_learning_rates_bias_correction() -> None:
    # m and v raw: u is 0.1·g / √(0.001·g²) = ±√10 and ‖w‖/‖u‖ = 50/√20 = 11.2. With the
    # correction, √0.001 / 0.1 = 0.32, before the bounds, the ratio would be 3.5 and not be held.
    ratio, moved = one_step(LAMB, weight=(30.0, 40.0), variant="deepspeed")
    assert ratio == 10.0
    assert moved == approx(10.0, -10.0)  # 10 · √10 · √0.001 / 0.1


@pytest.mark.parametrize("bounds", [(0.0, 0.5), (2.0, 10.0)])
def test_the_zero_rule_comes_after_the_bounds(bounds: tuple[float, float]) -> None:
    assert one_step(LAMB, weight=(0.0, 0.0), trust_bounds=bounds) == (1.0, approx(*U))
    assert one_step(LAMB, grad=(0.0, 0.0), trust_bounds=bounds) == (1.0, approx(0.0, 0.0))


@pytest.mark.parametrize(
    ("zero_norm", "expected"), [("one", 1.0), ("phi", 2.0 / math.sqrt(2))], ids=["one", "phi"]
)
def test_the_zero_rule_asks_about_the_weights_or_about_phi(zero_norm: str, expected: float) -> None:
    bounded = {"weight_norm_bounds": (2.0, INF), "zero_norm": zero_norm}
    assert one_step(LAMB, weight=(0.0, 0.0), **bounded)[0] == pytest.approx(expected)
    assert one_step(LAMB, grad=(0.0, 0.0), **bounded)[0] == 1.0
    assert one_step(LAMB, weight=(0.0, 0.0), zero_norm=zero_norm)[0] == 1.0


def test_phi_of_a_zero_layer_is_held_by_the_bounds() -> None:
    options = {"weight_norm_bounds": (2.0, INF), "zero_norm": "phi", "trust_bounds": (0.0, 0.25)}
    assert one_step(LAMB, weight=(0.0, 0.0), **options)[0] == 0.25


@pytest.mark.parametrize("weight", [W, (0.0, 0.0)])
@pytest.mark.parametrize(
    "why_not",
    [
        {"group": {"adapt": False}},
        {"adapt_undecayed": "never"},
        {"adapt_undecayed": "unless_excluded", "weight_decay": 0.1, "group": {"weight_decay": 0.0}},
    ],
    ids=["adapt", "never", "excluded"],
)
def test_a_layer_that_does_not_adapt_has_ratio_one_whatever_the_bounds(
    weight: tuple[float, float], why_not: dict[str, Any]
) -> None:
    bounds = {"weight_norm_bounds": (20.0, INF), "trust_bounds": (2.0, 3.0), "zero_norm": "phi"}
    assert one_step(LAMB, weight=weight, **bounds, **why_not) == (1.0, approx(*U))


def test_a_decay_of_zero_for_all_excludes_no_layer() -> None:
    ratio, _ = one_step(LAMB, adapt_undecayed="unless_excluded")
    assert ratio == pytest.approx(5 / math.sqrt(2))
    assert one_step(LAMB, adapt_undecayed="never")[0] == 1.0


def test_lars_takes_its_norms_from_the_clipped_gradient() -> None:
    ratio, moved = one_step(LARS, max_grad_norm=1.0)
    assert ratio == pytest.approx(5.0)
    assert moved == approx(5 * 0.6, 5 * -0.8)


def test_larc_bounds_the_local_rate_by_the_learning_rate() -> None:
    ratio, _ = one_step(LARS, variant="larc", lr=2.0)  # 5/10 is less than 2
    assert ratio == pytest.approx(0.5 / 2.0)
    ratio, _ = one_step(LARS, variant="larc", lr=0.25)
    assert ratio == 1.0


def test_larcs_zero_rule_comes_after_its_bound_and_leaves_the_decay_out() -> None:
    # Before the bound, a ratio of 1 would become 1/2.
    decayed = {"weight_decay": 1.0, "lr": 2.0}
    assert one_step(LARS, weight=(0.0, 0.0), variant="larc", **decayed) == (1.0, approx(*G))
    _, moved = one_step(LARS, grad=(0.0, 0.0), variant="larc", **decayed)
    assert moved == [0.0, 0.0]
    assert one_step(LARS, grad=(0.0, 0.0), **decayed) == (1.0, approx(*W))


def test_larc_without_adaptation_is_sgd_with_sgds_decay() -> None:
    options = {"variant": "larc", "weight_decay": 1.0, "group": {"adapt": False}}
    assert one_step(LARS, **options) == (1.0, approx(6 + 3, -8 + 4))
    assert one_step(LARS, grad=(0.0, 0.0), **options) == (1.0, approx(*W))


def test_the_joint_denominator_is_zero_only_where_gradient_and_decay_cancel() -> None:
    ratio, moved = one_step(LARS, grad=(0.0, 0.0), variant="joint", weight_decay=0.5)
    assert ratio == pytest.approx(5 / 2.5)
    assert moved == approx(*W)
    cancelling = {"weight": (3.0, 4.0), "grad": (-3.0, -4.0), "weight_decay": 1.0}
    assert one_step(LARS, variant="joint", **cancelling) == (1.0, approx(0.0, 0.0))
