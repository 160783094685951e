"""What a study decided at each point, as its `study.json` says it: settings, seeds, marks.

It follows from the records of the study's runs; a folder of other runs has none of it, and its
points are chosen by the runs themselves.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final, NamedTuple

from largebatch.common.files import write_whole
from largebatch.records import RecordError, read_fields
from largebatch.records.fields import Fields, flag, list_of, number, text, whole

STUDY: Final = "study.json"


@dataclass(frozen=True)
class Decision:
    """One point of a study.

    Attributes:
        chosen: the value of each searched key; None where every setting missed.
        dropped: settings that were to be reported, and missed on a report seed.
        open_below: no rate below the best was found to be worse; `open_above` likewise.
        trials: runs made for the point.
        budget: in samples, of a study that asks for the loss after so many.
    """

    optimizer: str
    batch_size: int
    chosen: Mapping[str, float] | None
    dropped: tuple[Mapping[str, float], ...]
    open_below: bool
    open_above: bool
    trials: int
    budget: int | None = None

    @property
    def place(self) -> tuple[str, int] | tuple[str, int, int]:
        """Optimizer and batch size, and the budget where there is one."""
        place = self.optimizer, self.batch_size
        return place if self.budget is None else (*place, self.budget)


class SameRule(NamedTuple):
    """A rule and where it is the same."""

    optimizer: str
    rule: str
    base_batch: int
    batch_size: int


@dataclass(frozen=True)
class Decisions:
    """What the study of a folder decided; empty for a folder of other runs.

    Attributes:
        tuned: for each optimizer, the keys beside the rate that were searched.
        same_rules: rules whose rate is the tuned one itself, so that their runs are the same.
        most_trials: that every optimizer may spend on a point's climb, by the study's settings.
    """

    select_seeds: tuple[int, ...] = ()
    report_seeds: tuple[int, ...] = ()
    tuned: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    points: Mapping[tuple[str, int] | tuple[str, int, int], Decision] = field(default_factory=dict)
    same_rules: tuple[SameRule, ...] = ()
    most_trials: int | None = None


def write_decisions(folder: Path, decisions: Decisions) -> None:
    """Write them into the folder's `study.json`, beside what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / STUDY
    try:
        known = read_fields(path).values
    except FileNotFoundError:
        known = {}
    values = {
        "select_seeds": decisions.select_seeds,
        "report_seeds": decisions.report_seeds,
        "tuned": decisions.tuned,
        "points": [asdict(point) for point in decisions.points.values()],
        "same_rules": [rule._asdict() for rule in decisions.same_rules],
    }
    write_whole(path, json.dumps({**known, "decisions": values}, indent=1) + "\n")


def read_decisions(folder: Path, problems: list[str]) -> Decisions:
    """The decisions of the study in `folder`; damage is noted, and there are none then."""
    try:
        record = read_fields(folder / STUDY)
        if "decisions" not in record:
            return Decisions()
        settings = record.find_inside("study")
        most = settings.find("most_trials", whole(1))
        return replace(_decisions(record.inside("decisions")), most_trials=most)
    except FileNotFoundError:
        return Decisions()
    except RecordError as error:
        problems.append(f"{error}: points are chosen by the runs themselves")
        return Decisions()


def _decisions(record: Fields) -> Decisions:
    seeds = list_of(whole())
    tuned = record.inside("tuned")
    points = [_decision(point) for point in record.each("points")]
    found = Decisions(
        tuple(record.take("select_seeds", seeds)),
        tuple(record.take("report_seeds", seeds)),
        {name: tuple(tuned.take(name, list_of(text))) for name in tuned.values},
        {point.place: point for point in points},
        tuple(
            SameRule(
                rule.take("optimizer", text),
                rule.take("rule", text),
                rule.take("base_batch", whole(1)),
                rule.take("batch_size", whole(1)),
            )
            for rule in record.each("same_rules")
        ),
    )
    if record.problems:
        raise RecordError(record.problems[0])
    return found


def _decision(record: Fields) -> Decision:
    chosen = record.find_inside("chosen")
    return Decision(
        record.take("optimizer", text),
        record.take("batch_size", whole(1)),
        _setting(chosen) or None,
        tuple(_setting(setting) for setting in record.each("dropped")),
        record.take("open_below", flag),
        record.take("open_above", flag),
        record.take("trials", whole()),
        record.find("budget", whole(1)),
    )


def _setting(record: Fields) -> dict[str, float]:
    return {name: record.take(name, number) for name in record.values}


def same_value(one: float, other: float) -> bool:
    """Whether two values are one setting: computed in two ways they differ in their last bits."""
    return math.isclose(one, other, rel_tol=1e-5)
