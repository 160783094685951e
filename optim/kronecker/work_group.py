"""Which ranks hold a model's layers, who of them works on which, and what they have in common."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from largebatch.optim.kronecker.damping import Roots, precondition
from largebatch.optim.kronecker.layers import FactorSums, Layer
from largebatch.optim.math.tensors import is_finite, root
from largebatch.optim.sharding.layout import local
from largebatch.optim.sharding.placement import Placement
from largebatch.optim.sharding.redistribution import WorkGroup
from largebatch.optim.sharding.rounds import whole
from largebatch.optim.sharding.work_assignment import assign

NUMBERS = ("weight", "grafted", "gradient", "update", "product", "scale", "condition")


class LayerSums:
    """Sums over the ranks of a work group for each layer, mostly squared norms; FP32 or wider."""

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype, device: torch.device) -> None:
        self._rows = {layer: row for row, layer in enumerate(layers)}
        self.table = torch.zeros(len(layers), len(NUMBERS), dtype=dtype, device=device)
        """(layers, NUMBERS)."""

    def add(self, layer: Layer, number: str, value: Tensor) -> None:
        self.table[self._rows[layer], NUMBERS.index(number)] += value

    def of(self, layer: Layer) -> dict[str, Tensor]:
        row = self.table[self._rows[layer]]
        return dict(zip(NUMBERS, row.unbind(), strict=True))


class KroneckerWorkGroup(WorkGroup[Layer]):
    """Ranks that average their gradients, and the layers whose parameters they share.

    Attributes:
        owners: who has the factors and inverses of each layer, by rank in the group.
        owned: the layers that are this rank's work.
        slots: when in an interval each layer is decomposed.
        copies: how many ranks hold the same part of a parameter.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        placements: Mapping[Tensor, Placement],
        slots: Mapping[Layer, int],
    ) -> None:
        self.slots = {layer: slots[layer] for layer in layers}
        self.placements = placements
        self.params = [param for layer in layers for param in layer.params]
        self.copies = {param: len(set(placements[param].copies)) for param in self.params}
        group = placements[self.params[0]].group
        num_ranks, me = (1, 0) if group is None else (group.size(), group.rank())
        owners = assign([*map(cost, layers)], num_ranks, rounds=[*self.slots.values()])
        self.owners = dict(zip(layers, owners, strict=True))
        self.owned = [layer for layer, owner in self.owners.items() if owner == me]
        tensors = [
            whole(placements[param], owner)
            for layer, owner in self.owners.items()
            for param in layer.params
        ]
        super().__init__(layers, tensors, local(self.params[0]).device)

    def add_up(
        self, sums: Mapping[Layer, FactorSums], items: int
    ) -> tuple[Mapping[Layer, FactorSums], Tensor]:
        """The sums and the items, 0-d, of all ranks; in one collective, and of symmetric sums a
        triangle travels.
        """
        if self.group is None:
            return sums, torch.full((), float(items), device=self.device)
        parts = [torch.full((1,), float(items), dtype=self.dtype, device=self.device)]
        for layer in self.layers:
            found = sums.get(layer)
            parts += (
                [torch.zeros(_packed_size(layer), dtype=self.dtype, device=self.device)]
                if found is None
                else [found.positions.reshape(1), _packed(found.inputs), _packed(found.outputs)]
            )
        vector = torch.cat([part.to(self.dtype) for part in parts])
        dist.all_reduce(vector, group=self.group)
        total, at = {}, 1
        for layer in self.layers:
            end = at + _packed_size(layer)
            if layer in self.owned:
                total[layer] = _unpacked(layer, vector[at:end])
            at = end
        return total, vector[0]

    def precondition(
        self,
        gradients: Mapping[Tensor, Tensor | None],
        roots: Mapping[Layer, Roots],
        numbers: LayerSums,
        failed: Tensor,
    ) -> tuple[Iterator[tuple[Tensor, Tensor]], Tensor]:
        """This rank's part of every layer's preconditioned gradient by its `scale`, a power of two
        that keeps its squares from under- and overflow; by parameter, one at a time, and all of
        them to be taken before another collective; and `failed` of all ranks.

        Args:
            gradients: the local part of each of `params`; None counts as zeros.
            roots: of the owned layers; one that is missing has zeros for a result.
            numbers: of this rank alone; afterwards, with the layers' own, of all.
            failed: counts that are to be added up over the ranks.
        """
        whole, _ = self.redistribution.to_owners([gradients[param] for param in self.params])
        blocks = dict(zip(self.params, whole, strict=True))
        results: dict[Tensor, Mapping[int, Tensor]] = {param: {} for param in self.params}
        for layer in roots:
            gradient = layer.matrices([blocks[param][0] for param in layer.params])
            update = precondition(roots[layer], gradient)
            # What FP32 does not hold is no step; a gradient that is no number stays one.
            usable = is_finite(update) | ~is_finite(gradient)
            update, scale = normalised(torch.where(usable, update, 0.0))
            numbers.add(layer, "scale", scale)
            numbers.add(layer, "gradient", gradient.square().sum())
            numbers.add(layer, "update", update.square().sum())
            numbers.add(layer, "product", (update * gradient).sum())
            for param, tensor in zip(layer.params, layer.tensors(update), strict=True):
                results[param] = {0: tensor}
        ours = torch.cat([numbers.table.view(-1), failed.to(numbers.table)])
        pieces, sums = self.redistribution.to_holders([*results.values()], ours)
        assert sums is not None
        table, failed = torch.split(sums, [numbers.table.numel(), failed.numel()])
        # A sum of squares that has overflown is large and not infinite: ratios stay numbers.
        numbers.table = table.view_as(numbers.table).clamp(max=torch.finfo(table.dtype).max)
        parts = self.redistribution.joined(pieces)
        return ((self.params[index], part) for index, part in parts), failed


def normalised(update: Tensor) -> tuple[Tensor, Tensor]:
    """The tensor divided, in place, by a power of two such that its largest element is between 1/2
    and 1, and that power, 0-d: 1 for one of zeros or with numbers that are none."""
    least, most = torch.aminmax(update)
    _, exponent = torch.frexp(torch.maximum(-least, most))
    scale = torch.ldexp(torch.ones_like(most), exponent)
    scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)
    return update.div_(scale), scale


def make_work_groups(
    layers: Sequence[Layer], placements: Mapping[Tensor, Placement], interval: int
) -> list[KroneckerWorkGroup]:
    """Group layers by the ranks that they lie over, with slots in an interval by their costs."""
    # Over all work groups: the steps at which a layer is decomposed depend on its costs alone.
    slots = dict(zip(layers, assign([*map(cost, layers)], interval), strict=True))
    groups = {layer: placements[layer.weight].group for layer in layers}
    work_groups = []
    for group in {id(group): group for group in groups.values()}.values():
        members = [layer for layer in layers if groups[layer] is group]
        work_groups.append(KroneckerWorkGroup(members, placements, slots))
    return work_groups


def cost(layer: Layer) -> float:
    """Multiplications of decomposing a layer's factors, up to a factor."""
    sizes = [(layer.inputs, layer.diagonal_in), (layer.outputs, layer.diagonal_out)]
    return float(layer.groups * sum(size if diagonal else size**3 for size, diagonal in sizes))


def _triangle(factors: Tensor) -> Tensor:
    size = factors.shape[-1]
    return torch.triu_indices(size, size, device=factors.device)


def _packed(factors: Tensor) -> Tensor:
    if factors.dim() == 2:
        return factors.reshape(-1)
    rows, columns = _triangle(factors)
    return factors[:, rows, columns].reshape(-1)


def _packed_size(layer: Layer) -> int:
    sizes = [(layer.inputs, layer.diagonal_in), (layer.outputs, layer.diagonal_out)]
    return 1 + layer.groups * sum(
        size if diagonal else size * (size + 1) // 2 for size, diagonal in sizes
    )


def _unpacked(layer: Layer, vector: Tensor) -> FactorSums:
    found, at = [], 1
    for shape in (layer.shape_in, layer.shape_out):
        factors = vector.new_zeros(shape)
        if len(shape) == 2:
            end = at + factors.numel()
            factors.copy_(vector[at:end].view(shape))
        else:
            rows, columns = _triangle(factors)
            end = at + shape[0] * len(rows)
            factors[:, rows, columns] = vector[at:end].view(shape[0], -1)
            factors += factors.triu(1).mT
        found.append(factors.to(layer.dtype))
        at = end
    return FactorSums(found[0], found[1], vector[0].to(layer.dtype))


@dataclass(frozen=True)
class Move:
    """What a work group's layers are to be moved by."""

    parts: Iterator[tuple[Tensor, Tensor]]
    """U of each parameter by its layer's scale, as far as it lies here; to be taken by every rank,
    group after group."""
    numbers: LayerSums
    ratios: Mapping[Layer, Tensor]
    """r of each layer, times its scale."""


def stats_of(numbers: Mapping[str, Tensor], ratio: Tensor) -> dict[str, Tensor]:
    norms = numbers["update"] * numbers["gradient"]
    return {
        "weight_norm": root(numbers["weight"]),
        "update_norm": ratio * root(numbers["update"]),
        "trust_ratio": ratio / torch.where(numbers["scale"] > 0, numbers["scale"], 1.0),
        "cosine": torch.where(norms > 0, numbers["product"] * norms.rsqrt(), 0.0),
        "condition_number": numbers["condition"],
    }
