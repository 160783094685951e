"""LARS's two passes on a CPU; `largebatch.optim.lars` says the formula.

The second pass is torch's one kernel for momentum SGD, of a gradient that has been scaled by the
ratio r, with a weight decay of r β: nothing but weight, buffer and gradient goes through memory.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from largebatch.optim.base import Group
from largebatch.optim.layerwise.chunks import ChunkGroup, Way
from largebatch.optim.layerwise.cpu_blocks import blocks_of, square_of
from largebatch.optim.layerwise.cpu_step import CpuStep

BUFFER = "momentum_buffer"


def measure(chunks: ChunkGroup, step: CpuStep) -> tuple[Tensor, Tensor]:
    """Return ‖w‖, and ‖g‖ or ‖g + β w‖, of each chunk."""
    factor = step.multiplier_of(chunks)
    decay = chunks.group["weight_decay"] if chunks.group["denominator"] == "joint" else 0.0
    if chunks.way is Way.PACKED:
        weights = step.laid_out(chunks, "weights", step.weights)
        grads = step.laid_out(chunks, "gradients", step.grads)
        if factor != 1:
            grads.mul_(factor)
        if decay:
            grads.add_(weights, alpha=decay)
        return chunks.pack.norms(weights), chunks.pack.norms(grads)
    weight_norms = step.norms(chunks, step.weights)
    if decay:
        return weight_norms, _joint_norms(chunks, step, factor, decay)
    grad_norms = step.grad_norms.get(id(chunks))
    if grad_norms is None:
        grad_norms = step.norms(chunks, step.grads)
    return weight_norms, grad_norms * abs(factor)


def _joint_norms(chunks: ChunkGroup, step: CpuStep, factor: float, decay: float) -> Tensor:
    """‖g + β w‖ of each chunk."""
    squares = []
    for weight, grad in _pairs(chunks, step):
        found = 0.0
        for w, g in blocks_of(weight, grad):
            joint = step.block("gradient", g, chunks.dtype).copy_(g).mul_(factor)
            joint.add_(step.wide("weight", w, chunks.dtype), alpha=decay)
            found += square_of(joint, chunks.dtype, step.scratch)
        squares.append(found)
    return torch.tensor(squares, dtype=torch.float64).sqrt()


def _pairs(chunks: ChunkGroup, step: CpuStep) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield weight and gradient of each chunk, flat."""
    return zip(step.flats(chunks, step.weights), step.flats(chunks, step.grads), strict=True)


def descend(chunks: ChunkGroup, step: CpuStep, scales: Tensor, rate: float) -> None:
    """b ← μ b + scale · (g + β w); w ← w - rate · b, or with Nesterov momentum; after `measure`.

    Args:
        scales: of each chunk.
    """
    group = chunks.group
    if chunks.way is Way.STREAMED:
        _descend_stream(chunks, step, scales, rate)
        step.write_params(chunks)
        return
    weights, grads = step.room(chunks, "weights"), step.room(chunks, "gradients")
    if group["weight_decay"] and group["denominator"] != "joint":
        grads.add_(weights, alpha=group["weight_decay"])
    chunks.pack.scale(grads, scales)
    buffers = [step.laid_out_state(chunks, BUFFER)] if group["momentum"] else []
    _fused(weights, grads, buffers, group, 0.0, rate, 1.0, maximize=False)
    for buffer in buffers:
        step.write_state(chunks, BUFFER, buffer)
    step.write_weights(chunks)


def _descend_stream(chunks: ChunkGroup, step: CpuStep, scales: Tensor, rate: float) -> None:
    group, factor = chunks.group, step.multiplier
    no_buffers: list[list[Tensor]] = [[]] * len(chunks.members)
    buffers = no_buffers
    if group["momentum"]:
        buffers = [[buffer.view(-1)] for buffer in step.state(chunks, BUFFER)]
    for (weight, grad), buffer, scale in zip(
        _pairs(chunks, step), buffers, scales.tolist(), strict=True
    ):
        # The kernel's own way to scale what goes into the buffer, 1 - (1 - scale), loses digits of
        # a small scale; and with Nesterov momentum it scales something else.
        is_native = weight.dtype == grad.dtype == chunks.dtype
        if is_native and buffer and abs(scale * factor) > 1e-6 and not group["nesterov"]:
            decay = group["weight_decay"] / factor
            _fused(
                weight, grad, buffer, group, decay, rate, scale * factor,
                maximize=group["maximize"],
            )  # fmt: skip
            continue
        for w, g, *b in blocks_of(weight, grad, *buffer):
            wide = step.wide("weight", w, chunks.dtype)
            scaled = step.block("gradient", g, chunks.dtype).copy_(g)
            scaled.mul_(scale * step.multiplier_of(chunks))
            _fused(wide, scaled, b, group, scale * group["weight_decay"], rate, 1.0, maximize=False)
            if wide is not w:
                w.copy_(wide)


def _fused(
    weight: Tensor, grad: Tensor, buffer: list[Tensor], group: Group, decay: float, rate: float,
    scale: float, *, maximize: bool,
) -> None:  # fmt: skip
    """b ← μ b + scale · (g + decay · w); w ← w - rate · b."""
    torch._fused_sgd_(
        [weight], [grad], buffer, weight_decay=decay, momentum=group["momentum"], lr=rate,
        dampening=1 - scale, nesterov=group["nesterov"], maximize=maximize, is_first_step=False,
    )  # fmt: skip
