"""A model's initial values, drawn one tensor at a time, so that a rank can keep its shard alone.

The constructor runs on tensors without memory (fake ones of the CPU), and each operation on values
is noted. Played back in order on real tensors the same operations draw the same random numbers:
values are to the bit those of the model built on the CPU, in a world of any size. A tensor's memory
is held from where its value begins to count until its last operation, and what the next one
overwrites whole (torch's own initial values, mostly) is let go of in between.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_OVERWRITE: Final = frozenset({"copy_", "fill_", "normal_", "uniform_", "zero_"})
"""Operations after which no former value of a tensor is left."""

Put = Callable[[nn.Module, str, Tensor], None]
"""Takes a module's parameter, by name, and its whole value on the CPU, which is gone afterwards."""


class NotRecorded(Exception):
    """Why a model has to be built with its values."""


@dataclass(frozen=True)
class _View:
    """A tensor as a stretch of a storage."""

    storage: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    on_meta: bool

    def of(self, storage: torch.UntypedStorage) -> Tensor:
        empty = torch.empty(0, dtype=self.dtype)
        return empty.set_(storage, self.offset, self.shape, self.stride)


@dataclass
class _Call:
    """An operation, its tensors given as views."""

    function: Any
    args: Any
    kwargs: Any
    results: list[_View]
    ends: list[int] = field(default_factory=list)
    """Storages that nothing after it reads."""

    def storages(self) -> set[int]:
        parts = (self.args, self.kwargs, self.results)
        return {v.storage for v in tree_leaves(parts) if isinstance(v, _View) and not v.on_meta}

    def overwrites(self, storage: int, num_bytes: int) -> bool:
        """Whether it reads nothing of what `storage` held, and writes all of it."""
        if self.function.__name__.partition(".")[0] not in _OVERWRITE:
            return False
        first, *others = tree_leaves((self.args, self.kwargs))
        whole = first.shape.numel() * first.dtype.itemsize == num_bytes
        return whole and all(getattr(view, "storage", None) != storage for view in others)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's is not annotated
    """Notes each operation on values of fake tensors that say they are on the CPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # the same
        self.calls: list[_Call] = []
        self.storages: dict[int, torch.UntypedStorage] = {}

    def view(self, tensor: Tensor) -> _View:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage  # for as long as its number is to mean it
        return _View(
            storage._cdata, tensor.shape, tensor.stride(), int(tensor.storage_offset()),
            tensor.dtype, tensor.device.type == "meta",
        )  # fmt: skip

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = tree_leaves((args, kwargs))
        made = [self.view(t) for t in tree_leaves(result) if isinstance(t, FakeTensor)]
        if any(isinstance(value, torch.Generator) for value in given):
            raise NotRecorded("it draws from a generator of its own")
        if any(t.device.type not in ("cpu", "meta") for t in given if _is_fake(t)):
            raise NotRecorded("it is made on a device")
        writes = func._schema.is_mutable
        if writes and any(isinstance(t, Tensor) and not _is_fake(t) for t in given[:1]):
            raise NotRecorded("it writes into a tensor that was there before")
        held = {self.view(t).storage for t in given if _is_fake(t)}
        views_only = not writes and all(view.storage in held for view in made)
        if not views_only and not all(view.on_meta for view in made):
            args, kwargs = tree_map_only(FakeTensor, self.view, (args, kwargs))
            self.calls.append(_Call(func, args, kwargs, made))
        return result


def _is_fake(value: Any) -> bool:
    return isinstance(value, FakeTensor)


@dataclass(frozen=True)
class _Place:
    """Where a module keeps a tensor."""

    module: nn.Module
    kind: str
    """The module's dictionary that it is in: "_parameters", "_buffers" or "__dict__"."""
    name: str


class InitialValues:
    """What fills a model that `record` has made.

    Attributes:
        peak_bytes: that playing takes on the host at most.
    """

    def __init__(
        self, calls: list[_Call], num_bytes: dict[int, int], places: dict[_View, list[_Place]]
    ) -> None:
        self._calls, self._num_bytes = calls, num_bytes
        self._places: dict[int, list[tuple[_View, list[_Place]]]] = {}
        for view, at in places.items():
            self._places.setdefault(view.storage, []).append((view, at))
        self._random_state = torch.get_rng_state()
        self._find_ends()
        self.peak_bytes = max((sum(num_bytes[s] for s in held) for held in self._held()), default=0)

    def _find_ends(self) -> None:
        coming: dict[int, bool] = {}  # whether what is held is read by a later call
        for call in reversed(self._calls):
            for storage in call.storages():
                if not coming.get(storage, False):
                    call.ends.append(storage)
                coming[storage] = not call.overwrites(storage, self._num_bytes[storage])

    def _held(self) -> Iterator[set[int]]:
        held: set[int] = set()
        for call in self._calls:
            held |= call.storages()
            yield held
            held -= set(call.ends)

    @torch.no_grad()
    def play(self, put: Put, device: torch.device) -> None:
        """Hand every parameter's value to `put` as soon as it is there, and set all else.

        Torch's random numbers afterwards are those that follow a model built on the CPU.

        Args:
            device: buffers' own.
        """
        torch.set_rng_state(self._random_state)
        last = {storage: i for i, call in enumerate(self._calls) for storage in call.ends}
        live: dict[int, torch.UntypedStorage] = {}

        def real(view: _View) -> Tensor:
            if view.on_meta:
                return torch.empty_strided(view.shape, view.stride, dtype=view.dtype, device="meta")
            if view.storage not in live:
                num_bytes = self._num_bytes[view.storage]
                live[view.storage] = torch.empty(num_bytes, dtype=torch.uint8).untyped_storage()
            return view.of(live[view.storage])

        for i, call in enumerate(self._calls):
            args, kwargs = tree_map_only(_View, real, (call.args, call.kwargs))
            made = [t for t in tree_leaves(call.function(*args, **kwargs)) if type(t) is Tensor]
            for view, tensor in zip(call.results, made, strict=True):
                if not view.on_meta and view.storage not in live:
                    real(view).copy_(tensor)
            del args, kwargs, made
            for storage in call.ends:
                if last[storage] == i:
                    self._place(storage, live[storage], put, device)
                del live[storage]

    def _place(
        self, storage: int, value: torch.UntypedStorage, put: Put, device: torch.device
    ) -> None:
        for view, places in self._places.get(storage, []):
            tensor = view.of(value)
            for place in places:
                if place.kind == "_parameters":
                    put(place.module, place.name, tensor)
                    break  # tied ones are one
                kept = tensor.clone()
                kept = kept.to(device) if place.kind == "_buffers" else kept
                getattr(place.module, place.kind)[place.name] = kept


def record(make: Callable[[], nn.Module]) -> tuple[nn.Module, InitialValues]:
    """The model that `make` builds, on the meta device, and its values.

    Raises:
        NotRecorded: the constructor asks for values, or does what cannot be played back.
    """
    before, recorder = torch.get_rng_state(), _Recorder()
    try:
        with _no_fork(), FakeTensorMode(allow_non_fake_inputs=True), recorder:
            model = make()
    except Exception as error:
        why = str(error).partition("\n")[0]
        raise NotRecorded(f"{type(error).__name__}: {why}") from error
    if not torch.equal(before, torch.get_rng_state()):
        raise NotRecorded("it seeds or draws random numbers by itself")
    places = _strip(model, recorder)
    num_bytes = {number: storage.nbytes() for number, storage in recorder.storages.items()}
    return model, InitialValues(recorder.calls, num_bytes, places)


@contextmanager
def _no_fork() -> Iterator[None]:
    """Refuse, by `NotRecorded`, random numbers between brackets: no later state tells of them."""

    def refuse(*args: Any, **more: Any) -> Any:
        raise NotRecorded("it seeds or draws random numbers by itself")

    fork = torch.random.fork_rng
    torch.random.fork_rng = refuse
    try:
        yield
    finally:
        torch.random.fork_rng = fork


def _strip(model: nn.Module, recorder: _Recorder) -> dict[_View, list[_Place]]:
    """Put tensors of the meta device in the place of fake ones; returns where which was."""
    places: dict[_View, list[_Place]] = {}
    stripped: dict[_View, Tensor] = {}
    for module in model.modules():
        for kind in ("_parameters", "_buffers", "__dict__"):
            held = getattr(module, kind)
            for name, tensor in list(held.items()):
                if not isinstance(tensor, Tensor):
                    if (
                        kind == "__dict__"
                        and name[:1] != "_"
                        and any(map(_is_fake, tree_leaves(tensor)))
                    ):
                        raise NotRecorded(f"{type(module).__name__}.{name} holds tensors")
                    continue
                if not _is_fake(tensor):
                    raise NotRecorded(f"{type(module).__name__}.{name} was there before")
                view = recorder.view(tensor)
                if view.on_meta:
                    raise NotRecorded(f"{type(module).__name__}.{name} has no values")
                if view not in stripped:
                    bare: Tensor = torch.empty_strided(
                        view.shape, view.stride, dtype=view.dtype, device="meta"
                    )
                    if kind == "_parameters":
                        bare = nn.Parameter(bare, tensor.requires_grad)
                    stripped[view] = bare
                held[name] = stripped[view]
                places.setdefault(view, []).append(_Place(module, kind, name))
    return places
