"""`summary.json`: what a run says of itself, written once when it ends."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypedDict

from largebatch.common.text import LineField, fitted, printable, wrapped
from largebatch.records import fields
from largebatch.records.fields import Fields, RecordError, must_be, optional, text, whole
from largebatch.records.names import SUMMARY
from largebatch.records.outcomes import STATUSES, UNFINISHED
from largebatch.records.reading import read_fields
from largebatch.records.target import DIRECTIONS, Target

_RATES: Final = (1e-30, 1e30)
"""What a learning rate may be: a picture has to hold all of them."""
_LOSSES: Final = 1e30


class SummaryRecord(TypedDict, total=False):
    """`summary.json` as a run writes it, by type."""

    status: str
    reason: str | None
    steps_to_target: int | None
    samples_to_target: int | None
    steps_to_target_interpolated: float | None
    steps: int
    samples: int
    loss: float | None
    eval_loss: float | None
    seconds: float
    evaluation_seconds: float
    """Of these, spent on evaluations."""
    record_seconds: float
    """Spent on record lines, since the run began or was resumed."""
    task: str
    model: str
    optimizer: str
    batch_size: int
    lr: float
    base_lr: float
    scaling: dict[str, Any]
    seed: int
    target_loss: float | None
    target_metric: str
    """With `target_value` and `target_direction`: where a metric of the task was aimed at."""
    target_value: float
    target_direction: str
    metrics: dict[str, float]
    """Of the last evaluation, where the task has some."""
    budget_samples: int
    give_up_samples: int | None
    data_parallel_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    precision: str
    num_parameters: int
    groups: list[dict[str, Any]]
    """What tells the optimizer's groups from one another."""
    throughput: dict[str, Any]
    provenance: dict[str, Any]
    config: dict[str, Any]
    """All of it, resolved."""
    error: str
    """Of a run that failed."""
    signal: int
    """That interrupted it."""
    checkpoint_failures: list[str]
    lr_find: dict[str, Any]
    """What a sweep of learning rates found."""


@dataclass(frozen=True)
class Summary:
    """What a study reads of a run. `batch_size` is the global batch in samples, `lr` the peak
    actually used.
    """

    folder: Path
    status: str
    task: str
    optimizer: str
    batch_size: int
    seed: int
    lr: float
    rule: str
    base_batch: int | None
    target: Target | None
    steps: int
    samples: int
    steps_to_target: int | None
    samples_to_target: int | None
    steps_interpolated: float | None
    """Steps to the target, between the evaluations around it interpolated."""
    eval_loss: float | None
    metrics: Mapping[str, float]
    """Of the last evaluation, those that are finite."""
    seconds: float | None
    give_up_samples: int | None
    budget_samples: int | None
    provenance: Mapping[str, Any]
    config: Mapping[str, Any]
    """Resolved; empty in records that do not hold it."""
    data_hash: str | None

    @property
    def conclusive(self) -> bool:
        """Whether the run says if its learning rate reaches the target.

        A crash or an interruption says nothing: counting it as a miss would blame the optimizer.
        """
        return self.steps_to_target is not None or self.status in ("exhausted", "diverged")


def read_summary(path: Path) -> Summary:
    """Read a `summary.json`; keys that are not known are ignored.

    Raises:
        FileNotFoundError: there is none.
        RecordError: naming the file and the field.
    """
    record = read_fields(path)
    scaling, provenance = record.inside("scaling"), record.inside("provenance")
    run = Summary(
        folder=path.parent,
        status=record.take("status", status),
        task=record.take("task", text),
        optimizer=record.take("optimizer", text),
        batch_size=record.take("batch_size", whole(1)),
        seed=record.take("seed", whole()),
        lr=record.take("lr", learning_rate),
        rule=scaling.take("rule", text),
        base_batch=scaling.take("base_batch", optional(whole())),
        target=_target_of(record),
        steps=record.take("steps", whole()),
        samples=record.take("samples", whole()),
        steps_to_target=record.take("steps_to_target", optional(whole(1))),
        samples_to_target=record.take("samples_to_target", optional(whole(1))),
        steps_interpolated=record.find("steps_to_target_interpolated", fields.number_or_none),
        eval_loss=record.take("eval_loss", fields.number_or_none),
        metrics=_metrics_of(record),
        seconds=record.find("seconds", fields.number_or_none),
        give_up_samples=record.find("give_up_samples", whole()),
        budget_samples=record.find("budget_samples", whole()),
        provenance=provenance.values,
        config=record.find("config", fields.mapping) or {},
        data_hash=provenance.find("data_hash", text),
    )
    if record.problems:
        raise RecordError(record.problems[0])
    if (run.steps_to_target is None) != (run.samples_to_target is None):
        raise RecordError(
            f"{record.where}: steps_to_target and samples_to_target must both be given or both be "
            "null"
        )
    if run.status == "reached" and run.steps_to_target is None:
        raise RecordError(f"{record.where}: its status is reached but steps_to_target is null")
    return run


def aim_fields(target: Target | None) -> SummaryRecord:
    """What a summary says of a target beside `target_loss`, where that is none."""
    if target is None or target.metric == "loss":
        return {}
    return {
        "target_metric": target.metric,
        "target_value": target.value,
        "target_direction": target.direction,
    }


def aimed_at(summary: Mapping[str, Any]) -> Target | None:
    """What a run has aimed at, of a summary that this process has made."""
    if summary.get("target_metric") is not None:
        value, direction = summary["target_value"], summary["target_direction"]
        return Target(summary["target_metric"], value, direction)
    value = summary.get("target_loss")
    return None if value is None else Target("loss", value)


def _target_of(record: Fields) -> Target | None:
    value, metric = record.take("target_loss", loss), record.find("target_metric", text)
    if metric is None:
        return None if value is None else Target("loss", value)
    return Target(
        metric,
        record.take("target_value", fields.within(-_LOSSES, _LOSSES)),
        record.take("target_direction", fields.one_of(*DIRECTIONS)),
    )


def _metrics_of(record: Fields) -> dict[str, float]:
    inner = record.find_inside("metrics")
    found = {printable(name): inner.find(name, fields.number_or_none) for name in inner}
    return {name: value for name, value in found.items() if value is not None}


def has_ended(run: Path) -> bool:
    """Say whether the run has ended for good.

    Raises:
        RecordError: the summary does not say it.
    """
    try:
        return read_fields(run / SUMMARY).take("status", status) not in UNFINISHED
    except FileNotFoundError:
        return False


def objective(summary: Mapping[str, Any]) -> float:
    """Return what a sweeper makes small, as the configuration's `objective` names it: steps or
    samples to the target, or the final loss. Without it: steps, or the loss where no target is.

    A run that missed its target, or diverged, is infinite.
    """
    what = summary.get("config", {}).get("objective")
    if what != "loss" and aimed_at(summary) is not None:
        steps = summary.get("steps_to_target_interpolated") or summary.get("steps_to_target")
        if steps is None:
            return math.inf
        return float(steps) * (summary["batch_size"] if what == "samples" else 1)
    found = summary.get("eval_loss")
    found = summary.get("loss") if found is None else found
    return math.inf if found is None or summary["status"] == "diverged" else float(found)


def in_words(summary: Mapping[str, Any], folder: Path) -> str:
    """One line: how the run ended, what it took, and where its record is."""
    return fitted(_ending(summary, folder), None)


def line_of_sweep(
    number: int, of: int, own: Sequence[str], summary: Mapping[str, Any], folder: Path,
    width: int | None,
) -> str:  # fmt: skip
    """How a run of a sweep ended, in one line, which on a terminal leaves out whole fields to fit:
    first the seconds, then samples, other metrics, the loss, its number, the reason, the folder.

    Args:
        own: the overrides that set it apart.
        width: characters of the terminal; None where it is none.
    """
    ended, *more = _ending(summary, folder)
    ended = LineField(f"{' '.join([*own, ''])}→ {ended.text}", ended.weight)
    parts = [LineField(f"{number} of {of}", 4), ended, *more]
    return fitted(parts, width) or wrapped(ended.text, width)


def status_in_words(status: str) -> str:
    """A status for people: a run that did all that was asked of it is not exhausted."""
    return "budget spent" if status == "exhausted" else status


def _ending(summary: Mapping[str, Any], folder: Path) -> list[LineField]:
    """The fields that say how a run ended, that first."""
    found, target = summary.get("eval_loss"), aimed_at(summary)
    ended = status_in_words(summary["status"])
    if ended == "budget spent" and "lr_find" in summary:
        ended = "learning rates swept"
    if target is not None:
        verb = "reached" if ended == "reached" else f"{ended} without reaching"
        ended = f"{verb} {f'{target.value:g}' if target.metric == 'loss' else target}"
    parts = [
        LineField(f"{ended} after {summary.get('steps') or 0:,} steps", 7),
        LineField(f"{summary.get('samples') or 0:,} samples", 1),
        LineField(f"{summary.get('seconds') or 0:.1f} s of training", 0),
    ]
    parts += [] if found is None else [LineField(f"evaluation loss {found:.4f}", 3)]
    parts += [
        LineField(f"{key} {value:.4f}", 2) for key, value in summary.get("metrics", {}).items()
    ]
    parts += [LineField(str(summary["reason"]), 5)] if summary.get("reason") else []
    return [*parts, LineField(str(folder), 6)]


status: Final = fields.one_of(*STATUSES)


def learning_rate(value: Any) -> float:
    """Take a learning rate."""
    low, high = _RATES
    rate = fields.positive(value)
    if not low <= rate <= high:
        raise must_be(f"a learning rate from {low:g} to {high:g}", value)
    return rate


def loss(value: Any) -> float | None:
    """Take a loss; null and what is not finite are None."""
    result = fields.number_or_none(value)
    if result is not None and not math.fabs(result) <= _LOSSES:
        raise must_be(f"a loss of at most {_LOSSES:g}", value)
    return result
