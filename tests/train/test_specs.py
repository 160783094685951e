"""Configurations are built fast where every value is of its type; else OmegaConf decides."""

import math
from dataclasses import dataclass, field, fields
from typing import Any

import pytest
from omegaconf import OmegaConf

from largebatch.common.errors import ConfigError
from largebatch.conf.config import (
    BudgetConfig,
    CheckpointConfig,
    GuardConfig,
    NoiseConfig,
    ScalingConfig,
    TargetConfig,
)
from largebatch.conf.specs import _merged_as, built_as, count, plain, real
from largebatch.conf.sweep_config import LRFindConfig, StudyConfig

VALUES: list[Any] = [
    None, True, "x", "", math.nan, math.inf, -1, 0, 0.5, 5.0, 40, 10**12, 1e30, 2**70, "4e6", "5",
    "0.5", "skip", "auto", "???", [], [8], ["lr"], [0.9, 2], [None], {}, {"a": 1},
    {"b": [{"c": 2}]},
]  # fmt: skip


@dataclass
class Inner:
    size: int = count(4, least=1)
    rate: float = real(0.5, above=0.0)


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    other: Inner | None = None
    named: dict[str, Inner] = field(default_factory=dict)
    node: dict[str, Any] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    either: int | str = 3
    needed: Any = None


NESTED: list[Any] = [
    {"inner": {"size": "2e1"}}, {"inner": {"size": 0}}, {"inner": {"rate": 2}}, {"inner": None},
    {"other": {"size": 2}}, {"other": {"sizes": 2}}, {"named": {"a": {"size": 3}, "b": {}}},
    {"named": {"a": None}}, {"node": {"a": {"b": [1, {"c": None}]}}}, {"node": {1: 2}},
    {"words": ["a", 2]}, {"rates": [1, 2.5]}, {"rates": [True]}, {"either": "a"}, {"either": 4.5},
    {"needed": "???"}, {"needed": "${either}", "either": 2}, {"words": "${node.no}"}, {"no": 1},
]  # fmt: skip

NEEDED = {StudyConfig: {"optimizers": ["lamb"], "batch_sizes": [8, 40], "start_batch": 8}}
CASES = [(Outer, given) for given in NESTED] + [
    (schema, {**NEEDED.get(schema, {}), key.name: value})
    for schema in (BudgetConfig, CheckpointConfig, GuardConfig, LRFindConfig, NoiseConfig,
                   ScalingConfig, StudyConfig, TargetConfig, Inner, Outer)
    for key in fields(schema)
    for value in VALUES
]  # fmt: skip


def fast(schema: type, given: Any) -> str:
    return repr(built_as(schema, plain(OmegaConf.create(given))))


@pytest.mark.parametrize(
    "schema", dict.fromkeys(schema for schema, _ in CASES), ids=lambda s: s.__name__
)
def test_what_is_built_fast_is_what_omegaconf_makes(schema: type) -> None:
    """Everything that OmegaConf takes as it stands is built fast, and nothing that it refuses."""
    num_fast = 0
    for given in [given for kind, given in CASES if kind is schema]:
        try:
            found = fast(schema, given)
        except Exception:  # whatever it is, the other way is to say it
            continue
        num_fast += 1
        try:
            assert found == repr(_merged_as(schema, OmegaConf.create(given))), given
        except ConfigError as error:
            raise AssertionError(f"{given}: {found}, not {error}") from error
    assert num_fast > 4
