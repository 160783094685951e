"""Many decompositions at once, where they are best made.

CPUs and CUDA have eigendecompositions, QR and Cholesky factors of their own. XPU has not (eigh, qr
and cholesky in torch-xpu-ops' XPUFallback.template): torch takes each matrix to the host, and the
result back, and the host waits for the device each time; asking whether it has succeeded waits
once more. So where the device has none,

- inverse roots and damped inverses are made there by matrix products (`ByProducts`), those of one
  size together. The host waits for one answer, which of them hold;
- all else, and what does not hold, goes to the host in one piece, is decomposed there by the same
  functions, and comes back in one piece: the host waits once in a step that takes bases, in place
  of several times a matrix.

The step waits for it. To continue meanwhile with the roots of before is another algorithm, the same
on every device and machine: `Beside`, for optimizers with `refresh="beside"`.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from threading import Lock, Thread, main_thread
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from largebatch.optim.math.matrix_roots import LEFT, RootError, smallest_square
from largebatch.optim.sharding.step_counts import Arriving

log = logging.getLogger("largebatch.optim.decompositions")

Result = TypeVar("Result")

REFRESHES = ("in_step", "beside")
"""When what is decomposed in a step comes into use: in it, or at the next refresh."""

Outcome = Callable[[], Result]
"""Returns the result of a decomposition, or raises its `RootError`."""

DECOMPOSE = frozenset({"cpu", "cuda"})
"""Types of devices with decompositions of their own."""

STRETCH = 1 << 28
"""Bytes that travel in one piece, about: a copy of them is on the device and on the host."""

BATCH = 1 << 25
"""Bytes of which roots are made by products at once, about: they take eight times as many."""


class ByProducts(NamedTuple):
    """How decompositions of one kind are made by matrix products alone, many at once."""

    kind: Hashable
    """Equal for those that may be made together; shapes are a part of it."""
    compute: Callable[[Sequence[Sequence[Tensor]]], tuple[Sequence[Any], Tensor]]
    """From the tensors of each their results, and which of these hold, (count,) bool; all on the
    device, which is not waited for."""


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
    by_products: ByProducts | None = None
    """Another way to the same result, up to rounding."""

    def __call__(self) -> Result:
        return self.compute(*self.tensors())


def decompose(asked: Sequence[Decomposition[Any]]) -> list[Outcome[Any]]:
    """The outcome of each, in order; all of one device."""
    if not asked or asked[0].device.type in DECOMPOSE:
        return [*asked]
    device = asked[0].device
    outcomes = _made_by_products(asked)
    others = [number for number in range(len(asked)) if number not in outcomes]
    for some in _stretches(others, [asked[number] for number in others], STRETCH):
        _say_once(f"Decomposed on the host, which waits for it: what {device.type} cannot make.")
        found = _on_host([*some.values()], device)
        outcomes |= dict(zip(some, found, strict=True))
    return [outcomes[number] for number in range(len(asked))]


class Beside:
    """Decompositions on the host, in a thread beside the steps.

    What `begin` was told under a key, `take` returns: when a result comes into use depends on steps
    alone, never on how fast the host is, which is waited for if need be.

    All of it is in FP64. A thread beside a forward pass must not change the precision of products,
    which is the process's, and in FP64 there is nothing to change.

    What still waits for its turn when the process ends is not made: a job that is told to stop has
    no minutes for it. Pools of threads make all of it first.
    """

    def __init__(self) -> None:
        self._under_way: dict[Hashable, Future[list[Any]]] = {}
        self._waiting: deque[tuple[Future[list[Any]], _Sent]] = deque()
        self._lock, self._is_at_work = Lock(), False

    def begin(self, key: Hashable, asked: Sequence[Decomposition[Any]]) -> None:
        """Set off decompositions; the device is not waited for.

        On a CPU the tensors are not copied: they keep their values until `take`.
        """
        sent = [(each.compute, [*map(Arriving, each.tensors())]) for each in asked]
        future = self._under_way[key] = Future[list[Any]]()
        with self._lock:
            self._waiting.append((future, sent))
            if not self._is_at_work:
                self._is_at_work = True
                Thread(target=self._work, name="decompositions").start()

    def _work(self) -> None:
        """Make what waits, in order, in a thread of its own, until nothing does."""
        while True:
            with self._lock:
                if not self._waiting or not main_thread().is_alive():
                    self._is_at_work = False
                    return
                future, sent = self._waiting.popleft()
            if not future.set_running_or_notify_cancel():  # forgotten
                continue
            try:
                future.set_result(_made(sent))
            except BaseException as error:  # whatever it is, who takes the result raises it
                future.set_exception(error)

    def take(self, key: Hashable, asked: Sequence[Decomposition[Any]]) -> list[Outcome[Any]]:
        """The outcomes of what has begun under a key, once; made now where nothing has, as after
        a state was loaded.
        """
        if key not in self._under_way:
            self.begin(key, asked)
        found = self._under_way.pop(key).result()
        return [_placed(each, ask.device) for each, ask in zip(found, asked, strict=True)]

    def forget(self, key: Hashable | None = None) -> None:
        """Let go of what has begun under a key, or of all."""
        for each in [*self._under_way] if key is None else [key]:
            future = self._under_way.pop(each, None)
            if future is not None:
                future.cancel()


_Sent = Sequence[tuple[Callable[..., Any], Sequence[Arriving]]]


@torch.no_grad()
def _made(sent: _Sent) -> list[Any]:
    return [_in_fp64(compute, [each.wait() for each in arriving]) for compute, arriving in sent]


def _in_fp64(compute: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
    """Its results in the tensors' own dtype, or the error where that does not hold them."""
    dtype = tensors[0].dtype
    wide = []
    for tensor in tensors:
        # What is zero in its own dtype is not a matter of rounding in a wider one.
        nothing = tensor.abs().amax() < smallest_square(dtype)
        wide.append(torch.where(nothing, 0.0, tensor.to(torch.float64)))
    found = _attempted(compute, wide)
    if isinstance(found, RootError):
        return found
    parts = [part.to(dtype) if part.is_floating_point() else part for part in _parts_of(found)]
    if not all(bool(part.isfinite().all()) for part in parts):
        return RootError("a decomposition has left numbers that its dtype does not hold", LEFT)
    return _like(found, parts)


def _placed(found: Any, device: torch.device) -> Outcome[Any]:
    """What the host has found, on the device, which is not waited for."""
    parts = [] if isinstance(found, RootError) else _parts_of(found)
    return _outcome(found, iter(parts if device.type == "cpu" else _uploaded(parts, device)))


class _Ready(NamedTuple):
    compute: Callable[..., Any]
    tensors: Sequence[Tensor]


def _stretches(
    numbers: Sequence[int], asked: Sequence[Decomposition[Any]], size: int
) -> Iterator[dict[int, _Ready]]:
    """Those asked, by their numbers, in pieces of about `size` bytes."""
    some: dict[int, _Ready] = {}
    for number, each in zip(numbers, asked, strict=True):
        some[number] = _Ready(each.compute, each.tensors())
        if sum(tensor.nbytes for ready in some.values() for tensor in ready.tensors) >= size:
            yield some
            some = {}
    if some:
        yield some


@cache
def _say_once(text: str) -> None:
    """Whatever is decided by the device; once in a process."""
    log.info(text)


def _made_by_products(asked: Sequence[Decomposition[Any]]) -> dict[int, Outcome[Any]]:
    """The outcomes that hold of those that can be made so, by their numbers among all."""
    alike: dict[Hashable, list[int]] = {}
    for number, each in enumerate(asked):
        if each.by_products is not None:
            alike.setdefault(each.by_products.kind, []).append(number)
    results: dict[int, Any] = {}
    hold: list[Tensor] = []
    for numbers in alike.values():
        way = asked[numbers[0]].by_products
        assert way is not None
        for some in _stretches(numbers, [asked[number] for number in numbers], BATCH):
            found, holds = way.compute([ready.tensors for ready in some.values()])
            results |= dict(zip(some, found, strict=True))
            hold.append(holds)
    if not results:
        return {}
    _say_once(f"Inverse roots by matrix products: {asked[0].device.type} has no decompositions.")
    held = Arriving(torch.cat(hold)).wait().tolist()
    if not all(held):
        _say_once("Some roots by matrix products do not hold, and are decomposed after all.")
    return {
        number: partial(results.__getitem__, number)
        for number, holds in zip(results, held, strict=True)
        if holds
    }


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
    whole = _like(found, [*islice(uploaded, len(_parts_of(found)))])
    return lambda: whole


def _like(found: Any, parts: Sequence[Tensor]) -> Any:
    return dict(zip(found, parts, strict=True)) if isinstance(found, dict) else type(found)(*parts)


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
