"""Adam's arithmetic: running averages, bias correction and direction.

Once on a tensor, with step counts that the host knows, and once on lists of chunks, with step
counts on the device.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from largebatch.optim.math.tensors import Tensors, root, write


def corrected(average: Tensor, beta: float, age: float) -> Tensor:
    """Return average / (1 - βᵗ), a running average without the bias of its start at 0."""
    return average.div(1 - beta**age)


def adam_direction(
    mean: Tensor, squares: Tensor, eps: float, root: Callable[[Tensor], Tensor] = Tensor.sqrt
) -> Tensor:
    """Return m̂ / (√v̂ + ε).

    Args:
        mean, squares: m̂ and v̂, bias-corrected.
        root: the square root; it may bound v̂ from below.
    """
    return mean.div(root(squares) + eps)


def average(averages: Tensors, values: Tensors, beta: float, skip: Tensor | None) -> None:
    """average ← β · average + (1 - β) · value, in place; untouched where `skip`."""
    if skip is None:
        torch._foreach_lerp_(averages, values, 1 - beta)
    else:
        write(averages, torch._foreach_lerp(averages, values, 1 - beta), skip)


def chunk_directions(
    exp_avg: Tensors, exp_avg_sq: Tensors, ages: tuple[Tensors, Tensors], options: Mapping[str, Any]
) -> Tensors:
    """m̂ / (√v̂ + ε), or m̂ / √(v̂ + ε), a new tensor for each chunk.

    Args:
        ages: t, from 1, of each chunk's m, and of its v.
    """
    corrections = [
        bias_correction(torch.stack([*age]).to(exp_avg[0].dtype), beta).unbind()
        for age, beta in zip(ages, options["betas"], strict=True)
    ]
    direction = torch._foreach_div(exp_avg, corrections[0])
    denominator = torch._foreach_div(exp_avg_sq, corrections[1])
    if options["eps_inside_sqrt"]:
        torch._foreach_add_(denominator, options["eps"])
        torch._foreach_sqrt_(denominator)
    else:
        torch._foreach_sqrt_(denominator)
        torch._foreach_add_(denominator, options["eps"])
    torch._foreach_div_(direction, denominator)
    return direction


def bias_correction(step: Tensor, beta: float) -> Tensor:
    """1 - βᵗ as -expm1(t·log β): the plain difference loses half of FP32's digits for β near 1."""
    log_beta = math.log(beta) if beta > 0 else -math.inf
    return -torch.expm1(step * log_beta)


def lr_correction(age1: Tensor, age2: Tensor, betas: tuple[float, float]) -> Tensor:
    """√(1 - β₂ᵗ) / (1 - β₁ᵗ): both bias corrections, moved from the moments to the step."""
    return root(bias_correction(age2, betas[1])) / bias_correction(age1, betas[0])
