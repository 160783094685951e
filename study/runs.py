"""What a finished run says about itself: `summary.json`, read strictly and without torch.

A run folder holds `metrics.jsonl`, a line a step, written while the run lives, and `summary.json`,
written once when it ends. Only the summary is read here; a folder with the first and not the
second is an unfinished run, which is counted and named but never an error.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STATUSES = ("reached", "exhausted", "diverged", "interrupted", "failed")


@dataclass(frozen=True)
class RunSummary:
    """One run. `batch_size` is the global batch in samples, `lr` the peak actually used."""

    folder: Path
    status: str
    task: str
    optimizer: str
    batch_size: int
    seed: int
    lr: float
    rule: str
    base_batch: int | None
    target_loss: float | None
    steps: int
    samples: int
    steps_to_target: int | None
    samples_to_target: int | None
    eval_loss: float | None
    seconds: float | None
    give_up_samples: int | None
    provenance: Mapping[str, Any]

    @property
    def conclusive(self) -> bool:
        """Whether the run says if its learning rate reaches the target.

        A crash or an interruption says nothing: counting it as a miss would blame the optimizer.
        """
        return self.steps_to_target is not None or self.status in ("exhausted", "diverged")


def read_runs(folder: Path | str) -> tuple[list[RunSummary], list[str]]:
    """All runs at any depth below `folder`, in order of path, and a sentence a problem.

    A summary that cannot be read, lacks a key or holds an impossible value is skipped and named;
    unknown keys are ignored. Raises `FileNotFoundError` where there is no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder: {root}")
    runs: list[RunSummary] = []
    problems: list[str] = []
    for path in sorted(root.rglob("summary.json")):
        try:
            runs.append(_run(path))
        except (OSError, ValueError) as error:
            problems.append(f"{path.relative_to(root)} was skipped: {error}")
    unfinished = [
        path.parent.relative_to(root)
        for path in sorted(root.rglob("metrics.jsonl"))
        if not path.with_name("summary.json").exists()
    ]
    if unfinished:
        problems.append(
            f"{len(unfinished)} unfinished run(s) without summary.json, first {unfinished[0]}"
        )
    stopped = [run for run in runs if not run.conclusive]
    if stopped:
        kinds = Counter(run.status for run in stopped)
        listed = ", ".join(f"{count} {status}" for status, count in sorted(kinds.items()))
        first = stopped[0].folder.relative_to(root)
        problems.append(f"{listed} run(s) decide nothing and were left out, first {first}")
    return runs, problems


def check_one_study(runs: Sequence[RunSummary]) -> None:
    """Raise `ValueError` unless all runs share one task, one target loss and one data hash."""
    values: dict[str, list[object]] = {
        "tasks": [run.task for run in runs],
        "target losses": [run.target_loss for run in runs],
        "data hashes": [run.provenance.get("data_hash") for run in runs],
    }
    for what, found in values.items():
        if len(set(found)) > 1:
            listed = ", ".join(
                f"{'none' if value is None else value} ({count} runs, first "
                f"{runs[found.index(value)].folder})"
                for value, count in Counter(found).items()
            )
            raise ValueError(f"the folder mixes several {what}, report one at a time: {listed}")
    if runs and runs[0].target_loss is None:
        raise ValueError("the runs have no target loss, so there are no steps to target to report")


def recorded(runs: Sequence[RunSummary], key: str) -> list[str]:
    """The distinct values of one provenance entry over the runs as sorted text."""
    found = {_text(run.provenance[key]) for run in runs if run.provenance.get(key) is not None}
    return sorted(found)


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {entry}" for name, entry in value.items())
    return str(value)


def _run(path: Path) -> RunSummary:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # both bad JSON and bad UTF-8
        raise ValueError(f"it is not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"it must hold a JSON object, got {type(record).__name__}")
    scaling = _mapping(record, "scaling")
    run = RunSummary(
        folder=path.parent,
        status=_string(record, "status"),
        task=_string(record, "task"),
        optimizer=_string(record, "optimizer"),
        batch_size=_count(record, "batch_size", at_least=1),
        seed=_count(record, "seed"),
        lr=_positive(record, "lr"),
        rule=_string(scaling, "rule"),
        base_batch=_optional_count(scaling, "base_batch"),
        target_loss=_optional_number(record, "target_loss"),
        steps=_count(record, "steps"),
        samples=_count(record, "samples"),
        steps_to_target=_optional_count(record, "steps_to_target", at_least=1),
        samples_to_target=_optional_count(record, "samples_to_target", at_least=1),
        eval_loss=_optional_number(record, "eval_loss"),
        seconds=_optional_number({"seconds": None} | record, "seconds"),
        give_up_samples=_optional_count({"give_up_samples": None} | record, "give_up_samples"),
        provenance=_mapping(record, "provenance"),
    )
    if run.status not in STATUSES:
        raise ValueError(f"status must be one of {', '.join(STATUSES)}, got {run.status!r}")
    if (run.steps_to_target is None) != (run.samples_to_target is None):
        raise ValueError("steps_to_target and samples_to_target must both be given or both be null")
    if run.status == "reached" and run.steps_to_target is None:
        raise ValueError("its status is reached but steps_to_target is null")
    return run


def _entry(record: Mapping[str, Any], key: str) -> Any:
    if key not in record:
        raise ValueError(f"the key {key} is missing")
    return record[key]


def _mapping(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = _entry(record, key)
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be an object, got {value!r}")
    return value


def _string(record: Mapping[str, Any], key: str) -> str:
    value = _entry(record, key)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key} must be text, got {value!r}")
    return value


def _count(record: Mapping[str, Any], key: str, at_least: int = 0) -> int:
    value = _entry(record, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{key} must be a whole number >= {at_least}, got {value!r}")
    return value


def _optional_count(record: Mapping[str, Any], key: str, at_least: int = 0) -> int | None:
    return None if _entry(record, key) is None else _count(record, key, at_least)


def _optional_number(record: Mapping[str, Any], key: str) -> float | None:
    """A number or null; NaN (the loss of a diverged run, as Python's json writes it) is null."""
    value = _entry(record, key)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{key} must be a number or null, got {value!r}")
    return None if math.isnan(value) else float(value)


def _positive(record: Mapping[str, Any], key: str) -> float:
    value = _optional_number(record, key)
    if value is None or not 0 < value < math.inf:
        raise ValueError(f"{key} must be > 0 and finite, got {record[key]!r}")
    return value
