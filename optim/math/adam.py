"""Adam's arithmetic: running averages, bias correction and direction.

Once on a tensor, with step counts that the host knows, and once on lists of chunks, with step
counts on the device.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from largebatch.optim.math.tensors import Tensors, root


def corrected(average: Tensor, beta: float, age: float) -> Tensor:
    """Return average / (1 - βᵗ), a running average without the bias of its start at 0."""
    return average.div(1 - beta**age)


def adam_direction(
    mean: Tensor, squares: Tensor, eps: float, root: Callable[[Tensor], Tensor] = Tensor.sqrt
) -> Tensor:
    """Return m̂ / (√v̂ + ε) of bias-corrected moments; `root` may bound v̂ from below."""
    return mean.div(root(squares) + eps)


def chunk_directions(
    exp_avg: Tensors, exp_avg_sq: Tensors, ages: tuple[Tensors, Tensors], options: Mapping[str, Any]
) -> Tensors:
    """m̂ / (√v̂ + ε), or m̂ / √(v̂ + ε), a new tensor for each chunk; `ages` are t, from 1, of each
    chunk's m, and of its v.
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


GRAFTINGS = ("adam", "rmsprop", "adagrad", "sgd", "none")
WITH_SQUARES = ("adam", "rmsprop", "adagrad")


def next_squares(grafting: str, squares: Tensor, grad: Tensor, beta2: float) -> Tensor:
    """What the method remembers of squared gradients, advanced by one; a new tensor."""
    if grafting == "adagrad":
        return squares + grad * grad
    return squares.lerp(grad * grad, 1 - beta2)


def grafted_step(
    grafting: str, mean: Tensor, squares: Tensor | None, step: float, beta2: float, eps: float
) -> Tensor:
    """Grafting: Shampoo gives a step its direction, a first-order method its length.

    Agarwal et al. 2020, "Disentangling Adaptive Gradient Methods from Learning Rates",
    https://arxiv.org/abs/2002.11803: the step is (‖u‖ / ‖d‖) d, with d the preconditioned gradient
    and u, which this returns, the step of the grafted method, over the whole layer. All of them
    start from the same running average m (`mean`) of the gradient g, bias-corrected, as d does. At
    step t, from 1 (where β₂ has changed, as many steps as the new one would have needed):

        sgd       u = m
        adagrad   u = m / (√Σ g² + ε)
        rmsprop   u = m / (√v + ε),    v ← β₂ v + (1 - β₂) g²
        adam      u = m / (√v̂ + ε),    v̂ = v / (1 - β₂ᵗ)
    """
    if squares is None:
        return mean
    if grafting == "adam":
        squares = corrected(squares, beta2, step)
    return adam_direction(mean, squares, eps)
