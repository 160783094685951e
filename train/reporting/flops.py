"""The arithmetic that training on one sample takes: forward and backward, matrix products alone.

A utilisation can be compared only with one whose numerator is the same, so the formula's name
travels with the number:

- `palm`: per token 6P + 12·L·H·Q·T (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), for L
  blocks of H heads of width Q on sequences of T tokens. P is here the weights of matrix products:
  neither norms nor an input embedding that is a look-up. Attention is taken as if not causal, as
  there. Nothing that is computed again in the backward pass is counted.
- `megatron`, `megatron_recompute`: 72·l·s·h²·(1 + s/6h + V/12lh), or with every block's forward
  pass once more 96·l·s·h²·(1 + s/6h + V/16lh), per sequence (Narayanan et al. 2021,
  arXiv:2104.04473, equation 3). It takes a block to have 12h² weights, so for SwiGLU of another
  width than 8/3 h, or for shared keys and values, it is off; there to compare with what others have
  printed.
- `counted`: what torch counts in one forward and backward pass of the very loss, for any model.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from largebatch.conf.config import FORMULAS
from largebatch.train.models import Transformer
from largebatch.train.tasks import Batch, Task


@dataclass(frozen=True)
class Flops:
    """Arithmetic of one training sample.

    Attributes:
        recompute: it counts what is computed a second time, so a ratio to the peak is a utilisation
            of the hardware (HFU) and not of the model (MFU).
    """

    per_sample: float
    formula: str
    recompute: bool = False


def palm(model: Transformer, length: int) -> float:
    """Of one sequence of `length` tokens."""
    weights = sum(param.numel() for param in model.parameters() if param.ndim == 2)
    if not model.tie_embeddings:
        weights -= model.vocabulary * model.dim
    return length * (6.0 * weights + 12.0 * len(model.blocks) * model.dim * length)


def megatron(
    model: Transformer, length: int, factor: float = 72.0, of_vocabulary: float = 12.0
) -> float:
    """Of one sequence of `length` tokens."""
    depth, dim = len(model.blocks), model.dim
    terms = 1.0 + length / (6.0 * dim) + model.vocabulary / (of_vocabulary * depth * dim)
    return factor * depth * length * dim**2 * terms


megatron_recompute = partial(megatron, factor=96.0, of_vocabulary=16.0)
"""Each block's forward pass counted twice."""

CLOSED: Final[dict[str, Callable[[Transformer, int], float]]] = {
    "palm": palm,
    "megatron": megatron,
    "megatron_recompute": megatron_recompute,
}

_SAMPLES = 2
"""One alone could be a special case of a shape."""

_MOST_ON_CPU = 300_000_000
"""Parameters; a pass of a larger model would take minutes, and memory that a node's ranks share."""


def flops_of(
    make_model: Callable[[], nn.Module], task: Task, formula: str = "auto"
) -> Flops | None:
    """What one sample of `task` takes, found on a copy of the model without memory.

    Where the loss does not run on the meta device it is run on the CPU, with memory, once, unless
    the model is large. Where neither will do, "auto" is None, and a warning says why.

    Args:
        make_model: as the run makes it; its random numbers are given back.
        formula: one of `FORMULAS`; "auto": `palm` for our Transformer, `counted` for others.
    """
    if formula not in FORMULAS:
        raise ValueError(
            f"throughput.formula must be one of {', '.join(FORMULAS)}, got {formula!r}"
        )
    batch = task.train_batch(np.arange(_SAMPLES, dtype=np.int64) % task.num_train)
    reasons = []
    with torch.random.fork_rng(devices=[]):
        for name in ("meta", "cpu"):
            size = 0
            try:
                with torch.device(name):
                    model = make_model()
                size = sum(param.numel() for param in model.parameters())
                return _flops(model, task, tuple(tensor.to(name) for tensor in batch), formula)
            except RuntimeError as error:
                what = (str(error) or type(error).__name__).splitlines()[0]
                reasons.append(f"on the {name} device: {what}")
            if size > _MOST_ON_CPU:
                break
    reason = "; ".join(reasons)
    if formula != "auto":
        raise ValueError(
            f"throughput.formula={formula} needs a loss that runs without the accelerator ({reason}"
            "): leave it at null"
        )
    warnings.warn(f"the arithmetic of a sample is not counted ({reason})", stacklevel=2)
    return None


def _flops(model: nn.Module, task: Task, batch: Batch, formula: str) -> Flops:
    if isinstance(model, Transformer) and formula != "counted":
        name = "palm" if formula == "auto" else formula
        passes = _passes(model, task, batch)
        total = sum(sequences * CLOSED[name](model, length) for sequences, length in passes)
        return Flops(total / _SAMPLES, name, recompute=name.endswith("recompute"))
    if formula in CLOSED:
        raise ValueError(
            f"throughput.formula={formula} knows largebatch.train.models.Transformer alone, got a "
            f"{type(model).__name__}: use auto or counted"
        )
    # Torch counts no attention of the CPU's own; as matrix products it is always counted.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        torch.autograd.backward(task.loss(model, batch))
    return Flops(counter.get_total_flops() / _SAMPLES, "counted")


def _passes(model: Transformer, task: Task, batch: Batch) -> list[tuple[int, int]]:
    """(sequences, tokens of each) of every pass through the model that the loss makes."""
    seen: list[tuple[int, int]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        del module
        seen.append((inputs[0].shape[0], inputs[0].shape[1]))

    handle = model.register_forward_pre_hook(note)
    with torch.no_grad():
        task.loss(model, batch)
    handle.remove()
    return seen
