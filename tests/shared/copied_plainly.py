"""Nodes of configurations copied attribute by attribute, not by the ways that `copy` has for all.

A command copies its whole configuration a few times, some hundred nodes; the suite composes
thousands of times. The copies are OmegaConf's own, in a third of the time.
"""

from collections import defaultdict
from copy import deepcopy
from typing import Any

from omegaconf import nodes
from omegaconf.base import Metadata

PLAIN: tuple[Any, ...] = (
    nodes.AnyNode, nodes.BooleanNode, nodes.BytesNode, nodes.FloatNode, nodes.IntegerNode,
    nodes.PathNode, nodes.StringNode,
)  # fmt: skip
"""Those that are made without arguments."""

ITS_OWN = {kind: kind.__deepcopy__ for kind in PLAIN}


def set_up() -> None:
    """Let this process copy so."""
    Metadata.__deepcopy__ = _metadata  # type: ignore[attr-defined]  # it has none of its own
    for kind in PLAIN:
        kind.__deepcopy__ = _node


def _metadata(self: Any, memo: dict[int, Any]) -> Any:
    made = object.__new__(type(self))
    made.__dict__.update(self.__dict__)
    made.flags = None if self.flags is None else dict(self.flags)
    cache = self.resolver_cache
    made.resolver_cache = deepcopy(cache, memo) if cache else defaultdict(dict)
    return made


def _node(self: Any, memo: dict[int, Any]) -> Any:
    """As there: the value itself, and the parent, which a copy of that puts right."""
    made = object.__new__(type(self))
    made.__dict__.update(self.__dict__)
    made.__dict__["_metadata"] = _metadata(self.__dict__["_metadata"], memo)
    made.__dict__["_flags_cache"] = None
    return made
