"""Many decompositions at once, where they are best made.

CPUs and CUDA have eigendecompositions, QR and Cholesky factors of their own. XPU has not (eigh, qr
and cholesky in torch-xpu-ops' XPUFallback.template): torch takes each matrix to the host, and the
result back, and the host waits for the device each time; asking whether it has succeeded waits
once more. So where the device has none, all that a step has to decompose goes to the host in one
piece, is decomposed there by the same functions, and comes back in one piece: the host waits once
in a step that takes roots or bases, in place of several times a matrix.

The step waits for it. To continue meanwhile with the roots of before would be another algorithm.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from largebatch.optim.math.matrix_roots import RootError
from largebatch.optim.sharding.step_counts import Arriving

Result = TypeVar("Result")
Outcome = Callable[[], Result]
"""Returns the result of a decomposition, or raises its `RootError`."""

DECOMPOSE = frozenset({"cpu", "cuda"})
"""Types of devices with decompositions of their own."""

STRETCH = 1 << 28
"""Bytes that travel in one piece, about: a copy of them is on the device and on the host."""


@dataclass(frozen=True)
class Decomposition(Generic[Result]):
    """What is to be decomposed, and how: `compute(*tensors())`, a tuple or a dict of tensors.

    `compute` works on any device, and raises nothing but `RootError`. `tensors` is called when it
    is their turn: those of all layers at once would be as much memory again as the factors.
    """

    compute: Callable[..., Result]
    tensors: Callable[[], Sequence[Tensor]]
    device: torch.device
    """Where the tensors lie."""

    def __call__(self) -> Result:
        return self.compute(*self.tensors())


def decompose(asked: Sequence[Decomposition[Any]]) -> list[Outcome[Any]]:
    """The outcome of each, in order; all of one device."""
    if not asked or asked[0].device.type in DECOMPOSE:
        return [*asked]
    return [outcome for some in _stretches(asked) for outcome in _on_host(some, asked[0].device)]


class _Ready(NamedTuple):
    compute: Callable[..., Any]
    tensors: Sequence[Tensor]


def _stretches(asked: Sequence[Decomposition[Any]]) -> Iterator[list[_Ready]]:
    some: list[_Ready] = []
    for each in asked:
        some.append(_Ready(each.compute, each.tensors()))
        if sum(tensor.nbytes for ready in some for tensor in ready.tensors) >= STRETCH:
            yield some
            some = []
    if some:
        yield some


def _on_host(asked: Sequence[_Ready], device: torch.device) -> list[Outcome[Any]]:
    tensors = iter(_downloaded([tensor for each in asked for tensor in each.tensors]))
    found = [_attempted(each.compute, [*islice(tensors, len(each.tensors))]) for each in asked]
    parts = [part for each in found if not isinstance(each, RootError) for part in _parts_of(each)]
    uploaded = iter(_uploaded(parts, device))
    return [_outcome(each, uploaded) for each in found]


def _attempted(compute: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
    try:
        return compute(*tensors)
    except RootError as error:
        return error


def _outcome(found: Any, uploaded: Iterator[Tensor]) -> Outcome[Any]:
    if isinstance(found, RootError):
        error = found

        def failed() -> Any:
            raise error

        return failed
    parts = [*islice(uploaded, len(_parts_of(found)))]
    whole = dict(zip(found, parts, strict=True)) if isinstance(found, dict) else type(found)(*parts)
    return lambda: whole


def _parts_of(found: Any) -> list[Tensor]:
    return [*found.values()] if isinstance(found, Mapping) else [*found]


def _downloaded(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies on the host, for which the device is waited for once."""
    flats = [torch.cat([tensors[i].reshape(-1) for i in same]) for same in _by_dtype(tensors)]
    arriving = [Arriving(flat) for flat in flats]
    return _unpacked(tensors, [each.wait() for each in arriving])


def _uploaded(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies on the device, which nothing waits for."""
    flats = []
    for same in _by_dtype(tensors):
        parts = [tensors[i].reshape(-1) for i in same]
        size = sum(part.numel() for part in parts)
        flat = torch.empty(size, dtype=parts[0].dtype, device=device)
        torch.cat(parts, out=(pinned := torch.empty_like(flat, device="cpu", pin_memory=True)))
        flats.append(flat.copy_(pinned, non_blocking=True))
    # Each in a storage of its own: one that is kept must not keep the others.
    return [tensor.clone() for tensor in _unpacked(tensors, flats)]


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The indices of the tensors of each dtype."""
    indices: dict[torch.dtype, list[int]] = {}
    for index, tensor in enumerate(tensors):
        indices.setdefault(tensor.dtype, []).append(index)
    return [*indices.values()]


def _unpacked(like: Sequence[Tensor], flats: Sequence[Tensor]) -> list[Tensor]:
    """Views in the shapes of `like` into what lies packed by dtype."""
    views: dict[int, Tensor] = {}
    for same, flat in zip(_by_dtype(like), flats, strict=True):
        sizes = [math.prod(like[i].shape) for i in same]
        for i, part in zip(same, torch.split(flat, sizes), strict=True):
            views[i] = part.view(like[i].shape)
    return [views[i] for i in range(len(like))]
