"""Arithmetic on lists of chunks that all layer-wise steps share. Nothing waits for a device."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from largebatch.optim.chunks import Batch, squares_dtype
from largebatch.optim.layout import is_dtensor, local

Tensors = list[Tensor] | tuple[Tensor, ...]

# Elements whose squares a CPU may add up in one go in FP32: it costs 4e-7 of the sum at most.
CPU_STRETCH = 1 << 16


def norms_of(batch: Batch, chunks: Tensors) -> Tensors:
    """‖chunk‖₂ of each, finite where the chunk is: a square of 1e20 is beyond FP32.

    An accelerator adds squares up in FP64. A CPU, which is slow at that, does so only where FP32
    has overflowed, or where a chunk has no stretches: it adds up in sequence, which loses digits
    over many FP32 numbers, and so takes the norm of the norms of short stretches.
    """
    if batch.device.type != "cpu" or not batch.contiguous:
        return torch._foreach_norm(chunks, 2, dtype=squares_dtype(batch.device, batch.dtype))
    if batch.longest <= CPU_STRETCH:
        norms: Tensors = torch._foreach_norm(chunks, 2, dtype=batch.dtype)
    else:
        norms = [norm_in_stretches(chunk, batch.dtype) for chunk in chunks]
    if batch.dtype == torch.float64 or math.inf not in torch.stack([*norms]).tolist():
        return norms
    return torch._foreach_norm(chunks, 2, dtype=torch.float64)


def root(squares: Tensor) -> Tensor:
    """√squares, elementwise.

    Not by `sqrt`: on a CPU that wakes a pool of threads of its own for a few hundred numbers, which
    can cost more than the rest of the step.
    """
    return torch.where(squares > 0, squares * squares.rsqrt(), squares)


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


def descend(
    batch: Batch, weights: Tensors, steps: Tensors, scale: float | Tensor, skip: Tensor | None
) -> None:
    """w ← w - scale · step for every chunk, and the parameters with them; nothing where `skip`.

    Args:
        weights: what `_weights` gave, in the batch's dtype.
        scale: one number for all, or a vector with one for each chunk.
        skip: 0-d bool or None.
    """
    moved = weights if skip is None else [weight.clone() for weight in weights]
    if isinstance(scale, Tensor):
        scales = on_device(scale, batch.device).to(batch.dtype) if scale.dim() == 0 else scale
        each = [scales] * len(steps) if scale.dim() == 0 else scales.unbind()
        torch._foreach_addcmul_(moved, steps, each, value=-1)
    else:
        torch._foreach_add_(moved, steps, alpha=-scale)
    if skip is not None:
        write(weights, moved, skip)
    if weights[0].dtype != batch.chunks[0].param.dtype:
        write(batch.cut(local), weights, skip)


def write(targets: Tensors, values: Tensors, skip: Tensor | None) -> None:
    """targets ← values, rounded to the targets' dtype; where `skip`, they keep their very bits."""
    if skip is None:
        torch._foreach_copy_(targets, values)
        return
    for target, value in zip(targets, values, strict=True):
        # A choice, not arithmetic: values may be NaN, and 0 * NaN is NaN.
        torch.where(skip, target, value.to(target.dtype), out=target)


def largest_element(dtype: torch.dtype) -> float:
    """Of a gradient: its square leaves room for sums of a million of them."""
    return 1e-3 * math.sqrt(torch.finfo(dtype).max)


def without_too_large(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient with zeros for elements that are finite and above `largest_element`, and how
    many of them there were, 0-d."""
    size = gradient.abs()
    too_large = (size > largest_element(gradient.dtype)) & (size < math.inf)
    return torch.where(too_large, 0.0, gradient), too_large.sum()


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
