"""From a configuration's `_target_` to the object, the user's mistakes in one sentence.

All that can be known of a key without building is known here, once: whether the target takes it,
and whether its value fits the annotation. What a constructor of this package's or of torch's raises
on a value is the user's to read as a sentence; an error in a class of the user's own is an error.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from functools import partial
from typing import Any, Final

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from largebatch.common.errors import ConfigError, format_config_error
from largebatch.common.memory import ran_out
from largebatch.common.text import one_line
from largebatch.conf.annotations import Unfit, annotations_of, fitted, in_yaml

_KNOWN: Final = ("largebatch", "torch")
"""Packages whose constructors refuse values: what they raise is about a value."""


def build(node: Mapping[str, Any], name: str, kind: Any = object, **more: Any) -> Any:
    """What `node` describes, built with its own keys and `more`; a partial where `_partial_` is
    set.

    Args:
        kind: class, or classes, that it must be of, partials aside.

    Raises:
        ConfigError: a target that cannot be imported, does not take its arguments, or raises a
            ValueError on them; and any error of a constructor of this package's or of torch's.
            Other errors of a user's target are its own and pass through.
    """
    target = find_target(node.get("_target_"), f"{name}._target_")
    if not isinstance(node.get("_partial_", False), bool):
        raise ConfigError(
            f"{name}._partial_ must be true or false, got {in_yaml(node['_partial_'])}"
        )
    make = _with_keys(target, node, name)
    check_arguments(make.func, make.args, make.keywords | more, name, partly=True)
    make = partial(make.func, *make.args, **fit_arguments(make.func, make.keywords, name))
    if node.get("_partial_"):
        return make
    check_arguments(make.func, make.args, make.keywords | more, name)
    built = call(partial(make, **more), make.keywords, name)
    check_kind(built, kind, f"{name}._target_", str(node["_target_"]))
    return built


def _with_keys(target: Any, node: Mapping[str, Any], name: str) -> "partial[Any]":
    """The target with the keys of `node`, as Hydra makes it, which takes milliseconds: only where
    there are flags, targets within, interpolations or values of other kinds.
    """
    keys = {key: value for key, value in node.items() if key not in ("_target_", "_partial_")}
    if callable(target) and _is_plain(keys):
        return partial(target, **deepcopy(keys))
    try:
        made: partial[Any] = instantiate(dict(node) | {"_partial_": True}, _convert_="all")
    except (InstantiationException, TypeError) as error:  # TypeError: of its own flags
        raise ConfigError(f"{name}: {format_config_error(error)}") from error
    return made


def _is_plain(value: Any) -> bool:
    if type(value) is dict:
        return all(
            type(key) is str and not key.startswith("_") and _is_plain(own)
            for key, own in value.items()
        )
    if type(value) is list:
        return all(map(_is_plain, value))
    if type(value) is str:
        return "${" not in value and value != "???"
    return value is None or type(value) in (bool, int, float)


def check_kind(built: Any, kind: Any, name: str, target: str) -> None:
    """Refuse what is not of the class, or of one of the classes, `kind`."""
    if not isinstance(built, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(f"{k.__module__}.{k.__qualname__}" for k in kinds)
        raise ConfigError(f"{name} must make a {wanted}, got {target}, a {type(built).__name__}")


def find_target(path: Any, name: str) -> Any:
    """Return what a dotted name stands for, and refuse one that is not there with what is. What
    importing a module raises passes.
    """
    parts = str(path).split(".")
    if not isinstance(path, str) or len(parts) < 2 or not all(map(str.isidentifier, parts)):
        raise ConfigError(
            f"{name} must be the dotted name of a class, as my_project.MyTask, got {in_yaml(path)}"
        )
    found: Any = None
    for end in range(1, len(parts) + 1):
        above, part = ".".join(parts[: end - 1]), parts[end - 1]
        if found is None or (inspect.ismodule(found) and not hasattr(found, part)):
            found = _module(found, above, part, name, path)
        elif not hasattr(found, part):
            raise ConfigError(_no_such(found, above, part, name, path))
        else:
            found = getattr(found, part)
    return found


def _module(parent: Any, above: str, part: str, name: str, path: str) -> Any:
    whole = f"{above}.{part}" if above else part
    try:
        return importlib.import_module(whole)
    except ModuleNotFoundError as error:
        if error.name != whole:
            raise  # one that the module itself imports
        if parent is not None:
            raise ConfigError(_no_such(parent, above, part, name, path)) from error
        raise ConfigError(
            f"{name}={path}: there is no module {part} in the working directory, in PYTHONPATH or "
            "among the installed packages: start in the folder that holds it, or install it"
        ) from error


def _no_such(parent: Any, above: str, part: str, name: str, path: str) -> str:
    held = {key: value for key, value in vars(parent).items() if not key.startswith("_")}
    near = get_close_matches(part, held, n=1)
    mine = [key for key, value in held.items() if getattr(value, "__module__", None) == above]
    hint = f"did you mean {above}.{near[0]}?" if near else f"it has {', '.join(mine[:8]) or 'none'}"
    return f"{name}={path}: {above} has no {part}: {hint}"


def call(make: Callable[..., Any], keys: Mapping[str, Any], name: str) -> Any:
    """Call a constructor that has its arguments.

    Args:
        keys: what the user has given it.
    """
    known = (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError)
    try:
        return make()
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(_about_a_key(error, keys, name)) from error
    except known as error:
        if not is_known(make):
            raise
        raise ConfigError(_about_a_key(error, keys, name)) from error


def is_known(make: Callable[..., Any]) -> bool:
    """Whether it is a constructor of this package's or of torch's."""
    while isinstance(make, partial):
        make = make.func
    return str(getattr(make, "__module__", "")).partition(".")[0] in _KNOWN


def _about_a_key(error: Exception, keys: Mapping[str, Any], name: str) -> str:
    """What a constructor has raised, with the keys it speaks of and their values."""
    text = one_line(error)
    if ran_out(error):
        text = f"there is no memory for it ({text}): lower its sizes"
    if f"{name}." in text or not keys:
        return text
    spoken = text.lower().replace("_", " ")
    given = [
        f"{name}.{key}={in_yaml(value)}"
        for key, value in keys.items()
        if re.search(rf"\b{re.escape(key.lower().replace('_', ' '))}s?\b", spoken)
    ]
    return f"{', '.join(given) or name}: {text}"


def fit_arguments(
    target: Callable[..., Any], keywords: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """`keywords` as the annotations of `target` want them."""
    annotations = annotations_of(target)
    found = {}
    for key, value in keywords.items():
        try:
            found[key] = fitted(value, annotations.get(key, Any))
        except Unfit as error:
            raise ConfigError(f"{name}.{key} {error}, got {in_yaml(value)}") from error
    return found


def check_arguments(
    target: Callable[..., Any],
    positional: Sequence[Any],
    keywords: Mapping[str, Any],
    name: str,
    partly: bool = False,
) -> None:
    """Refuse keys that `target` does not take, or, but for `partly`, the lack of some that it
    needs.
    """
    try:
        signature = inspect.signature(target)
        bind = signature.bind_partial if partly else signature.bind
        bind(*positional, **keywords)
    except (TypeError, ValueError) as error:  # some of Python's own have no signature
        called = getattr(target, "__qualname__", str(target))
        raise ConfigError(f"{name}: {called} does not take these keys: {error}") from error
