"""Arithmetic on tensors that all families share. Nothing waits for a device."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from largebatch.optim.sharding.layout import is_dtensor, local

Tensors = list[Tensor] | tuple[Tensor, ...]

# Elements whose squares a CPU may add up in one go in FP32: it costs 4e-7 of the sum at most.
CPU_STRETCH = 1 << 16


def root(squares: Tensor) -> Tensor:
    """√squares, elementwise.

    Not by `sqrt`: on a CPU that wakes a pool of threads of its own for a few hundred numbers, which
    can cost more than the rest of the step.
    """
    return torch.where(squares > 0, squares * squares.rsqrt(), squares)


def averaged_momentum(
    grad: Tensor, mean: Tensor, momentum: float, nesterov: bool, skip: Tensor | None
) -> Tensor:
    """M ← μ M + (1 - μ) G, unless `skip`. Returns the update, not to be written to: μ M + (1 - μ) G
    again with Nesterov momentum, else M itself. All of the gradient's shape.
    """
    average([mean], [grad], momentum, skip)
    return grad.lerp(mean, momentum) if nesterov else mean


def average(averages: Tensors, values: Tensors, beta: float, skip: Tensor | None) -> None:
    """average ← β · average + (1 - β) · value, in place; untouched where `skip`."""
    if skip is None:
        torch._foreach_lerp_(averages, values, 1 - beta)
    else:
        write(averages, torch._foreach_lerp(averages, values, 1 - beta), skip)


def norm_in_stretches(chunk: Tensor, dtype: torch.dtype) -> Tensor:
    """‖chunk‖₂ as the norm of the norms of its stretches, 0-d."""
    norm: Callable[..., Tensor] = torch.linalg.vector_norm
    numel = chunk.numel()
    if numel <= CPU_STRETCH:
        return norm(chunk, dtype=dtype)
    flat, whole = chunk.view(-1), numel - numel % CPU_STRETCH
    norms = norm(flat[:whole].view(-1, CPU_STRETCH), dim=1, dtype=dtype)
    if whole < numel:
        norms = torch.cat([norms, norm(flat[whole:], dtype=dtype).reshape(1)])
    return norm(norms)


def gradient_of(param: Tensor) -> Tensor:
    """The local part of a parameter's gradient, placed like it, and contiguous where it is."""
    assert param.grad is not None
    grad = param.grad
    if type(grad) is Tensor:
        return grad if grad.is_contiguous() or not param.is_contiguous() else grad.contiguous()
    if is_dtensor(grad) and grad.placements != param.placements:  # type: ignore[attr-defined]
        # Left as a sum over ranks still to be taken, as tensor parallelism may leave it.
        grad = grad.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
    grad = local(grad)
    return grad.contiguous() if local(param).is_contiguous() else grad


def gradients_of(params: list[Tensor]) -> list[Tensor]:
    """`gradient_of` of each parameter; all of them have one."""
    grads = [grad for param in params if (grad := param.grad) is not None]
    if set(map(type, grads)) <= {Tensor} and all(map(Tensor.is_contiguous, grads)):
        return grads
    return [gradient_of(param) for param in params]


def write(targets: Tensors, values: Tensors, skip: Tensor | None) -> None:
    """targets ← values, rounded to the targets' dtype; where `skip`, they keep their very bits."""
    if skip is None:
        torch._foreach_copy_(targets, values)
        return
    for target, value in zip(targets, values, strict=True):
        # A choice, not arithmetic: values may be NaN, and 0 * NaN is NaN.
        torch.where(skip, target, value.to(target.dtype), out=target)


def add(targets: Tensors, values: Tensors | float, skip: Tensor | None) -> None:
    """targets ← targets + values; where `skip`, they keep their very bits."""
    if skip is None:
        torch._foreach_add_(targets, values)
    else:
        write(targets, torch._foreach_add(targets, values), skip)


def descend(weight: Tensor, direction: Tensor, rate: float | Tensor) -> None:
    """weight ← weight - rate · direction, with a rate that may be 0-d, in one pass."""
    if isinstance(rate, Tensor):
        weight.addcmul_(direction, rate, value=-1)
    else:
        weight.add_(direction, alpha=-rate)


def largest_element(dtype: torch.dtype) -> float:
    """Of a gradient: its square leaves room for sums of a million of them."""
    return 1e-3 * math.sqrt(torch.finfo(dtype).max)


def without_too_large(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient with zeros for elements that are finite and above `largest_element`, and how
    many of them there were, 0-d; the gradient itself where the host can see that there is none."""
    limit = largest_element(gradient.dtype)
    if gradient.device.type == "cpu" and gradient.numel():
        least, most = torch.aminmax(gradient)
        if -limit <= float_of(least) and float_of(most) <= limit:
            return gradient, torch.zeros((), dtype=torch.int64)
    size = gradient.abs()
    too_large = (size > limit) & (size < math.inf)
    return torch.where(too_large, 0.0, gradient), too_large.sum()


def is_finite(tensor: Tensor) -> Tensor:
    """Whether all elements are, 0-d: in one pass, where `isfinite` takes five."""
    if not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    least, most = torch.aminmax(tensor)  # NaN if there is one
    return least.isfinite() & most.isfinite()


def in_dtype(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in a dtype; themselves where they have it."""
    if all(tensor.dtype == dtype for tensor in tensors):
        return tensors
    return [tensor.to(dtype) for tensor in tensors]


def on_device(scalar: Tensor, device: torch.device) -> Tensor:
    """A one-element tensor as a 0-d one on `device`, without waiting for a copy to an accelerator.

    To the host there is no way around waiting: what comes next reads it there.
    """
    return local(scalar).to(device, non_blocking=device.type != "cpu").reshape(())


def scalar(value: float | Tensor, like: Tensor) -> Tensor:
    """A number or a one-element tensor as a 0-d tensor beside `like`."""
    if isinstance(value, Tensor):
        return on_device(value, like.device).to(like.dtype)
    return torch.full((), value, dtype=like.dtype, device=like.device)


def float_of(value: float | Tensor) -> float:
    """A number or a one-element tensor on the host as a number."""
    if not isinstance(value, Tensor):
        return value
    number: Any = value.reshape(()).tolist()  # not `item`, which says that a device is waited for
    return float(number)


def squares_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Of sums of squares: FP64, which holds those of any FP32 numbers, or `dtype` without it."""
    if device.type == "mps":
        return dtype
    if device.type == "xpu" and not torch.xpu.get_device_capability(device)["has_fp64"]:
        return dtype
    return torch.float64


def compute_dtype(param: Tensor) -> torch.dtype:
    """FP32, or the parameter's own dtype where that is wider."""
    return torch.promote_types(param.dtype, torch.float32)
