"""From a configuration's `_target_` to the object, the user's mistakes told in one sentence."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from largebatch.conf.errors import ConfigError, sentence


def build(node: Mapping[str, Any], name: str, **more: Any) -> Any:
    """What `node` describes, built with its own keys and `more`; a partial where `_partial_` is
    set.

    Raises:
        ConfigError: a target that cannot be imported, does not take its arguments, or raises a
            ValueError on them. Other errors of a target are its own and pass through.
    """
    try:
        make: partial[Any] = instantiate(dict(node) | {"_partial_": True}, _convert_="all")
    except InstantiationException as error:
        raise ConfigError(f"{name}: {sentence(error)}") from error
    if node.get("_partial_"):
        return make
    check_arguments(make.func, (), make.keywords | more, name)
    try:
        return make(**more)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_arguments(
    target: Callable[..., Any], positional: Sequence[Any], keywords: Mapping[str, Any], name: str
) -> None:
    """Refuse keys that `target` does not take, or the lack of some that it needs."""
    try:
        inspect.signature(target).bind(*positional, **keywords)
    except TypeError as error:
        called = getattr(target, "__qualname__", str(target))
        raise ConfigError(f"{name}: {called} does not take these keys: {error}") from error
