"""What a study's folder holds: runs of one study, which it may grow by, and no others."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from largebatch.common.errors import ConfigError
from largebatch.common.files import write_whole
from largebatch.conf.sweep_config import StudyConfig
from largebatch.records import RecordError, read_fields
from largebatch.study.decisions import STUDY

GROWING = (
    "budgets",
    "optimizers",
    "batch_sizes",
    "select_seeds",
    "report_seeds",
    "rules",
    "rule_batches",
)
"""Keys of a study that may gain entries without another word."""


def check_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    """Refuse to add runs to those of a different study; else note what this one is.

    `identity` maps names to what its runs share. Names that are new to the folder (another
    optimizer) join it; those it knows must be as they were.

    Raises:
        ConfigError: naming what differs.
    """
    path = folder / STUDY
    try:
        known = read_fields(path).values
    except FileNotFoundError:
        known = {}
    except RecordError as error:
        raise ConfigError(
            f"{error}: restore it, or delete it if the runs in {folder} are this study's"
        ) from None
    current = json.loads(json.dumps(identity))
    for name in sorted(known.keys() & current.keys()):
        if _given(known[name]) != _given(current[name]):
            raise ConfigError(
                f"{folder} holds runs of another study: "
                f"{_difference(name, known[name], current[name])}; choose another folder with "
                "hydra.sweep.dir=…, or move it away"
            )
    write_whole(path, json.dumps({**known, **current}, indent=1) + "\n")


def _given(value: Any) -> Any:
    """Without what is null: a key that there was not yet was not given."""
    if not isinstance(value, dict):
        return value
    return {key: _given(inner) for key, inner in value.items() if inner is not None}


def _difference(name: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                return _difference(f"{name}.{key}", before.get(key), now.get(key))
    return f"{name} was {before!r}, now {now!r}"


def check_grid(folder: Path, study: StudyConfig) -> None:
    """Refuse to mix the points of another grid with those of the folder; note this one.

    A study may grow: by optimizers, batch sizes, seeds, rules. One that lacks what is there, or
    starts or searches otherwise, joins only where `study.join` says so.

    Raises:
        ConfigError: naming what differs.
    """
    path = folder / STUDY
    known = read_fields(path).values
    now = asdict(study)
    del now["join"]
    before = known.get("study")
    if isinstance(before, dict) and not study.join:
        for key, value in now.items():
            was = before.get(key, value)
            grows = key in GROWING and isinstance(was, list) and {*was} <= {*value}
            if was != value and not grows:
                raise ConfigError(
                    f"{folder} holds a study with study.{key}={was}, and this one has {value}: "
                    "choose another folder with hydra.sweep.dir=…, or let it join what is there "
                    "with study.join=true"
                )
    write_whole(path, json.dumps({**known, "study": now}, indent=1) + "\n")
