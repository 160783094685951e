"""What a step was like for each layer, from sums that the ranks have added up."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from largebatch.optim.blockwise.work_group import BlockedLayer
from largebatch.optim.math.tensors import norm_in_stretches, root
from largebatch.optim.sharding.layout import Name, local

DROPPED_ROW = 5


@dataclass(frozen=True)
class BlockDirection:
    """What an owner makes of a block."""

    direction: Tensor
    square: Tensor | None = None
    """‖·‖² that the block contributes to the length of the layer's step, 0-d; None: its own."""


@dataclass
class BlockStats:
    """Sums over whole layers, the rows of `squares`, and the condition of each of their blocks."""

    layers: list[BlockedLayer]
    moved: list[int]
    squares: Tensor
    """(layers, 6): w², d², u², g², g·d with w the weights, d the direction, u the step, g the
    gradient; and how many elements of g were too large."""
    conditions: Tensor
    """Over the blocks of all layers."""

    def by_layer(self) -> Iterator[tuple[Name, dict[str, Tensor]]]:
        scales, norms = self.scales(), root(self.squares[:, :4])
        weight, direction, _, grad = norms.unbind(dim=1)
        cosine = self.squares[:, 4] / (direction * grad)
        cosine = torch.where(direction * grad > 0, cosine, 0.0)
        values = {
            "weight_norm": weight,
            "update_norm": scales * direction,
            "trust_ratio": scales,
            "cosine": cosine,
            "dropped_elements": self.squares[:, DROPPED_ROW],
        }
        first = [0, *accumulate(num_conditions(layer) for layer in self.layers)]
        for place in self.moved:
            layer = self.layers[place]
            found = {key: value[place] for key, value in values.items()}
            if layer.has_factors:
                own = self.conditions[first[place] : first[place + 1]]
                found["condition_number"] = own.max()
            yield layer.name, found

    def scales(self) -> Tensor:
        """‖u‖ / ‖d‖ of each layer, 1 where there is no direction."""
        direction, step = self.squares[:, 1], self.squares[:, 2]
        return torch.where(direction > 0, root(step / direction), 1.0)


class Tally:
    """Adds up what this rank knows of a step's `BlockStats`; summed over the ranks it is them."""

    def __init__(
        self, layers: list[BlockedLayer], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._layers, self._dtype = layers, dtype
        self._none = torch.zeros((), dtype=dtype, device=device)
        self._rows = [[self._none] * 6 for _ in layers]
        self._conditions = [[self._none] * num_conditions(layer) for layer in layers]
        self._moved: list[int] = []

    def moves(self, place: int, dropped: Tensor | None) -> None:
        """A layer takes part in the step: note this rank's part of its weights, and how many
        elements of its part of the gradient were dropped."""
        self._moved.append(place)
        if self._counts(place):
            layer = self._layers[place]
            self._rows[place][0] = square(local(layer.param).to(layer.dtype))
            self._rows[place][DROPPED_ROW] = self._none if dropped is None else dropped

    def add_part(self, place: int, grad: Tensor, direction: Tensor) -> None:
        """This rank's part of a layer without blocks."""
        if self._counts(place):
            self._add(place, grad, BlockDirection(direction))

    def add_block(
        self, place: int, number: int, grad: Tensor, done: BlockDirection, condition: Tensor | None
    ) -> None:
        self._add(place, grad, done)
        if condition is not None and self._conditions[place]:
            self._conditions[place][number] = condition.max()

    def stats(self) -> BlockStats:
        squares = torch.stack([each.to(self._none) for row in self._rows for each in row])
        conditions = [each.to(self._none) for own in self._conditions for each in own]
        # One more, so that there is something to stack.
        stacked = torch.stack([*conditions, self._none])
        return BlockStats(self._layers, self._moved, squares.view(-1, 6), stacked)

    def _counts(self, place: int) -> bool:
        """Of several copies of a layer the first one does."""
        placement = self._layers[place].placement
        return placement.copies[placement.me] == 0

    def _add(self, place: int, grad: Tensor, done: BlockDirection) -> None:
        direction, own = done.direction, square(done.direction)
        step = own if done.square is None else done.square
        new = own, step, square(grad), (grad * direction).sum()
        row = self._rows[place]
        known = row[1:5]
        row[1:5] = [b if a is self._none else a + b for a, b in zip(known, new, strict=True)]


def num_conditions(layer: BlockedLayer) -> int:
    return len(layer.blocks) if layer.has_factors else 0


def square(tensor: Tensor) -> Tensor:
    """‖tensor‖², 0-d."""
    return norm_in_stretches(tensor.contiguous(), tensor.dtype).square()
