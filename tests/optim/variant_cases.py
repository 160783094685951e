"""The cases: one of our optimizers with its options, and the oracle of its source."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import variant_lamb as lamb
import variant_lars as lars
from torch.nn import Parameter
from variant_layers import Layer, Oracle, Steps, norm
from variant_scenario import make_groups

from largebatch.optim import LAMB, LARS

DECAY = 0.1


def clipped(steps: Steps, max_grad_norm: float) -> Steps:
    """The same steps with gradients clipped beforehand, for sources that do not clip."""
    for lr, grads in steps:
        size = norm(np.array([norm(grad) for grad in grads]))
        yield lr, [grad / max(1.0, size / max_grad_norm) for grad in grads]


def excluded(layers: Sequence[Layer]) -> list[int]:
    return [number for number, layer in enumerate(layers) if layer.weight_decay == 0]


def adapted_where_decayed(layers: Sequence[Layer]) -> list[Layer]:
    return [
        Layer(layer.weight, layer.weight_decay, layer.adapt and layer.weight_decay != 0)
        for layer in layers
    ]


@dataclass(frozen=True)
class Case:
    """One of our optimizers with its options, and the oracle that it must agree with."""

    name: str
    kind: type[torch.optim.Optimizer]
    oracle: Oracle
    options: dict[str, Any] = field(default_factory=dict)
    weight_decay: float = DECAY
    """Of the groups that decay, and the optimizer's default."""

    @property
    def shared(self) -> dict[str, Any]:
        """What both are given."""
        if self.kind is LAMB:
            return {"betas": (0.9, 0.99), "eps": 1e-4}
        return {"momentum": 0.9, "trust_coefficient": 0.02}

    @property
    def lr(self) -> float:
        return 0.02 if self.kind is LAMB else 0.5


def lamb_case(name: str, oracle: Oracle, weight_decay: float = DECAY, **options: Any) -> Case:
    return Case(name, LAMB, oracle, {"variant": name.split("+")[0], **options}, weight_decay)


def lars_case(name: str, oracle: Oracle, **options: Any) -> Case:
    return Case(name, LARS, oracle, {"variant": name.split("+")[0], **options})


CASES = (
    lamb_case("paper", lamb.lamb_paper),
    lamb_case("paper+phi", partial(lamb.lamb_paper, phi=(0.5, 2.0)), weight_norm_bounds=(0.5, 2.0)),
    lamb_case("paper+v3", lamb.lamb_v3, bias_correction="none", weight_norm_bounds=(0.0, 10.0)),
    lamb_case("paper+decoupled", lamb.lamb_decoupled, decay="decoupled"),
    lamb_case("nvlamb", lamb.lamb_nvlamb),
    lamb_case("nvlamb+tight", partial(lamb.lamb_nvlamb, max_grad_norm=0.1), max_grad_norm=0.1),
    lamb_case("apex", lamb.lamb_apex),
    lamb_case("apex+l2", partial(lamb.lamb_apex, adam_w_mode=False), decay="gradient"),
    lamb_case(
        "apex+use_nvlamb", partial(lamb.lamb_apex, use_nvlamb=True), adapt_undecayed="always"
    ),
    lamb_case("timm", lamb.lamb_timm),
    lamb_case("timm+trust_clip", partial(lamb.lamb_timm, trust_clip=True), trust_bounds=(0.0, 1.0)),
    lamb_case("lambc", lamb.lamb_lambc),
    lamb_case("lambc+mu", partial(lamb.lamb_lambc, mu=(0.1, 2.0)), trust_bounds=(0.1, 2.0)),
    lamb_case("deepspeed", lamb.lamb_deepspeed),
    lamb_case(
        "deepspeed+eps_inside_sqrt",
        partial(lamb.lamb_deepspeed, eps_inside_sqrt=True),
        eps_inside_sqrt=True,
    ),
    lamb_case(
        "deepspeed+coeffs",
        partial(lamb.lamb_deepspeed, min_coeff=0.1, max_coeff=1.0),
        trust_bounds=(0.1, 1.0),
    ),
    lamb_case(
        "tfa",
        lambda layers, steps, **kwargs: lamb.lamb_tfa(
            layers,
            steps,
            weight_decay_rate=DECAY,
            exclude_from_weight_decay=excluded(layers),
            **kwargs,
        ),
    ),
    lamb_case("tfa+no_decay", partial(lamb.lamb_tfa, weight_decay_rate=0.0), weight_decay=0.0),
    lars_case("paper", lars.lars_paper),
    lars_case("paper+nesterov", partial(lars.lars_paper, nesterov=True), nesterov=True),
    lars_case(
        "paper+never",
        lambda layers, steps, **kwargs: lars.lars_paper(
            adapted_where_decayed(layers), steps, **kwargs
        ),
        adapt_undecayed="never",
    ),
    lars_case("larc", lars.lars_larc),
    lars_case(
        "larc+nesterov+clip",
        lambda layers, steps, **kwargs: lars.lars_larc(
            layers, clipped(steps, 0.5), nesterov=True, **kwargs
        ),
        nesterov=True,
        max_grad_norm=0.5,
    ),
    lars_case("joint", lars.lars_joint),
    lars_case(
        "joint+optax", partial(lars.lars_optax, nesterov=True), lr_in_buffer=True, nesterov=True
    ),
    lars_case("lr_inside", lars.lars_lr_inside),
    lars_case(
        "lr_inside+clip",
        lambda layers, steps, **kwargs: lars.lars_lr_inside(layers, clipped(steps, 1.0), **kwargs),
        max_grad_norm=1.0,
    ),
)
each_case = pytest.mark.parametrize(
    "case", CASES, ids=[f"{case.kind.__name__}-{case.name}" for case in CASES]
)


def make(case: Case, params: Sequence[Parameter]) -> Any:
    groups = make_groups(params, case.weight_decay)
    options = {**case.shared, **case.options}
    return case.kind(groups, lr=case.lr, weight_decay=case.weight_decay, **options)


def named_case(kind: type[torch.optim.Optimizer], name: str) -> Case:
    return next(case for case in CASES if (case.kind, case.name) == (kind, name))
