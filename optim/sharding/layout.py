"""Where a model's layers lie: what part of which layer a local tensor holds, and who has the rest.

A layer is what gets one trust ratio: a parameter tensor as the model's author wrote it, or one part
of a fused one. A rank may hold all of it, a shard of it (DTensor), a fragment within a flat buffer
with others (DeepSpeed ZeRO), or nothing. Optimizers compute on local tensors only; a `Layout` says
how their sums of squares become those of the layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor
from torch.nn import Parameter

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

Name = str | int

# What is certainly no DTensor, found by looking and not by asking.
PLAIN = (Tensor, Parameter)


@dataclass(frozen=True)
class Piece:
    """A stretch of a local tensor, `tensor.narrow(dim, start, length)`, that lies in one layer."""

    layer: int
    """Index into `Layout.layers`."""
    start: int
    length: int
    dim: int = 0


@dataclass(frozen=True)
class Reduction:
    """A sum over the ranks of `group`, or, where they hold copies of one another, the mean."""

    group: "ProcessGroup"
    mean: bool = False


@dataclass(frozen=True)
class Layout:
    """How one parameter of an optimizer, as this rank holds it, is made of layers."""

    layers: tuple[Name, ...]
    """Names of the layers, the same on every rank of the reductions, whether held here or not."""
    pieces: tuple[Piece, ...] | None = None
    """What is held here, at most one piece a layer; None: the local tensor is the one layer."""
    reductions: tuple[Reduction, ...] = ()
    """In this order they turn the local sums of squares into those of the whole layers."""


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, a view; any other tensor itself."""
    if type(tensor) in PLAIN:
        return tensor
    to_local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def is_dtensor(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Say whether the tensor is a DTensor: one with a mesh and placements."""
    # Asked by its method: importing DTensor would cost every user of a plain model half a second.
    return hasattr(tensor, "to_local")


def layout_of(
    param: Tensor, name: Name, norm_groups: int | Sequence[int] | None = None, norm_dim: int = 0
) -> Layout:
    """The layout of a plain or DTensor parameter, of any mesh and any placements but Partial.

    Args:
        norm_groups: number of equal parts, or their sizes, that `norm_dim` is split into, each a
            layer of its own.

    Raises:
        ValueError: a split that does not fit the tensor, or a placement whose norm is not known.
    """
    reductions = _reductions(param, name)
    if norm_groups is None:
        return Layout((name,), None, reductions)
    sizes = split_sizes(param.shape, name, norm_groups, norm_dim)
    norm_dim %= param.dim()
    first, length = _held(param, name, norm_dim)
    pieces = []
    for layer, (start, end) in enumerate(pairwise(accumulate(sizes, initial=0))):
        begin, stop = max(start, first), min(end, first + length)
        if begin < stop:
            pieces.append(Piece(layer, begin - first, stop - begin, norm_dim))
    names = tuple(f"{name}[{layer}]" for layer in range(len(sizes)))
    return Layout(names, tuple(pieces), reductions)


def split_sizes(
    shape: Sequence[int], name: Name, norm_groups: int | Sequence[int], norm_dim: int
) -> tuple[int, ...]:
    """Sizes along `norm_dim` of the layers that a tensor of this shape is split into.

    Raises:
        ValueError: the dimension does not exist or does not split so.
    """
    if not -len(shape) <= norm_dim < len(shape):
        raise ValueError(
            f"norm_dim must be a dimension of parameter {name!r} of shape {tuple(shape)}, "
            f"got {norm_dim}"
        )
    length = shape[norm_dim]
    if isinstance(norm_groups, int):
        if norm_groups < 1 or length % norm_groups:
            raise ValueError(
                f"norm_groups must divide dimension {norm_dim} of parameter {name!r}, which has "
                f"length {length}, got {norm_groups}: a tuple gives unequal sizes"
            )
        return (length // norm_groups,) * norm_groups
    if sum(norm_groups) != length or min(norm_groups) < 1:
        raise ValueError(
            f"norm_groups must be sizes >= 1 that add up to {length}, dimension {norm_dim} of "
            f"parameter {name!r}, got {tuple(norm_groups)}"
        )
    return tuple(norm_groups)


def _reductions(param: Tensor, name: Name) -> tuple[Reduction, ...]:
    """Sums over the mesh dimensions that shard, then means over those that replicate.

    The mean is that of equal numbers, up to the order in which their sums were taken: with it,
    replicas use one number, and cannot drift apart where a sum is not reproducible to the bit.
    """
    if not is_dtensor(param):
        return ()
    mesh: Any = param.device_mesh
    sums: list[Reduction] = []
    means: list[Reduction] = []
    for dimension, placement in enumerate(param.placements):
        if placement.is_partial():
            raise ValueError(
                f"parameter {name!r} is placed as {placement}: its ranks hold summands of it, "
                "shard or replicate it instead"
            )
        if mesh.size(dimension) > 1:
            replicated = placement.is_replicate()
            reduction = Reduction(mesh.get_group(dimension), mean=replicated)
            (means if replicated else sums).append(reduction)
    return (*sums, *means) if sums else ()


def _held(param: Tensor, name: Name, dim: int) -> tuple[int, int]:
    """Where along `dim` this rank's part begins in the whole tensor, and its length."""
    if not is_dtensor(param):
        return 0, param.shape[dim]
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh: Any = param.device_mesh
    placements = param.placements
    strange = [p for p in placements if not p.is_replicate() and type(p) is not Shard]
    if strange:
        raise ValueError(
            f"norm_groups cannot split parameter {name!r}, placed as {strange[0]}: its rows are "
            "interleaved over the ranks; shard it along one mesh dimension or another tensor "
            "dimension"
        )
    shape, offset = compute_local_shape_and_global_offset(param.shape, mesh, placements)
    return offset[dim], shape[dim]
