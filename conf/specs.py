"""Fields of configurations with what they may hold, and the pass that makes it so.

    every_samples: int | None = count(None, least=1)

Users write counts as "4e6" and "250B". Before the merge that checks types, `convert` turns them
into the numbers that the annotations promise, and refuses the rest by the key's full name.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import MISSING, field, fields, is_dataclass
from functools import partial
from types import UnionType
from typing import Any, Final, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from largebatch.common.errors import ConfigError, format_config_error
from largebatch.common.numbers import real_number, whole_number

T = TypeVar("T")
_SCHEMAS: Final[dict[type, DictConfig]] = {}
_HINTS: Final[dict[type, dict[str, Any]]] = {}
Check = Callable[[Any, str], Any]
"""Takes a value and the key's name; raises ValueError."""


def spec(default: Any, check: Check, optional: bool = False) -> Any:
    """A field whose value is what `check` makes of it; None stays None where it is the default, or
    with `optional`.
    """
    return field(
        default=default, metadata={"check": check, "optional": optional or default is None}
    )


def count(default: int | None, *, least: int = 0, word: str | None = None) -> Any:
    """A whole number from `least` on, or `word`."""

    def check(value: Any, name: str) -> Any:
        return value if word is not None and value == word else whole_number(value, name, least)

    return spec(default, check)


def each_count(*, least: int = 0) -> dict[str, Any]:
    """Metadata of a field that is a list of whole numbers."""

    def check(values: Any, name: str) -> Any:
        return [whole_number(value, name, least) for value in values]

    return {"check": check, "optional": False}


def real(
    default: float | None,
    *,
    above: float | None = None,
    least: float | None = None,
    optional: bool = False,
) -> Any:
    """A number within bounds; `optional` where it may be null and is not by default."""
    return spec(default, partial(real_number, above=above, least=least), optional)


def choice(default: str | None, *words: str) -> Any:
    """One of these words."""

    def check(value: Any, name: str) -> Any:
        if (value in (None, "") and default is None) or not isinstance(value, str | int | float):
            return value  # refused with the types, or with all empty words
        if str(value) not in words:
            null = "null or " * (default is None)
            raise ConfigError(f"{name} must be {null}one of {', '.join(words)}, got {str(value)!r}")
        return str(value)

    return spec(default, check)


def convert(config: "DictConfig | dict[str, Any]", schema: type, above: str = "") -> None:
    """Convert the values of `config` in place to what the fields of the dataclass `schema` say."""
    hints = _hints(schema)
    for declared in fields(schema):
        name = declared.name
        if name not in config:  # or `???`: the merge has a default or refuses it
            continue
        for inner, nested, path in _nested(config[name], hints[name], f"{above}{name}"):
            convert(inner, nested, f"{path}.")
        check = declared.metadata.get("check")
        if check is not None and not (config[name] is None and declared.metadata["optional"]):
            config[name] = check(config[name], f"{above}{name}")


def _nested(value: Any, hint: Any, path: str) -> Iterator[tuple[DictConfig, type, str]]:
    """The configurations within a value, by the dataclasses that its annotation names."""
    if not isinstance(value, DictConfig):
        return
    for kind in (hint, *get_args(hint)):
        if is_dataclass(kind) and isinstance(kind, type):
            yield value, kind, path
        elif get_origin(kind) is dict:
            for key in value:
                for each in get_args(kind)[1:]:
                    yield from _nested(value[key], each, f"{path}.{key!s}")
            return


def typed_as(schema: type[T], config: DictConfig) -> T:
    """The composed configuration as an object of `schema`.

    Raises:
        ConfigError: a missing or unknown key, a wrong type or an impossible value.
    """
    try:
        return built_as(schema, plain(config))
    except (OmegaConfBaseException, ValueError):
        return _merged_as(schema, config)


def plain(config: DictConfig) -> Any:
    """Its values without OmegaConf; raises OmegaConfBaseException where one is missing."""
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def _merged_as(schema: type[T], config: DictConfig) -> T:
    """The same by OmegaConf, which takes ten times as long, converts, and says what is wrong."""
    try:
        config = deepcopy(config)
        OmegaConf.set_struct(config, False)
        convert(config, schema)
        if schema not in _SCHEMAS:
            _SCHEMAS[schema] = OmegaConf.structured(schema)
        result = OmegaConf.to_object(OmegaConf.merge(_SCHEMAS[schema], config))
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(format_config_error(error)) from error
    assert isinstance(result, schema)
    return result


def built_as(schema: type[T], given: Any, above: str = "") -> T:
    """An object of `schema` from plain values, where each is of the very type that is promised.

    Raises:
        ValueError: not for sure, for whatever reason.
    """
    hints = _hints(schema)
    if not isinstance(given, Mapping) or not given.keys() <= hints.keys():
        raise ValueError(f"{above} has other keys than {schema.__name__}")
    values = {}
    for declared in fields(schema):  # type: ignore[arg-type] # a dataclass, as all are
        name = declared.name
        if name in given:
            value = _exact(given[name], hints[name], f"{above}{name}", declared.metadata)
            values[name] = value
        elif declared.default is MISSING and declared.default_factory is MISSING:
            raise ValueError(f"{above}{name} is not given")
    return schema(**values)


def _hints(schema: type) -> dict[str, Any]:
    if schema not in _HINTS:
        _HINTS[schema] = get_type_hints(schema)
    return _HINTS[schema]


def _exact(value: Any, hint: Any, name: str, metadata: Mapping[str, Any]) -> Any:
    """The value as the hint, and the field's check, have it."""
    check = metadata.get("check")
    if check is not None and not (value is None and metadata["optional"]):
        value = check(value, name)
    return _of_type(value, hint, name)


def _of_type(value: Any, hint: Any, name: str) -> Any:
    if hint is Any:
        return value
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for kind in kinds:
        origin, inner = get_origin(kind), get_args(kind)
        if kind is Any or type(value) is kind:
            return value
        if kind is float and type(value) is int:
            return float(value)
        if is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
            return built_as(kind, value, f"{name}.")
        if origin is list and type(value) is list:
            return [_of_type(each, inner[0], name) for each in value]
        if origin is dict and type(value) is dict and all(type(key) is inner[0] for key in value):
            return {k: _of_type(each, inner[1], f"{name}.{k}") for k, each in value.items()}
    raise ValueError(f"{name}: {type(value).__name__} is not {hint}")
