"""Nested mappings, such as configurations, by dotted names."""

from collections.abc import Mapping
from typing import Any


def flattened(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return the leaves of a configuration by their full names, which `above` stands in front of.

    >>> flattened({"optim": {"lr": 0.1}, "clip_norm": None})
    {'optim.lr': 0.1, 'clip_norm': None}
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flattened(value, f"{above}{key}.")
        else:
            found[f"{above}{key}"] = value
    return found
