"""Mano for the hidden matrices, AdamW for everything else: momentum on the tangent of the weights.

Gu, Xie 2026, "Mano: Restriking Manifold Optimization for LLM Training",
https://arxiv.org/abs/2601.23000, Algorithm 1. For a hidden matrix W of (rows, columns) with
gradient G, at its step t, in turn by columns (the first step) and by rows:

    M ← μ M + (1 - μ) G
    V = M - Ŵ ⟨M, Ŵ⟩                  Ŵ = W / ‖W‖, norms and products of each column, or of each row
    W ← W - lr · (0.2 √n V / ‖V‖ + λ W)      n the length of a column, or of a row

So every element moves as far as AdamW's do, and no step is taken along the weights themselves. It
decomposes nothing and multiplies no matrices.

A rank takes the sums over what it holds; where a column (or a row) lies over several ranks, the
sums of all such are added up in one all-reduce for each process group: three numbers a column, no
gradient travels.

Where we differ, and what is left open there: M is an average in place of the paper's sum, which V's
length does not know; t counts each parameter's own steps; ‖V‖² = ‖M‖² - ⟨M, Ŵ⟩², so that one sum
over the ranks is enough, and is at least 1e-12 ‖M‖²: below it there is but rounding; a column of
zeros has no direction, and V is M. Since version 2 the authors' code leaves W as it is in the place
of Ŵ; this is the paper's.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from largebatch.optim.base import Group
from largebatch.optim.blockwise.block_work import PartAtWork
from largebatch.optim.blockwise.blocks import Block, matrices_of
from largebatch.optim.blockwise.hidden_matrices import ADAMW, SPLIT, Given, OfHiddenMatrices
from largebatch.optim.blockwise.work_group import BlockedLayer, BlockWorkGroup
from largebatch.optim.math.tensors import averaged_momentum, squares_dtype
from largebatch.optim.options import require_one_of
from largebatch.optim.sharding.layout import local
from largebatch.optim.sharding.placement import Box

LEAST: Final = 1e-12
"""Of ‖V‖², relative to ‖M‖²."""


class Mano(OfHiddenMatrices):
    """Mano for the hidden matrices and kernels, AdamW for the rest; the module says the formula.

    `params` is the model, or (name, parameter) pairs, or groups of them, as for `Muon`, and so are
    `algorithm` ("mano" or "adamw"), `norm_groups` and `norm_dim` of a group. `lr` is a float or a
    0-d tensor, read from the group at each step; `weight_decay` is λ, `momentum` μ. The keywords:

    - `nesterov`: V is made from μ M + (1 - μ) G.
    - `betas`, `eps`, `adamw_lr_ratio`, `adamw_weight_decay`, `adamw`, `groups`: as for `Muon`.

    Under ZeRO it is refused as Muon is: flat buffers have no columns.

    Raises ValueError for parameters without names, no hidden matrix, an option out of range, a
    pattern that matches nothing, a tensor of three or more dimensions with neither a module nor
    `norm_groups`; RuntimeError at `step` for a sparse gradient.

    >>> matrix = torch.nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> optimizer = Mano([("matrix", matrix)], lr=0.1)
    >>> matrix.grad = torch.tensor([[5.0, 0.1], [0.1, 5.0]])  # nearly along the weights
    >>> optimizer.step()
    >>> matrix.data.round(decimals=4)  # 0.1 · 0.2 · √2, across them
    tensor([[ 1.0000, -0.0283],
            [-0.0283,  1.0000]])
    """

    algorithm = "mano"

    _cut: ClassVar[tuple[str, ...]] = ("algorithm", "norm_groups", "norm_dim")

    def __init__(
        self,
        params: Given,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = False,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        adamw_lr_ratio: float = 1.0,
        adamw_weight_decay: float | None = None,
        adamw: str | Sequence[str] = (),
        groups: Iterable[dict[str, Any]] | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "betas": tuple(betas),
            "eps": eps,
            "adamw_lr_ratio": adamw_lr_ratio,
            "maximize": maximize,
            **SPLIT,
        }
        taken = self._read(params, defaults, groups, adamw, adamw_weight_decay)
        super().__init__(taken, defaults, process_group=None, tolerated_failures=0)
        self._require_matrix()

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options(options)
        require_one_of(options, "nesterov", (True, False))

    def blocks_in(self, group: Group, shape: Sequence[int]) -> tuple[Block, ...]:
        return ()  # nothing travels

    def _elementwise_keys(self, has_blocks: bool, group: Group) -> tuple[str, ...]:
        if group["algorithm"] == ADAMW:
            return super()._elementwise_keys(has_blocks, group)
        return ("momentum_buffer",)

    def _averages(self, has_blocks: bool, group: Group) -> tuple[str, ...]:
        return super()._averages(has_blocks, group) if group["algorithm"] == ADAMW else ()

    def _work_on_parts(
        self, work_group: BlockWorkGroup, parts: Sequence[PartAtWork], skip: Tensor | None
    ) -> dict[int, Tensor]:
        mine = [part for part in parts if part.group["algorithm"] == self.algorithm]
        found = super()._work_on_parts(
            work_group, [part for part in parts if part.group["algorithm"] == ADAMW], skip
        )
        pieces: list[MatrixPart] = []
        for part in mine:
            found[part.place] = torch.zeros_like(part.grad)
            update = self._next_momentum(part, skip)
            pieces += parts_of(part, update, found[part.place])
        for piece, sums in zip(pieces, added_up(work_group, pieces), strict=True):
            piece.take_direction(sums)
        return found

    def _next_momentum(self, part: PartAtWork, skip: Tensor | None) -> Tensor:
        """Advance M by a gradient, and return what is projected."""
        buffer = local(self.state[part.layer.param]["momentum_buffer"])
        momentum, nesterov = part.group["momentum"], part.group["nesterov"]
        return averaged_momentum(part.grad, buffer, momentum, nesterov, skip)


@dataclass(frozen=True)
class MatrixPart:
    """What this rank holds of one matrix, which may be nothing, in one step.

    Columns are normed over dimension `rows` of the tensor, rows over all others.
    """

    update: Tensor
    weight: Tensor
    direction: Tensor
    """To be written."""
    over: tuple[int, ...]
    """The dimensions that sums are taken over."""
    length: int
    """Of a whole column, or row."""
    whole: Box
    """The sums of the whole matrix, in its tensor's dimensions."""
    here: Box
    """Those that this rank needs."""
    is_spread: bool
    """Whether some column, or row, lies over several ranks."""
    counts: bool
    """Whether this rank's sums are to be added, of several with copies."""

    def sums(self) -> Tensor:
        """‖W‖², ⟨U, W⟩ and ‖U‖² of this rank's part of each column, or row."""
        dtype = squares_dtype(self.update.device, self.update.dtype)
        pairs = (self.weight, self.weight), (self.update, self.weight), (self.update, self.update)
        return torch.stack(
            [(one * other).sum(self.over, keepdim=True, dtype=dtype) for one, other in pairs]
        )

    def take_direction(self, sums: Tensor) -> None:
        """direction ← 0.2 √n V / ‖V‖."""
        weight, product, update = sums
        ratio = torch.where(weight > 0, product / weight, 0.0)
        square = torch.maximum(update - product * ratio, LEAST * update)
        scale = torch.where(update > 0, 0.2 * math.sqrt(self.length) * square.rsqrt(), 0.0)
        dtype = self.update.dtype
        tangent = self.update - ratio.to(dtype) * self.weight
        self.direction.copy_(tangent * scale.to(dtype))


def parts_of(part: PartAtWork, update: Tensor, direction: Tensor) -> Iterator[MatrixPart]:
    """This rank's parts of a tensor's matrices, all of them in an order that all ranks share."""
    layer, group = part.layer, part.group
    placement, weight = layer.placement, local(layer.param).to(layer.dtype)
    known = SPREAD.setdefault(layer, {})
    held, dims = placement.boxes[placement.me], tuple(range(len(placement.shape)))
    for block in matrices_of(placement.shape, group["norm_groups"], group["norm_dim"]):
        box = block.box
        # The first dimension of a slice that is a matrix counts matrices, not rows.
        is_slice = group["norm_groups"] is not None and group["norm_dim"] % len(dims) == 0
        rows = 1 if is_slice and len(dims) > 2 and box.size[0] == 1 else 0
        by_columns = part.step % 2 == 1
        over = (rows,) if by_columns else tuple(dim for dim in dims if dim != rows)
        mine = box.overlap(held) or Box(box.start, (0,) * len(dims))
        empty = mine.numel == 0
        if (box, over) not in known:
            known[box, over] = is_spread(placement.boxes, box, over)

        def here(tensor: Tensor, mine: Box = mine, empty: bool = empty) -> Tensor:
            return tensor.new_empty(mine.size) if empty else mine.of(tensor, held)

        yield MatrixPart(
            update=here(update),
            weight=here(weight),
            direction=here(direction),
            over=over,
            length=block.shape[0] if by_columns else block.shape[1],
            whole=without(box, over),
            here=without(mine, over),
            is_spread=known[box, over],
            counts=not empty and placement.copies[placement.me] == 0,
        )


def without(box: Box, dims: Sequence[int]) -> Box:
    """The box of sums over these dimensions."""
    start = tuple(0 if dim in dims else begin for dim, begin in enumerate(box.start))
    sums = 0 if box.numel == 0 else 1
    size = tuple(sums if dim in dims else length for dim, length in enumerate(box.size))
    return Box(start, size)


SPREAD: Final[WeakKeyDictionary[BlockedLayer, dict[tuple[Box, tuple[int, ...]], bool]]] = (
    WeakKeyDictionary()
)
"""What `is_spread` says of a layer's matrices, which takes as long as there are ranks."""


def is_spread(boxes: tuple[Box, ...], matrix: Box, over: tuple[int, ...]) -> bool:
    """Whether a member holds a part of the matrix, but not all of it along these dimensions."""
    parts = {box.overlap(matrix) for box in set(boxes)}
    return any(
        part is not None and any(part.size[dim] < matrix.size[dim] for dim in over)
        for part in parts
    )


def added_up(work_group: BlockWorkGroup, pieces: Sequence[MatrixPart]) -> list[Tensor]:
    """The sums that this rank needs of each slice, complete: at most one all-reduce."""
    found = [each.sums() for each in pieces]
    spread = [place for place, each in enumerate(pieces) if each.is_spread]
    if not spread:
        return found
    sizes = [3 * pieces[place].whole.numel for place in spread]
    flat = torch.zeros(sum(sizes), dtype=found[spread[0]].dtype, device=work_group.device)
    views = [
        part.view(3, *pieces[place].whole.size)
        for place, part in zip(spread, torch.split(flat, sizes), strict=True)
    ]
    mine = []
    for place, view in zip(spread, views, strict=True):
        each = pieces[place]
        stack = Box((0, *each.here.start), (3, *each.here.size))
        mine.append(stack.of(view, Box((0, *each.whole.start), view.shape)))
        if each.counts:
            mine[-1].copy_(found[place])
    dist.all_reduce(flat, group=work_group.group)
    for place, view in zip(spread, mine, strict=True):
        found[place] = view.to(found[place].device)
    return found
