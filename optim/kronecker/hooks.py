"""The hooks by which a model's layers are watched."""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import nn
from torch._compile import _disable_dynamo
from torch.utils.hooks import RemovableHandle

from largebatch.optim.kronecker.layers import Layer


def remove(handles: Mapping[Layer | None, Iterable[RemovableHandle]]) -> None:
    for some in handles.values():
        for handle in some:
            handle.remove()


class Watcher(Protocol):
    """What a hook calls: at least this, and the method that it was given the name of."""

    def see_forward(self, layer: Layer, given: Any, output: Any) -> None: ...


class Hook:
    """A hook that keeps neither the statistics alive nor goes along with a copied model."""

    def __init__(self, statistics: Watcher | None, method: str, layer: Layer | None = None) -> None:
        self._statistics = None if statistics is None else weakref.ref(statistics)
        self._method, self._layer = method, layer

    @_disable_dynamo  # in a compiled model it runs between two graphs
    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        statistics = None if self._statistics is None else self._statistics()
        if statistics is None:
            return
        if self._layer is not None:
            kwargs, output = rest
            statistics.see_forward(self._layer, args[0] if args else kwargs["input"], output)
        else:
            getattr(statistics, self._method)(*rest)

    def __reduce__(self) -> tuple[type["Hook"], tuple[None, str]]:
        return Hook, (None, "")
