"""Grafting: Shampoo gives a step its direction, a first-order method its length.

Agarwal et al. 2020, "Disentangling Adaptive Gradient Methods from Learning Rates",
https://arxiv.org/abs/2002.11803: the step is (‖u‖ / ‖d‖) d, with d the preconditioned gradient and
u the step of the grafted method, over the whole layer. All of them start from the same running
average m of the gradient g, bias-corrected, as d does. At step t:

    sgd       u = m
    adagrad   u = m / (√Σ g² + ε)
    rmsprop   u = m / (√v + ε),    v ← β₂ v + (1 - β₂) g²
    adam      u = m / (√v̂ + ε),    v̂ = v / (1 - β₂ᵗ)
"""

from torch import Tensor

from largebatch.optim.math.adam import adam_direction, corrected

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
    """The grafted method's own step u.

    Args:
        mean: m, bias-corrected.
        step: t, from 1; where β₂ has changed, as many steps as the new one would have needed.
    """
    if squares is None:
        return mean
    if grafting == "adam":
        squares = corrected(squares, beta2, step)
    return adam_direction(mean, squares, eps)
