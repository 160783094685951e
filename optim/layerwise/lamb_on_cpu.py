"""LAMB's two passes on a CPU; `largebatch.optim.lamb` says the formula.

The direction m̂ / (√v̂ + ε) is f · m / (√v + e), where f = √(1 - β₂ᵗ) / (1 - β₁ᵗ) and
e = ε √(1 - β₂ᵗ), or f = 1 and e = ε without bias correction. The first pass takes it from torch's
one kernel for all of AdamW, which advances the moments too: from a weight of 0, and at a rate of
-f, AdamW goes to the direction. The second pass is torch's kernel of SGD. A tensor so large that
its direction is not kept, because nothing of the model's size is, has it taken from the moments
once more.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from largebatch.optim.base import Group
from largebatch.optim.layerwise import cpu_blocks
from largebatch.optim.layerwise.chunks import ChunkGroup, Way
from largebatch.optim.layerwise.cpu_step import CpuStep
from largebatch.optim.math.tensors import float_of

Ages = tuple[float, float]
"""The t of m and of v in the bias corrections."""

MOMENTS = ("exp_avg", "exp_avg_sq")

# The step count of the kernel, which then corrects nothing.
CORRECTED = torch.tensor(math.inf, dtype=torch.float32)


def ages_of(
    steps: Sequence[float], states: Sequence[Mapping[str, Any]], extra_keys: Sequence[str]
) -> list[Ages]:
    """Return the ages of all states: `step`, and what is added to it for m and for v."""
    if not any(extra_keys[0] in state for state in states):
        return [(step, step) for step in steps]
    none = torch.zeros((), dtype=torch.float32)
    columns = [torch.stack([state.get(key, none) for state in states]) for key in extra_keys]
    extra = zip(*(column.tolist() for column in columns), strict=True)
    return [(t + mean, t + square) for t, (mean, square) in zip(steps, extra, strict=True)]


@dataclass(frozen=True)
class RawMoments:
    """How a direction comes from m and v as they are.

    Attributes:
        factor: f.
        eps: e.
    """

    factor: float
    eps: float


def raw_moments(group: Group, ages: Ages) -> RawMoments:
    """Return f and e at a parameter's age."""
    if group["bias_correction"] != "moments":
        return RawMoments(1.0, group["eps"])
    first, second = (
        1.0 if beta == 0 else -math.expm1(age * math.log(beta))
        for age, beta in zip(ages, group["betas"], strict=True)
    )
    return RawMoments(math.sqrt(second) / first, group["eps"] * math.sqrt(second))


def advance(chunks: ChunkGroup, step: CpuStep, ages: Sequence[Ages]) -> tuple[Tensor, Tensor]:
    """Advance m and v; return ‖w‖ and ‖u‖ of each chunk.

    Args:
        ages: of each chunk.
    """
    pass_of = _advance_pack if chunks.way is Way.PACKED else _advance_stream
    return pass_of(chunks, step, ages)


def descend(
    chunks: ChunkGroup, step: CpuStep, ages: Sequence[Ages], scales: Tensor, rate: float
) -> None:
    """w ← w - scale · u, or w - scale · u - rate · λ w where decay is decoupled; after `advance`.

    Args:
        scales: of each chunk.
    """
    if chunks.way is Way.PACKED:
        _descend_pack(chunks, step, scales, rate)
    else:
        _descend_stream(chunks, step, ages, scales, rate)
        step.write_params(chunks)


def _decay(group: Group, kind: str) -> float:
    decay: float = group["weight_decay"] if group["decay"] == kind else 0.0
    return decay


def _fused(tensors: Sequence[Tensor], group: Group, raw: RawMoments, *, maximize: bool) -> None:
    """Advance moments by a gradient, and add f · m / (√v + e) to a direction.

    Args:
        tensors: direction, gradient, m and v.
    """
    (beta1, beta2), (direction, grad, mean, square) = group["betas"], tensors
    torch._fused_adamw_(
        [direction], [grad], [mean], [square], [], [CORRECTED], lr=-raw.factor, beta1=beta1,
        beta2=beta2, weight_decay=0.0, eps=raw.eps, amsgrad=False, maximize=maximize,
    )  # fmt: skip


# Packed -----------------------------------------------------------------------------------------


def _advance_pack(chunks: ChunkGroup, step: CpuStep, ages: Sequence[Ages]) -> tuple[Tensor, Tensor]:
    group, pack = chunks.group, chunks.pack
    weights = step.laid_out(chunks, "weights", step.weights)
    grads = step.laid_out(chunks, "gradients", step.grads)
    if step.multiplier != 1:
        grads.mul_(step.multiplier)
    l2, decay = _decay(group, "gradient"), _decay(group, "update")
    if l2:
        grads.add_(weights, alpha=-l2 if group["maximize"] else l2)
    update = step.room(chunks, "update")
    torch.mul(weights, decay, out=update) if decay else update.zero_()
    moments = [step.laid_out_state(chunks, key) for key in MOMENTS]
    flats = update, grads, *moments
    if len(set(ages)) == 1:
        _fused(flats, group, raw_moments(group, ages[0]), maximize=group["maximize"])
    else:  # some have begun later
        for *each, age in zip(*map(pack.split, flats), ages, strict=True):
            _fused(each, group, raw_moments(group, age), maximize=group["maximize"])
    for key, flat in zip(MOMENTS, moments, strict=True):
        step.write_state(chunks, key, flat)
    return pack.norms(weights), pack.norms(update)


def _descend_pack(chunks: ChunkGroup, step: CpuStep, scales: Tensor, rate: float) -> None:
    weights, update = step.room(chunks, "weights"), step.room(chunks, "update")
    chunks.pack.scale(update, scales)
    decay = rate * _decay(chunks.group, "decoupled")
    if decay:  # of the old weight, and rounded with the step
        update.add_(weights, alpha=decay)
    weights.sub_(update)
    step.write_weights(chunks)


# Streamed ---------------------------------------------------------------------------------------


def _advance_stream(
    chunks: ChunkGroup, step: CpuStep, ages: Sequence[Ages]
) -> tuple[Tensor, Tensor]:
    squares = [
        _advance_tensor(chunks, step, row, raw_moments(chunks.group, age), place)
        for row, age, place in zip(_rows(chunks, step), ages, _places(chunks), strict=True)
    ]
    weight, update = torch.tensor(squares, dtype=torch.float64).sqrt().unbind(dim=1)
    return weight, update


def _rows(chunks: ChunkGroup, step: CpuStep) -> list[tuple[Tensor, ...]]:
    """Return weight, gradient, m and v of each chunk, flat."""
    moments = [step.state(chunks, key) for key in MOMENTS]
    columns = chunks.cut(step.weights), chunks.cut(step.grads), *moments
    return [tuple(x.view(-1) for x in row) for row in zip(*columns, strict=True)]


def _places(chunks: ChunkGroup) -> list[int | None]:
    """Return where the direction of each chunk is kept; None: it is not."""
    sizes = [chunk.numel for chunk in chunks.members]
    ends = [*accumulate(sizes, initial=chunks.start)][1:]
    rows = zip(sizes, ends, strict=True)
    return [end - size if end <= cpu_blocks.KEPT else None for size, end in rows]


def _advance_tensor(
    chunks: ChunkGroup, step: CpuStep, row: tuple[Tensor, ...], raw: RawMoments, place: int | None
) -> tuple[float, float]:
    """Advance m and v of one tensor, block by block; return ‖w‖² and ‖u‖².

    The latter is ‖d‖² + 2λ d·w + λ²‖w‖² of the direction d, which takes fewer passes than u itself,
    unless most of it cancels.
    """
    group, dtype, decay = chunks.group, chunks.dtype, _decay(chunks.group, "update")
    found: tuple[list[Tensor], ...] = [], [], []
    start = place or 0
    for w, g, m, v in cpu_blocks.blocks_of(*row):
        direction = step.scratch.take("directions", dtype, start, w.numel()).zero_()
        weight = step.wide("weight", w, dtype)
        grad, maximize = _scaled(chunks, step, weight, g)
        _fused((direction, grad, m, v), group, raw, maximize=maximize)
        if decay:
            found[2].append(torch.dot(direction, weight))
        found[0].append(torch.dot(weight, weight))
        found[1].append(torch.dot(direction, direction))
        start += 0 if place is None else w.numel()
    weight_square, square, product = map(cpu_blocks.total, found)
    update_square = square + 2 * decay * product + decay**2 * weight_square
    cancels = update_square < 0.25 * (square + decay**2 * weight_square)
    if cancels or not math.isfinite(weight_square + update_square):
        return _wide_squares(row, raw, decay)
    return weight_square, update_square


def _scaled(chunks: ChunkGroup, step: CpuStep, weight: Tensor, grad: Tensor) -> tuple[Tensor, bool]:
    """Return a block of the gradient as the kernel is to take it, and whether to ascend along."""
    l2, maximize = _decay(chunks.group, "gradient"), chunks.group["maximize"]
    if step.multiplier == 1 and not l2 and grad.dtype == chunks.dtype:
        return grad, maximize
    scaled = step.block("gradient", grad, chunks.dtype)
    if grad.dtype == chunks.dtype:
        torch.mul(grad, step.multiplier_of(chunks), out=scaled)
    else:
        scaled.copy_(grad).mul_(step.multiplier_of(chunks))
    return scaled.add_(weight, alpha=l2) if l2 else scaled, False


def _wide_squares(row: tuple[Tensor, ...], raw: RawMoments, decay: float) -> tuple[float, float]:
    """‖w‖² and ‖u‖² by sums in FP64, from moments that have advanced."""
    weight_square = update_square = 0.0
    for w, _, m, v in cpu_blocks.blocks_of(*row):
        wide = w.double()
        update = raw.factor * (m / v.sqrt().add_(raw.eps)).double() + decay * wide
        weight_square += float_of(torch.dot(wide, wide))
        update_square += float_of(torch.dot(update, update))
    return weight_square, update_square


def _descend_stream(
    chunks: ChunkGroup, step: CpuStep, ages: Sequence[Ages], scales: Tensor, rate: float
) -> None:
    group = chunks.group
    inside, beside = _decay(group, "update"), rate * _decay(group, "decoupled")
    columns = _rows(chunks, step), ages, scales.tolist(), _places(chunks)
    for row, age, scale, place in zip(*columns, strict=True):
        # As the kernel has it: w ← w - scale · (d + decay · w). A factor 1 - scale · decay of w
        # would be 1 in FP32 below 3e-8.
        decay = inside + (beside / scale if scale else 0.0)
        start = place or 0
        for w, _, m, v in [row] if place is not None else cpu_blocks.blocks_of(*row):
            direction = step.scratch.take("directions", chunks.dtype, start, w.numel())
            if place is None:
                raw = raw_moments(group, age)
                torch.sqrt(v, out=direction).add_(raw.eps)
                torch.div(m, direction, out=direction).mul_(raw.factor)
            _move(chunks, step, w, direction, scale, decay)


def _move(
    chunks: ChunkGroup, step: CpuStep, weight: Tensor, direction: Tensor, scale: float, decay: float
) -> None:
    for w, d in (
        cpu_blocks.blocks_of(weight, direction)
        if weight.dtype != chunks.dtype
        else [(weight, direction)]
    ):
        wide = step.wide("weight", w, chunks.dtype)
        torch._fused_sgd_(
            [wide], [d], [], weight_decay=decay, momentum=0.0, lr=scale, dampening=0.0,
            nesterov=False, maximize=False, is_first_step=False,
        )  # fmt: skip
        if wide is not w:
            w.copy_(wide)
