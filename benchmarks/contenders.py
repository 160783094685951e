"""The optimizers that are timed: torch's, ours, and those of other libraries where installed.

Each other library's runs with weight decay, and with a clip by the global norm where it offers one.
Learning rates are small, so that weights stay about where they are over the steps of a benchmark.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from largebatch.common.text import missing
from largebatch.optim import LAMB, LARS

# FP32 values a parameter that no step can avoid to move: weight, gradient and state are read once,
# weight and state written once.
ADAM_WORDS: Final = 7  # two moments
MOMENTUM_WORDS: Final = 5  # one buffer

REFERENCE: Final = "torch AdamW fused"

DECAYING_LAMB: Final = {"lr": 1e-5, "weight_decay": 0.01}
CLIPPED_LAMB: Final = {**DECAYING_LAMB, "max_grad_norm": 1.0}
DECAYING_LARS: Final = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}


@dataclass(frozen=True)
class Contender:
    """One row of the table."""

    name: str
    words: int
    make: Callable[[list[Parameter]], Optimizer]


def contenders() -> tuple[list[Contender], list[str]]:
    """The rows of the table, the reference first, and a sentence for each peer left out."""
    rows = [
        row(REFERENCE, ADAM_WORDS, torch.optim.AdamW, lr=1e-5, fused=True),
        row("torch SGD fused", MOMENTUM_WORDS, torch.optim.SGD, lr=1e-5, momentum=0.9, fused=True),
        row("LAMB", ADAM_WORDS, LAMB, lr=1e-5, weight_decay=0.0),
        row("LAMB decay", ADAM_WORDS, LAMB, **DECAYING_LAMB),
        row("LAMB decay+clip", ADAM_WORDS, LAMB, **CLIPPED_LAMB),
        row("LARS", MOMENTUM_WORDS, LARS, lr=1e-3),
        row("LARS decay", MOMENTUM_WORDS, LARS, **DECAYING_LARS),
        row("LARS decay+clip", MOMENTUM_WORDS, LARS, **DECAYING_LARS, max_grad_norm=1.0),
    ]
    left_out = []
    for name, words, (module, attribute), options in PEERS:
        try:
            rows.append(row(name, words, getattr(import_module(module), attribute), **options))
        except ModuleNotFoundError as error:
            package = missing(error)
            left_out.append(
                f"{name}: left out, as {package} is not installed: pip install {package}"
            )
        except Exception as error:  # a foreign library may fail to load in ways of its own
            left_out.append(f"{name}: left out, {type(error).__name__}: {error}")
    return rows, left_out


def row(name: str, words: int, optimizer: Callable[..., Optimizer], **options: Any) -> Contender:
    return Contender(name, words, lambda params: optimizer(params, **options))


PEERS: Final[tuple[tuple[str, int, tuple[str, str], dict[str, Any]], ...]] = (
    (
        "timm Lamb decay+clip", ADAM_WORDS, ("timm.optim", "Lamb"),
        {**CLIPPED_LAMB, "always_adapt": True},
    ),
    (
        "pytorch_optimizer Lamb decay+clip", ADAM_WORDS, ("pytorch_optimizer", "Lamb"),
        {**CLIPPED_LAMB, "pre_norm": True},
    ),
    ("torch_optimizer Lamb decay", ADAM_WORDS, ("torch_optimizer", "Lamb"), DECAYING_LAMB),
    (
        "timm Lars decay", MOMENTUM_WORDS, ("timm.optim", "Lars"),
        {**DECAYING_LARS, "always_adapt": True},
    ),
    (
        "pytorch_optimizer LARS decay", MOMENTUM_WORDS, ("pytorch_optimizer", "LARS"),
        DECAYING_LARS,
    ),
)  # fmt: skip
