"""Figures of how far what the ranks have found is from what one process has found."""

from collections.abc import Iterable, Sequence

import torch
from gloo_ranks import Outcome
from parity_cells import Cell, same_bits
from parity_layouts import LAYOUTS
from torch import Tensor


def relative(one: Tensor, other: Tensor) -> float:
    """‖one - other‖ / ‖other‖, and ‖one‖ where other is zero."""
    one, other = one.double(), other.double()
    norm = other.norm()
    return float((one - other).norm() / (norm if norm > 0 else 1.0))


def ulps(one: Tensor, other: Tensor) -> float:
    """Largest number of bf16 values between two elements."""
    ordered = []
    for tensor in (one, other):
        assert tensor.dtype == torch.bfloat16
        bits = tensor.view(torch.int16).int()
        ordered.append(torch.where(bits < 0, -(bits & 0x7FFF), bits))
    return float((ordered[0] - ordered[1]).abs().max())


def merged(outcomes: Sequence[Outcome], key: str) -> dict[str, Tensor]:
    """All ranks' tensors: a rank of ZeRO-redundancy has state for its own parameters only."""
    tensors: dict[str, Tensor] = {}
    for outcome in outcomes:
        tensors |= outcome[key]
    return tensors


def difference(cell: Cell, outcomes: Sequence[Outcome], reference: Outcome) -> dict[str, float]:
    """Figures by kind: of the bf16 weights, of all other tensors, and of the layers' statistics."""
    ours, theirs = merged(outcomes, "tensors"), reference["tensors"]
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype for name in ours)
    low = [name for name in ours if ours[name].dtype == torch.bfloat16]
    for outcome in outcomes if not LAYOUTS[cell.layout].redundancy else ():
        assert outcome["stats"].keys() == reference["stats"].keys()
    stats = merged(outcomes, "stats")
    assert stats.keys() == reference["stats"].keys()
    return {
        "ulps": worst(ulps(ours[name], theirs[name]) for name in low),
        "relative": worst(relative(ours[name], theirs[name]) for name in ours if name not in low),
        "stats": worst(relative(stats[name], reference["stats"][name]) for name in stats),
    }


def worst(figures: Iterable[float]) -> float:
    """The largest, or NaN where there is one; 0 where there are none."""
    return float(torch.tensor([0.0, *figures], dtype=torch.float64).max())


def assert_copies_are_bit_identical(outcomes: Sequence[Outcome]) -> int:
    """Ranks that hold the same elements hold the same bits; returns how many pairs there were."""
    held: dict[tuple[str, tuple[int, ...]], Tensor] = {}
    pairs = 0
    for outcome in outcomes:
        for name, (shard, tensor) in outcome["copies"].items():
            if (name, shard) in held:
                assert same_bits(held[name, shard], tensor), (name, shard)
                pairs += 1
            held[name, shard] = tensor
    return pairs
