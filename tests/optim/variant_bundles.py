"""What each variant stands for, stated a second time, and the values that its keywords take."""

import math
from typing import Any

import pytest
import torch

from largebatch.optim import LAMB, LARS

INF = math.inf


LAMB_BUNDLES: dict[str, dict[str, Any]] = {
    "paper": {
        "bias_correction": "moments",
        "eps_inside_sqrt": False,
        "decay": "update",
        "weight_norm_bounds": (0.0, INF),
        "trust_bounds": (0.0, INF),
        "max_grad_norm": INF,
        "adapt_undecayed": "always",
        "zero_norm": "one",
    }
}
LAMB_BUNDLES |= {
    "nvlamb": {**LAMB_BUNDLES["paper"], "max_grad_norm": 1.0},
    "apex": {**LAMB_BUNDLES["paper"], "max_grad_norm": 1.0, "adapt_undecayed": "never"},
    "timm": {**LAMB_BUNDLES["paper"], "max_grad_norm": 1.0, "adapt_undecayed": "never"},
    "lambc": {**LAMB_BUNDLES["paper"], "trust_bounds": (0.0, 1.0)},
    "deepspeed": {**LAMB_BUNDLES["paper"], "bias_correction": "lr", "trust_bounds": (0.01, 10.0)},
    "tfa": {**LAMB_BUNDLES["paper"], "adapt_undecayed": "unless_excluded"},
}
LARS_BUNDLES: dict[str, dict[str, Any]] = {
    "paper": {
        "eps": 1e-8,
        "denominator": "sum",
        "lr_in_buffer": False,
        "clip_to_lr": False,
        "adapt_undecayed": "always",
        "zero_norm": "one",
        "max_grad_norm": INF,
    }
}
LARS_BUNDLES |= {
    "larc": {**LARS_BUNDLES["paper"], "clip_to_lr": True, "zero_norm": "no_decay"},
    "joint": {**LARS_BUNDLES["paper"], "denominator": "joint", "eps": 0.0},
    "lr_inside": {**LARS_BUNDLES["paper"], "lr_in_buffer": True, "eps": 0.0},
}
LAMB_VALUES: dict[str, tuple[Any, ...]] = {
    "bias_correction": ("moments", "lr", "none"),
    "eps_inside_sqrt": (False, True),
    "decay": ("update", "gradient", "decoupled"),
    "weight_norm_bounds": ((0, INF), (0.5, 2.0)),
    "trust_bounds": ((0, INF), (0, 1), (0.01, 10), (0.25, INF)),
    "max_grad_norm": (INF, 1.0, 0.1),
    "adapt_undecayed": ("always", "never", "unless_excluded"),
    "zero_norm": ("one", "phi"),
}
LARS_VALUES: dict[str, tuple[Any, ...]] = {
    "eps": (0.0, 1e-8, 0.1),
    "denominator": ("sum", "joint"),
    "lr_in_buffer": (False, True),
    "clip_to_lr": (False, True),
    "adapt_undecayed": ("always", "never", "unless_excluded"),
    "zero_norm": ("one", "no_decay"),
    "max_grad_norm": (INF, 1.0, 0.1),
}
BUNDLES: dict[type[torch.optim.Optimizer], dict[str, dict[str, Any]]] = {
    LAMB: LAMB_BUNDLES,
    LARS: LARS_BUNDLES,
}
VALUES = {LAMB: LAMB_VALUES, LARS: LARS_VALUES}
VARIANTS = [(kind, variant) for kind, bundles in BUNDLES.items() for variant in bundles]

each_variant = pytest.mark.parametrize(
    ("kind", "variant"), VARIANTS, ids=[f"{kind.__name__}-{name}" for kind, name in VARIANTS]
)
