"""Engines that are not as `bind` knows them: real ones, changed before they are bound."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from zero_training import Cell


@dataclass(frozen=True)
class Refusal:
    """An engine that `bind`, or the first step after it, is to refuse."""

    name: str
    cell: Cell
    change: Callable[[Any], None]
    """Made to the engine."""
    says: str
    """A regular expression that the refusal matches, on both ranks."""
    bound: bool = True
    """False: nobody calls `bind`, and steps are refused."""

    def __str__(self) -> str:
        return self.name


# On rank 1 alone: rank 0 sees nothing wrong, and must refuse all the same.


def leave_the_buffer(engine: Any) -> None:
    if dist.get_rank() == 1:
        weight = engine.module.head.weight
        weight.data = weight.data.clone()


def shift_a_slice(engine: Any) -> None:
    if dist.get_rank() == 1:
        position_of(engine, engine.module.fused.weight)[1] -= 1


def shorten_a_slice(engine: Any) -> None:
    if dist.get_rank() == 1:
        weight = engine.module.fused.weight
        weight.ds_tensor.ds_numel -= 1
        position_of(engine, weight)[2] -= 1


def position_of(engine: Any, param: torch.Tensor) -> list[int]:
    """Sub-group, place in its flat tensor, length."""
    zero = engine.optimizer
    position: list[int] = zero.grad_position[zero.get_param_id(param)]
    return position


def lose_the_positions(engine: Any) -> None:
    if dist.get_rank() == 1:
        del engine.optimizer.grad_position


# On both ranks.


def shorten_the_buffer(engine: Any) -> None:
    buffers = engine.optimizer.bit16_groups_flat
    buffers[0] = buffers[0][:-2]


def rename(engine: Any) -> None:
    zero = engine.optimizer
    zero.__class__ = type("UnheardOfOptimizer", (type(zero),), {})


def give_mpu(engine: Any) -> None:
    engine.mpu = object()


def split_columns(engine: Any) -> None:
    engine.basic_optimizer.param_groups[0] |= {"norm_groups": (2, 4), "norm_dim": 1}


def nothing(engine: Any) -> None:
    pass


NO_NORM = Cell(1, "fp32", "LAMB clip", {"compute_grad_norm": False})

FLAT = "RuntimeError: LA.* flat tensor of .* call largebatch.optim.zero.bind"

REFUSALS = [
    Refusal("memory", Cell(2, "fp32", "LAMB"), leave_the_buffer, "no view of .* on rank 1"),
    Refusal(
        "overlap", Cell(3, "fp32", "LAMB"), shift_a_slice, "fused.weight overlapping .* rank 1"
    ),
    Refusal("gap", Cell(3, "fp32", "LAMB"), shorten_a_slice, "fused.weight of 378 elements in .*"),
    Refusal("attribute", Cell(3, "bf16", "LAMB"), lose_the_positions, "grad_position.* on rank 1"),
    Refusal("size", Cell(1, "bf16", "LAMB"), shorten_the_buffer, "2 partitions of 264 for 526 ele"),
    Refusal("class", Cell(1, "fp32", "LAMB"), rename, "wrapped in UnheardOfOptimizer"),
    Refusal("parallelism", Cell(0, "fp32", "LAMB"), give_mpu, r"model parallelism \(mpu\)"),
    Refusal("columns", Cell(2, "fp32", "LAMB"), split_columns, "norm_dim must be 0 in ZeRO, got 1"),
    Refusal("stranger", Cell(2, "fp32", "AdamW"), nothing, "bind needs LARS or LAMB .* got AdamW"),
    Refusal("norm", NO_NORM, nothing, "set zero_optimization.compute_grad_norm to true"),
    *(
        Refusal(f"unbound {stage} {dtype} {row}", Cell(stage, dtype, row), nothing, FLAT, False)
        for stage in (1, 2, 3)
        for dtype, row in (("fp32", "LAMB"), ("bf16", "LARS"))
    ),
    Refusal(
        "unbound redundancy",
        Cell(None, "fp32", "LAMB clip"),
        nothing,
        "max_grad_norm=0.1 .* call largebatch.optim.zero.bind",
        False,
    ),
]
