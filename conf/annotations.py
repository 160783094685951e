"""Values of a configuration, made to fit the annotations of what they are given to. No torch."""

import inspect
import math
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, Literal, Union, get_args, get_origin

from largebatch.common.numbers import check_fp32, whole_number

_PLAIN: Final = (type(None), bool, int, float, str, list, tuple, dict)
_LISTS: Final = (list, tuple, Sequence, Iterable)
_LEAST: Final = -(2**63)


class Unfit(ValueError):
    """A value is not what an annotation asks for."""


def annotations_of(target: Callable[..., Any]) -> dict[str, Any]:
    """The annotation of each parameter of `target` that has one which can be read: some name what
    is imported for type checkers alone.
    """
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # some of Python's own have none
        return {}
    names = vars(sys.modules.get(target.__module__, types))
    found = {}
    for parameter in parameters:
        annotation = parameter.annotation
        if isinstance(annotation, str):
            with suppress(Exception):  # of any class: it is anybody's code
                found[parameter.name] = eval(annotation, dict(names))
        elif annotation is not inspect.Parameter.empty:
            found[parameter.name] = annotation
    return found


def fitted(value: Any, annotation: Any, infinite: bool = False) -> Any:
    """`value` as `annotation` wants it: "4e6" and 5.0 are whole numbers, a list may be a tuple.

    What is not plain (an object that the configuration has built), and annotations that say nothing
    of plain values (a user's class), pass as they are.

    Args:
        infinite: an infinite number will do, as it may for one of two bounds.

    Raises:
        Unfit: it is something else; the message says what it must be.
    """
    if not isinstance(value, _PLAIN):
        return value
    options = _options(annotation)
    if any(_is_open(option) for option in options):
        return value
    # As it stands, where it can: "auto" and 4 both fit `int | str`, and stay what they are.
    for option in sorted(options, key=lambda option: not _is_exact(value, option)):
        try:
            return _fitted(value, option, infinite)
        except (TypeError, ValueError):
            continue
    raise Unfit(f"must be {' or '.join(dict.fromkeys(map(words, options)))}")


def in_yaml(value: Any) -> str:
    """`value` as a user writes it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def words(annotation: Any) -> str:
    """What an annotation asks for, for people."""
    kind, inner = get_origin(annotation) or annotation, get_args(annotation)
    if kind in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(words(option) for option in inner))
    if kind is Literal:
        return f"one of {', '.join(map(in_yaml, inner))}"
    if kind is tuple and inner and inner[-1] is not Ellipsis:
        return f"a list of {len(inner)} ({', '.join(words(item) for item in inner)})"
    if kind in _LISTS:
        return "a list"
    if kind in (dict, Mapping):
        return "a mapping, {KEY: VALUE}"
    known = {
        type(None): "null",
        bool: "true or false",
        int: "a whole number (within 64 bits)",
        float: "a number (that FP32 holds)",
        str: "a word",
    }
    return known.get(kind, f"a {getattr(kind, '__name__', kind)}")


def _options(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        return [option for part in get_args(annotation) for option in _options(part)]
    return [type(None) if annotation is None else annotation]


def _is_open(annotation: Any) -> bool:
    """Whether it says nothing that a plain value could contradict."""
    kind = get_origin(annotation) or annotation
    if kind is Literal or kind in (*_PLAIN, *_LISTS, Mapping):
        return False
    # What is torch's or this package's is never written as plain values; a user's class may be.
    return str(getattr(kind, "__module__", "")).partition(".")[0] not in ("largebatch", "torch")


def _is_exact(value: Any, annotation: Any) -> bool:
    kind = get_origin(annotation) or annotation
    return kind is Literal or type(value) is kind or (kind in _LISTS and isinstance(value, list))


def _fitted(value: Any, annotation: Any, infinite: bool) -> Any:
    kind, inner = get_origin(annotation) or annotation, get_args(annotation)
    if kind is Literal:
        if value not in inner:
            raise Unfit
        return value
    if kind in (type(None), bool, dict, Mapping):
        if not isinstance(value, dict if kind is Mapping else kind):
            raise Unfit
        return value
    if kind is int:
        return whole_number(value, "", _LEAST)
    if kind is float:
        number = float(value)
        if isinstance(value, bool) or math.isnan(number) or (math.isinf(number) and not infinite):
            raise Unfit
        return check_fp32(number)
    if kind is str:
        is_word = isinstance(value, str | int | float) and not isinstance(value, bool)
        if not is_word or value == "" or value != value:  # a name may be a number, and none is NaN
            raise Unfit
        return str(value)
    if kind in _LISTS and isinstance(value, list | tuple):
        return _items(value, kind, inner)
    raise Unfit


def _items(value: Sequence[Any], kind: Any, inner: tuple[Any, ...]) -> Any:
    fixed = kind is tuple and inner and inner[-1] is not Ellipsis
    if fixed and len(inner) != len(value):
        raise Unfit
    of_each = inner if fixed else (inner[0] if inner else Any,) * len(value)
    items = [fitted(item, of, infinite=True) for item, of in zip(value, of_each, strict=True)]
    return tuple(items) if kind is tuple else items
