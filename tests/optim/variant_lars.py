"""Every LARS variant in float64 NumPy, written as variant_lamb.py is: each repeats the others.

They share torch's SGD, in front of which some of the sources put their local rate.
"""

from collections.abc import Sequence

import numpy as np
from variant_layers import Array, Layer, Steps, Trajectory, norm


def torch_sgd(
    weight: Array,
    buffer: Array | None,
    grad: Array,
    lr: float,
    momentum: float,
    nesterov: bool,
) -> tuple[Array, Array]:
    """torch's SGD without decay or dampening: the new weight and the new buffer."""
    buffer = grad if buffer is None else momentum * buffer + grad
    return weight - lr * (grad + momentum * buffer if nesterov else buffer), buffer


def lars_paper(
    layers: Sequence[Layer],
    steps: Steps,
    *,
    momentum: float,
    trust_coefficient: float,
    eps: float = 1e-8,
    nesterov: bool = False,
) -> Trajectory:
    """The local rate of You et al. 2017 (1708.03888, eq. 6) in front of torch's SGD, as in timm."""
    w = [layer.weight for layer in layers]
    buffers: list[Array | None] = [None] * len(w)
    for lr, grads in steps:
        for i, g in enumerate(grads):
            beta = layers[i].weight_decay
            local_lr = 1.0
            if norm(w[i]) > 0 and norm(g) > 0 and layers[i].adapt:
                local_lr = trust_coefficient * norm(w[i]) / (norm(g) + beta * norm(w[i]) + eps)
            scaled = local_lr * (g + beta * w[i])
            w[i], buffers[i] = torch_sgd(w[i], buffers[i], scaled, lr, momentum, nesterov)
        yield list(w)


def lars_larc(
    layers: Sequence[Layer],
    steps: Steps,
    *,
    momentum: float,
    trust_coefficient: float,
    eps: float = 1e-8,
    nesterov: bool = False,
) -> Trajectory:
    """apex's LARC(clip=True) around torch's SGD: it absorbs the decay, and rewrites the gradient.

    A layer whose weight or gradient is all zeros keeps its gradient, and no decay reaches it. One
    with `adapt=False` is one that LARC never saw: SGD with SGD's own decay.
    """
    p = [layer.weight for layer in layers]
    buffers: list[Array | None] = [None] * len(p)
    for lr, grads in steps:
        for i, raw in enumerate(grads):
            grad, weight_decay = raw, layers[i].weight_decay
            param_norm, grad_norm = norm(p[i]), norm(raw)
            if not layers[i].adapt:
                grad = grad + weight_decay * p[i]
            elif param_norm != 0 and grad_norm != 0:
                adaptive_lr = param_norm / (grad_norm + param_norm * weight_decay + eps)
                adaptive_lr = min(trust_coefficient * adaptive_lr / lr, 1.0)
                grad = (grad + weight_decay * p[i]) * adaptive_lr
            p[i], buffers[i] = torch_sgd(p[i], buffers[i], grad, lr, momentum, nesterov)
        yield list(p)


def lars_joint(
    layers: Sequence[Layer], steps: Steps, *, momentum: float, trust_coefficient: float
) -> Trajectory:
    """The LARS of MoCo v3 and MAE: one norm of the gradient with its decay, nothing added to it."""
    p = [layer.weight for layer in layers]
    mu = [np.zeros_like(p_i) for p_i in p]
    for lr, grads in steps:
        for i, grad in enumerate(grads):
            dp = grad + layers[i].weight_decay * p[i]
            if layers[i].adapt:
                param_norm, update_norm = norm(p[i]), norm(dp)
                q = trust_coefficient * param_norm / update_norm if update_norm > 0 else 1.0
                dp = dp * (q if param_norm > 0 else 1.0)
            mu[i] = mu[i] * momentum + dp
            p[i] = p[i] - lr * mu[i]
        yield list(p)


def lars_optax(
    layers: Sequence[Layer],
    steps: Steps,
    *,
    momentum: float,
    trust_coefficient: float,
    nesterov: bool = False,
) -> Trajectory:
    """optax.lars: decay, trust ratio, learning rate and momentum as a chain, in that order."""
    params = [layer.weight for layer in layers]
    trace = [np.zeros_like(param) for param in params]
    for learning_rate, grads in steps:
        for i, layer in enumerate(layers):
            updates = grads[i] + layer.weight_decay * params[i]
            if layer.adapt and norm(params[i]) != 0 and norm(updates) != 0:
                updates = updates * (trust_coefficient * norm(params[i]) / norm(updates))
            updates = -learning_rate * updates
            trace[i] = updates + momentum * trace[i]
            params[i] = params[i] + (updates + momentum * trace[i] if nesterov else trace[i])
        yield list(params)


def lars_lr_inside(
    layers: Sequence[Layer], steps: Steps, *, momentum: float, trust_coefficient: float
) -> Trajectory:
    """You et al. 2017, Algorithm 1 to the letter; local rate 1 where it would be 0 or undefined."""
    w = [layer.weight for layer in layers]
    v = [np.zeros_like(w_i) for w_i in w]
    for gamma, grads in steps:
        for i, g in enumerate(grads):
            beta = layers[i].weight_decay
            local_lr = 1.0
            if w[i].any() and g.any() and layers[i].adapt:
                local_lr = trust_coefficient * norm(w[i]) / (norm(g) + beta * norm(w[i]))
            v[i] = momentum * v[i] + gamma * local_lr * (g + beta * w[i])
            w[i] = w[i] - v[i]
        yield list(w)
