"""The papers' updates in float64 NumPy: one layer, a list of gradients, a learning rate for each.

Written from the papers, not from the code under test. Each returns the layer's weights after the
last step. `adapt=False` leaves the trust ratio out.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def lamb(
    w: Array,
    grads: Sequence[Array],
    lrs: Sequence[float],
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    adapt: bool = True,
) -> Array:
    """You et al. 2020 (1904.00962v5), Algorithm 2, with phi the identity."""
    beta1, beta2 = betas
    m = np.zeros_like(w)
    v = np.zeros_like(w)
    for t, (g, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat = m / (1 - beta1**t)
        v_hat = v / (1 - beta2**t)
        r = m_hat / (np.sqrt(v_hat) + eps)
        update = r + weight_decay * w
        norm_w, norm_update = np.sqrt(np.sum(w**2)), np.sqrt(np.sum(update**2))
        scale = norm_w / norm_update if adapt and norm_w > 0 and norm_update > 0 else 1.0
        w = w - lr * scale * update
    return w


def lars(
    w: Array,
    grads: Sequence[Array],
    lrs: Sequence[float],
    *,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
    eps: float,
    nesterov: bool = False,
    adapt: bool = True,
) -> Array:
    """You et al. 2017 (1708.03888), Algorithm 1, but with the learning rate outside the buffer."""
    buffer = np.zeros_like(w)
    for g, lr in zip(grads, lrs, strict=True):
        norm_w, norm_g = np.sqrt(np.sum(w**2)), np.sqrt(np.sum(g**2))
        local_lr = 1.0
        if adapt and norm_w > 0 and norm_g > 0:
            local_lr = trust_coefficient * norm_w / (norm_g + weight_decay * norm_w + eps)
        scaled = local_lr * (g + weight_decay * w)
        buffer = momentum * buffer + scaled
        w = w - lr * (scaled + momentum * buffer if nesterov else buffer)
    return w


def lars_to_the_letter(
    w: Array,
    grads: Sequence[Array],
    lrs: Sequence[float],
    *,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
) -> Array:
    """Algorithm 1 as printed: the learning rate inside the momentum, no eps."""
    v = np.zeros_like(w)
    for g, lr in zip(grads, lrs, strict=True):
        norm_w, norm_g = np.linalg.norm(w.ravel()), np.linalg.norm(g.ravel())
        local_lr = trust_coefficient * norm_w / (norm_g + weight_decay * norm_w)
        v = momentum * v + lr * local_lr * (g + weight_decay * w)
        w = w - v
    return w


def adamw(
    w: Array,
    grads: Sequence[Array],
    lrs: Sequence[float],
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> Array:
    """Loshchilov and Hutter 2019, Algorithm 2: what LAMB is without its trust ratio."""
    return lamb(w, grads, lrs, betas=betas, eps=eps, weight_decay=weight_decay, adapt=False)


def sgd(
    w: Array,
    grads: Sequence[Array],
    lrs: Sequence[float],
    *,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> Array:
    """torch's SGD: what LARS is without its trust ratio."""
    return lars(
        w,
        grads,
        lrs,
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=nesterov,
        trust_coefficient=1.0,
        eps=0.0,
        adapt=False,
    )
