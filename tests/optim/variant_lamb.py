"""Every LAMB variant in float64 NumPy, each written the way its own source computes it.

That makes the functions repeat one another: the table of variants is held against them, so they
share nothing with it, and next to nothing among themselves.
"""

import math
from collections.abc import Collection, Sequence

import numpy as np
from variant_layers import Layer, Steps, Trajectory, norm


def lamb_paper(
    layers: Sequence[Layer],
    steps: Steps,
    *,
    betas: tuple[float, float],
    eps: float,
    phi: tuple[float, float] = (0.0, math.inf),
) -> Trajectory:
    """You et al. 2020, 1904.00962v5, Algorithm 2; φ holds ‖w‖ between two bounds."""
    beta1, beta2 = betas
    gamma_l, gamma_u = phi
    x = [layer.weight for layer in layers]
    m = [np.zeros_like(x_i) for x_i in x]
    v = [np.zeros_like(x_i) for x_i in x]
    for t, (eta, grads) in enumerate(steps, start=1):
        for i, g in enumerate(grads):
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g**2
            m_hat = m[i] / (1 - beta1**t)
            v_hat = v[i] / (1 - beta2**t)
            r = m_hat / (np.sqrt(v_hat) + eps)
            update = r + layers[i].weight_decay * x[i]
            ratio = 1.0
            if norm(x[i]) > 0 and norm(update) > 0 and layers[i].adapt:
                ratio = min(max(norm(x[i]), gamma_l), gamma_u) / norm(update)
            x[i] = x[i] - eta * ratio * update
        yield list(x)


def lamb_v3(
    layers: Sequence[Layer], steps: Steps, *, betas: tuple[float, float], eps: float
) -> Trajectory:
    """1904.00962v3, which corrects no bias, with ‖w‖ held in [0, 10] (cybertronai/pytorch-lamb)."""
    beta1, beta2 = betas
    w = [layer.weight for layer in layers]
    m = [np.zeros_like(w_i) for w_i in w]
    v = [np.zeros_like(w_i) for w_i in w]
    for lr, grads in steps:
        for i, grad in enumerate(grads):
            m[i] = beta1 * m[i] + (1 - beta1) * grad
            v[i] = beta2 * v[i] + (1 - beta2) * grad * grad
            adam_step = m[i] / (np.sqrt(v[i]) + eps) + layers[i].weight_decay * w[i]
            weight_norm, adam_norm = min(norm(w[i]), 10.0), norm(adam_step)
            trust = 1.0 if weight_norm == 0 or adam_norm == 0 else weight_norm / adam_norm
            if not layers[i].adapt:
                trust = 1.0
            w[i] = w[i] - lr * trust * adam_step
        yield list(w)


def lamb_nvlamb(
    layers: Sequence[Layer],
    steps: Steps,
    *,
    betas: tuple[float, float],
    eps: float,
    max_grad_norm: float = 1.0,
) -> Trajectory:
    """NVLAMB as the reference of apex's test of FusedLAMB(use_nvlamb=True) has it."""
    beta1, beta2 = betas
    p = [layer.weight for layer in layers]
    m = [np.zeros_like(p_i) for p_i in p]
    v = [np.zeros_like(p_i) for p_i in p]
    for step, (lr, raw_grads) in enumerate(steps, start=1):
        global_grad_norm = norm(np.array([norm(g) for g in raw_grads]))
        clipped_ratio = max_grad_norm / max(global_grad_norm, max_grad_norm)
        for i, raw in enumerate(raw_grads):
            grad = raw * clipped_ratio
            m[i] = m[i] * beta1 + grad * (1 - beta1)
            v[i] = v[i] * beta2 + grad * grad * (1 - beta2)
            m_hat, v_hat = m[i] / (1.0 - beta1**step), v[i] / (1.0 - beta2**step)
            update = m_hat / (np.sqrt(v_hat) + eps)
            if layers[i].weight_decay != 0:
                update = update + layers[i].weight_decay * p[i]
            trust_ratio = 1.0
            w_norm, g_norm = norm(p[i]), norm(update)
            if w_norm > 0 and g_norm > 0 and layers[i].adapt:
                trust_ratio = w_norm / g_norm
            p[i] = p[i] - lr * trust_ratio * update
        yield list(p)


def lamb_apex(
    layers: Sequence[Layer],
    steps: Steps,
    *,
    betas: tuple[float, float],
    eps: float,
    max_grad_norm: float = 1.0,
    adam_w_mode: bool = True,
    use_nvlamb: bool = False,
) -> Trajectory:
    """apex FusedLAMB, the two stages of its multi-tensor kernel (csrc/multi_tensor_lamb.cu)."""
    beta1, beta2 = betas
    p = [layer.weight for layer in layers]
    m = [np.zeros_like(p_i) for p_i in p]
    v = [np.zeros_like(p_i) for p_i in p]
    for step, (learning_rate, grads) in enumerate(steps, start=1):
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        global_grad_norm = norm(np.concatenate([g.ravel() for g in grads]))
        clip = global_grad_norm / max_grad_norm if global_grad_norm > max_grad_norm else 1.0

        updates = []
        for i, g in enumerate(grads):  # stage 1
            decay = layers[i].weight_decay
            scaled_grad = g / clip
            if not adam_w_mode:  # L2 on the clipped gradient
                scaled_grad = scaled_grad + decay * p[i]
            m[i] = m[i] * beta1 + (1 - beta1) * scaled_grad
            v[i] = v[i] * beta2 + (1 - beta2) * scaled_grad * scaled_grad
            update = (m[i] / correction1) / (np.sqrt(v[i] / correction2) + eps)
            updates.append(update + decay * p[i] if adam_w_mode else update)

        for i, update in enumerate(updates):  # stage 2
            ratio = learning_rate
            if (use_nvlamb or layers[i].weight_decay != 0) and layers[i].adapt:
                param_norm, update_norm = norm(p[i]), norm(update)
                if update_norm != 0 and param_norm != 0:
                    ratio = learning_rate * (param_norm / update_norm)
            p[i] = p[i] - ratio * update
        yield list(p)


def lamb_timm(
    layers: Sequence[Layer],
    steps: Steps,
    *,
    betas: tuple[float, float],
    eps: float,
    max_grad_norm: float = 1.0,
    trust_clip: bool = False,
    always_adapt: bool = False,
) -> Trajectory:
    """timm 1.0.31's Lamb: the bias corrections divide m and √v, λ = 0 switches the ratio off."""
    beta1, beta2 = betas
    params = [layer.weight for layer in layers]
    exp_avg = [np.zeros_like(p) for p in params]
    exp_avg_sq = [np.zeros_like(p) for p in params]
    for step, (lr, grads) in enumerate(steps, start=1):
        bias_correction1, bias_correction2 = 1 - beta1**step, 1 - beta2**step
        clip_grad_norm = max(norm(np.array([norm(g) for g in grads])) / max_grad_norm, 1.0)
        for i, layer in enumerate(layers):
            p, grad = params[i], grads[i] / clip_grad_norm
            exp_avg[i] = exp_avg[i] + (1 - beta1) * (grad - exp_avg[i])
            exp_avg_sq[i] = exp_avg_sq[i] * beta2 + (1 - beta2) * grad * grad
            denom = np.sqrt(exp_avg_sq[i]) / bias_correction2**0.5 + eps
            update = exp_avg[i] / bias_correction1 / denom
            if layer.weight_decay != 0:
                update = update + layer.weight_decay * p
            if (layer.weight_decay != 0 or always_adapt) and layer.adapt:
                w_norm, g_norm = norm(p), norm(update)
                trust_ratio = w_norm / g_norm if w_norm > 0 and g_norm > 0 else 1.0
                update = update * (min(trust_ratio, 1.0) if trust_clip else trust_ratio)
            params[i] = p - lr * update
        yield list(params)


def lamb_lambc(
    layers: Sequence[Layer],
    steps: Steps,
    *,
    betas: tuple[float, float],
    eps: float,
    mu: tuple[float, float] = (0.0, 1.0),
) -> Trajectory:
    """Fong et al. 2020, 2011.13584: LAMB whose trust ratio is held between two bounds."""
    beta1, beta2 = betas
    theta = [layer.weight for layer in layers]
    first = [np.zeros_like(theta_i) for theta_i in theta]
    second = [np.zeros_like(theta_i) for theta_i in theta]
    for t, (eta, grads) in enumerate(steps, start=1):
        for i, (layer, g) in enumerate(zip(layers, grads, strict=True)):
            first[i] = beta1 * first[i] + (1 - beta1) * g
            second[i] = beta2 * second[i] + (1 - beta2) * g * g
            r = (first[i] / (1 - beta1**t)) / (np.sqrt(second[i] / (1 - beta2**t)) + eps)
            r_decayed = r + layer.weight_decay * theta[i]
            trust = 1.0
            if layer.adapt and theta[i].any() and r_decayed.any():
                trust = float(np.clip(norm(theta[i]) / norm(r_decayed), *mu))
            theta[i] = theta[i] - eta * trust * r_decayed
        yield list(theta)


def lamb_deepspeed(
    layers: Sequence[Layer],
    steps: Steps,
    *,
    betas: tuple[float, float],
    eps: float,
    min_coeff: float = 0.01,
    max_coeff: float = 10.0,
    eps_inside_sqrt: bool = False,
) -> Trajectory:
    """DeepSpeed 0.19.8's FusedLamb kernel: raw moments; both corrections scale the step size."""
    b1, b2 = betas
    p = [layer.weight for layer in layers]
    m = [np.zeros_like(p_i) for p_i in p]
    v = [np.zeros_like(p_i) for p_i in p]
    for step, (lr, grads) in enumerate(steps, start=1):
        step_size = lr * math.sqrt(1 - b2**step) / (1 - b1**step)
        for i, g in enumerate(grads):
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g * g
            denom = np.sqrt(v[i] + eps) if eps_inside_sqrt else np.sqrt(v[i]) + eps
            update = m[i] / denom + layers[i].weight_decay * p[i]
            w_l2, u_l2 = norm(p[i]), norm(update)
            lamb_coeff = 1.0
            if w_l2 != 0 and u_l2 != 0 and layers[i].adapt:
                lamb_coeff = w_l2 / u_l2
                if lamb_coeff > max_coeff:
                    lamb_coeff = max_coeff
                if lamb_coeff < min_coeff:
                    lamb_coeff = min_coeff
            p[i] = p[i] - step_size * lamb_coeff * update
        yield list(p)


def lamb_tfa(
    layers: Sequence[Layer],
    steps: Steps,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay_rate: float,
    exclude_from_weight_decay: Collection[int] = (),
) -> Trajectory:
    """TensorFlow Addons' LAMB: one decay for all, and a list of layers that are not to have it.

    The layers of that list (here by number, there by name) are not adapted either, unless a list of
    its own says which are not; a decay of 0 excludes nothing. `Layer.weight_decay` is not read.
    """
    beta_1, beta_2 = betas
    var = [layer.weight for layer in layers]
    m = [np.zeros_like(var_i) for var_i in var]
    v = [np.zeros_like(var_i) for var_i in var]
    for local_step, (lr_t, grads) in enumerate(steps, start=1):
        beta_1_power, beta_2_power = beta_1**local_step, beta_2**local_step
        for i, grad in enumerate(grads):
            m[i] = m[i] * beta_1 + grad * (1 - beta_1)
            v[i] = v[i] * beta_2 + (grad * grad) * (1 - beta_2)
            m_t_hat, v_t_hat = m[i] / (1.0 - beta_1_power), v[i] / (1.0 - beta_2_power)
            update = m_t_hat / (np.sqrt(v_t_hat) + eps)
            excluded = i in exclude_from_weight_decay
            if not excluded:
                update = update + weight_decay_rate * var[i]
            ratio = 1.0
            if not excluded and layers[i].adapt:
                w_norm, g_norm = norm(var[i]), norm(update)
                ratio = (w_norm / g_norm if g_norm > 0 else 1.0) if w_norm > 0 else 1.0
            var[i] = var[i] - ratio * lr_t * update
        yield list(var)


def lamb_decoupled(
    layers: Sequence[Layer], steps: Steps, *, betas: tuple[float, float], eps: float
) -> Trajectory:
    """LAMB with AdamW's decay: w shrinks by lr λ w of its own, outside u, its norm and the ratio.

    No source's: timm and pytorch_optimizer shrink w first and take ‖w‖ of what is left.
    """
    beta1, beta2 = betas
    w = [layer.weight for layer in layers]
    m = [np.zeros_like(w_i) for w_i in w]
    v = [np.zeros_like(w_i) for w_i in w]
    for t, (lr, grads) in enumerate(steps, start=1):
        for i, g in enumerate(grads):
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g**2
            u = (m[i] / (1 - beta1**t)) / (np.sqrt(v[i] / (1 - beta2**t)) + eps)
            adapts = layers[i].adapt and norm(w[i]) > 0 and norm(u) > 0
            ratio = norm(w[i]) / norm(u) if adapts else 1.0
            w[i] = w[i] - lr * layers[i].weight_decay * w[i] - lr * ratio * u
        yield list(w)
