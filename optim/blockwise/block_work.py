"""The data of a step on blocks on one rank: gradients, blocks, directions."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from largebatch.optim.base import Group
from largebatch.optim.blockwise.owned_state import BlockState
from largebatch.optim.blockwise.step_stats import BlockDirection, BlockStats
from largebatch.optim.blockwise.work_group import BlockedLayer, BlockWorkGroup
from largebatch.optim.math.decompositions import Beside, Decomposition, Outcome, decompose
from largebatch.optim.math.matrix_roots import Failures
from largebatch.optim.math.tensors import write
from largebatch.optim.sharding.refresh_schedule import is_due

Result = TypeVar("Result")

BlockTask = Generator[list[Decomposition[Any]], list[Outcome[Any]], BlockDirection]
"""The work on a block in a step. It yields its decompositions at most once, to be computed with
those of all other blocks, and receives the outcomes."""


@dataclass(frozen=True)
class BlockAtWork:
    """One block in one step."""

    layer: BlockedLayer
    number: int
    group: Group
    grad: Tensor
    """In the block's merged shape; not to be written to."""
    state: BlockState
    step: int
    """t, from 1."""
    ages: Mapping[str, float]
    """t of each running average, for its bias correction: `step`, but where its β has changed as
    many steps as the new one would have needed for the weight that it has."""
    failures: Failures
    skip: Tensor | None
    beside: Beside
    """What is decomposed beside the steps."""

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions that have a factor."""
        return self.layer.blocks[self.number].dims

    def attempt(self, compute: Callable[[], Result], dim: int) -> Result | None:
        """The decomposition of a factor; None where it fails, and the last good one stays.

        Raises:
            RootError: too many failures, where no other rank waits for this one.
        """
        part, alone = (self.number, dim), self.layer.placement.group is None
        return self.failures.attempt(compute, str(self.layer.name), part, raises=alone)

    def put(self, name: str, value: Tensor) -> Tensor:
        """state ← value, unless the step is skipped; returns the value."""
        write([self.state[name]], [value], self.skip)
        return value

    def is_due(self, first: int) -> bool:
        """Whether roots or bases, first needed at step `first`, are taken now."""
        interval: int = self.group["precondition_interval"]
        return is_due(self.step, first, interval, self.layer.slots[self.number])


@dataclass(frozen=True)
class PartAtWork:
    """This rank's part of a layer without blocks in one step."""

    place: int
    """Of the layer in its work group."""
    layer: BlockedLayer
    group: Group
    grad: Tensor
    """Not to be written to."""
    step: int
    """t, from 1."""
    ages: Mapping[str, float]


def run_tasks(works: Sequence[BlockTask]) -> list[BlockDirection]:
    """Run the tasks of all blocks, with all their decompositions at once."""
    done: dict[int, BlockDirection] = {}

    def resume(number: int, outcomes: list[Outcome[Any]] | None) -> list[Decomposition[Any]]:
        try:
            return works[number].send(outcomes)  # type: ignore[arg-type]  # None: begin
        except StopIteration as end:
            done[number] = end.value
            return []

    asked = {number: resume(number, None) for number in range(len(works))}
    outcomes = iter(decompose([each for some in asked.values() for each in some]))
    for number, some in asked.items():
        if some:
            resume(number, [*islice(outcomes, len(some))])
    return [done[number] for number in range(len(works))]


@dataclass(frozen=True)
class GatheredStep:
    """Inputs of a step that are the same on all ranks, gathered before any state is touched."""

    gradients: "list[GroupGradients]"
    active: set[Tensor]
    """Parameters with a gradient on any rank."""
    skip: Tensor | None
    """0-d bool: where true, nothing may change."""


@dataclass(frozen=True)
class GroupGradients:
    """A work group's gradients on this rank, after the exchange."""

    work_group: BlockWorkGroup
    parts: list[Tensor | None]
    """For each layer this rank's part of the gradient."""
    dropped: list[Tensor | None]
    """For each layer how many elements of this rank's part were too large, 0-d."""
    blocks: list[dict[int, Tensor]]
    """For each layer the gradient's blocks that this rank owns."""


@dataclass(frozen=True)
class Directions:
    """The directions that a rank computed from a work group's gradients."""

    work_group: BlockWorkGroup
    blocks: list[dict[int, Tensor]]
    """For each layer the directions of the blocks owned here."""
    elementwise: dict[int, Tensor]
    """By layer, this rank's part of the directions of what has no blocks."""
    stats: BlockStats


def factor_beta(group: Group) -> float:
    """β of the running averages; 1 for plain sums."""
    beta: float | None = group["factor_beta"]
    return group["betas"][1] if beta is None else beta


def advance_factor(block: BlockAtWork, dim: int) -> None:
    """Take this step's G_(i) G_(i)ᵀ into a dimension's Kronecker factor, (n_i, n_i); G_(i) is the
    gradient unfolded along dimension i.

    The product is as precise as what is set globally: callers set `matrix_roots.full_precision`.
    """
    beta, factor = factor_beta(block.group), block.state[f"factor_{dim}"]
    unfolded = block.grad.movedim(dim, 0).flatten(1)
    weight = 1 if beta == 1 else 1 - beta
    if block.skip is None:
        factor.addmm_(unfolded, unfolded.T, beta=beta, alpha=weight)
    else:
        new = torch.addmm(factor, unfolded, unfolded.T, beta=beta, alpha=weight)
        write([factor], [new], block.skip)


def in_basis(tensor: Tensor, matrices: Mapping[int, Tensor]) -> Tensor:
    """The tensor multiplied along dimensions by the transposes of their matrices.

    For orthonormal columns that is the tensor in their coordinates.
    """
    for dim in range(tensor.dim()):
        # The first dimension is worked on and becomes the last: after all, they are in order.
        if dim in matrices:
            tensor = torch.tensordot(tensor, matrices[dim], dims=([0], [0]))
        else:
            tensor = tensor.movedim(0, -1)
    return tensor


def out_of_basis(tensor: Tensor, matrices: Mapping[int, Tensor]) -> Tensor:
    """The tensor multiplied along dimensions by their matrices: the way back of `in_basis`."""
    return in_basis(tensor, {dim: matrix.T for dim, matrix in matrices.items()})
