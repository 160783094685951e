"""Final losses as tables for people, and as CSV files for programs."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from largebatch.study.curves import tuned_value
from largebatch.study.final_loss.answers import difference_text, loss_text
from largebatch.study.final_loss.points import LossPoint, loss_of
from largebatch.study.final_loss.section import LossSection
from largebatch.study.labels import cell
from largebatch.study.page.tables import Entry, Listing
from largebatch.study.page.words import DASH
from largebatch.study.statistics.intervals import Estimate
from largebatch.study.statistics.losses import LossDifference

POINTS: Final = (
    "optimizer,budget,batch_size,loss,low,high,lr,trials,at_edge,missed,seeds,over_best,"
    "over_best_low,over_best_high,over_best_verdict"
)
PAIRS: Final = (
    "optimizer,other,budget,batch_size,difference,low,high,band_low,band_high,p,verdict,seeds"
)
BASIN: Final = "optimizer,budget,batch_size,lr,seed,loss,status,chosen"

Row = Sequence[object]


def points_listing(study: LossSection) -> Listing:
    """The loss of each point, and what it is above that of the best batch size."""
    tuned = tuned_names(study)
    rows = []
    for one in study.budgets:
        for point in (point for name in one.names for point in one.points[name]):
            mean = one.mean(point.curve, point.batch_size)
            over = one.over_best(point.curve, point.batch_size)
            rows.append(
                [
                    Entry(point.curve),
                    _whole(one.budget),
                    _whole(point.batch_size),
                    Entry(DASH) if mean is None else _loss(mean.loss.value),
                    Entry(DASH if mean is None else _ends(mean.loss, of_loss=True)),
                    Entry(_over(over, point)),
                    _whole(len(point.losses)),
                    Entry(DASH if point.lr is None else f"{point.lr:.3g}", point.lr),
                    *(Entry(_value(point.tuned.get(name))) for name in tuned),
                    _whole(len(point.trials)),
                    Entry(_remark(point)),
                ]
            )
    heads = ["optimizer", "samples", "batch", "loss", "95% interval", "over its best batch"]
    heads += ["seeds", "rate", *tuned, "runs", ""]
    return Listing(heads, rows, spare=("runs", "over its best batch", "seeds"))


def pairs_listing(study: LossSection) -> Listing:
    """Each curve's loss less that of the first at its budget."""
    rows = []
    for one in study.budgets:
        first, *others = one.names
        for name in others:
            pair = one.pair(name, first)
            for point in pair.points if pair is not None else ():
                told = point.verdict if point.p is not None else "one seed, no verdict"
                rows.append(
                    [
                        Entry(f"{name} less {first}"),
                        _whole(one.budget),
                        _whole(point.batch_size),
                        Entry(difference_text(point.difference.value), point.difference.value),
                        Entry(_ends(point.difference, of_loss=False)),
                        Entry(_ends(point.band, of_loss=False)),
                        _whole(point.num_seeds),
                        Entry(told),
                    ]
                )
    heads = ("optimizer", "samples", "batch", "difference", "95% interval", "95% band", "seeds", "")
    return Listing(heads, rows)


def tuned_names(study: LossSection) -> list[str]:
    """Keys that were searched beside the rate."""
    return sorted({name for point in study.all_points for name in point.tuned})


def write_loss_csv(studies: Sequence[LossSection], folder: Path) -> dict[str, Path]:
    """`final_loss.csv`, `loss_pairs.csv` and `loss_basin.csv`; each row ends with its task where
    there are several.
    """
    tuned = sorted({name for study in studies for name in tuned_names(study)})
    kinds = {
        "final_loss": ([*POINTS.split(","), *tuned], _point_rows),
        "loss_pairs": (PAIRS.split(","), _pair_rows),
        "loss_basin": ([*BASIN.split(","), *tuned, "run"], _basin_rows),
    }
    written = {}
    for name, (columns, rows_of) in kinds.items():
        path = written[name] = folder / f"{name}.csv"
        several = ["task"] * (len(studies) > 1)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*columns, *several])
            for study in studies:
                for row in rows_of(study, tuned):
                    writer.writerow(
                        [cell(value) for value in (*row, *[study.task][: len(several)])]
                    )
    return written


def _point_rows(study: LossSection, tuned: Sequence[str]) -> Iterator[Row]:
    for one in study.budgets:
        for point in (point for name in one.names for point in one.points[name]):
            mean = one.mean(point.curve, point.batch_size)
            over = one.over_best(point.curve, point.batch_size)
            yield (
                point.curve, one.budget, point.batch_size,
                *_numbers(None if mean is None else mean.loss), point.lr,
                len(point.trials), point.at_edge, point.missed, len(point.losses),
                *_numbers(None if over is None else over.difference),
                None if over is None else over.verdict,
                *(point.tuned.get(name) for name in tuned),
            )  # fmt: skip


def _pair_rows(study: LossSection, tuned: Sequence[str]) -> Iterator[Row]:
    del tuned
    for one in study.budgets:
        for pair in one.pairs:
            for point in pair.points:
                yield (
                    pair.optimizer, pair.other, one.budget, point.batch_size,
                    *_numbers(point.difference), point.band.low, point.band.high, point.p,
                    point.verdict if point.p is not None else None, point.num_seeds,
                )  # fmt: skip


def _basin_rows(study: LossSection, tuned: Sequence[str]) -> Iterator[Row]:
    """A run each, of those that spent a budget."""
    for point in study.all_points:
        chosen = {id(run) for run in point.runs}
        for run in sorted(point.trials, key=lambda run: (run.lr, run.seed)):
            values = [tuned_value(run, name) if name in point.tuned else None for name in tuned]
            yield (
                point.curve, point.budget, point.batch_size, run.lr, run.seed, loss_of(run),
                run.status, id(run) in chosen, *values, "/".join(run.folder.parts[-5:]),
            )  # fmt: skip


def _numbers(estimate: Estimate | None) -> tuple[float | None, float | None, float | None]:
    return (None, None, None) if estimate is None else (estimate.value, estimate.low, estimate.high)


def _over(over: LossDifference | None, point: LossPoint) -> str:
    if point.missed:
        return DASH
    if over is None:
        return "best"
    ends = _ends(over.difference, of_loss=False)
    text = difference_text(over.difference.value) + (f" ({ends})" if ends != DASH else "")
    is_alike = over.p is not None and over.verdict == "not told apart"
    return f"{text}, not told apart" if is_alike else text


def _ends(estimate: Estimate, *, of_loss: bool) -> str:
    if estimate.low is None or estimate.high is None:
        return DASH
    shown = loss_text if of_loss else difference_text
    return f"{shown(estimate.low)} to {shown(estimate.high)}"


def _remark(point: LossPoint) -> str:
    if point.missed:
        return "diverged"
    told = ["at edge"] if point.at_edge else []
    if point.dropped_rates:
        listed = ", ".join(f"{rate:.3g}" for rate in point.dropped_rates)
        told.append(f"a seed diverged at {listed}")
    return "; ".join(told)


def _whole(value: int) -> Entry:
    return Entry(f"{value:,}", value)


def _loss(value: float) -> Entry:
    return Entry(loss_text(value), value)


def _value(value: float | None) -> str:
    return DASH if value is None else f"{value:g}"


def all_listings(study: LossSection) -> Iterable[tuple[str, Listing]]:
    """The tables of a section with their captions."""
    yield (
        "Final evaluation losses, means over the seeds, and how much higher each is than at the "
        "curve's best batch size, seed by seed.",
        points_listing(study),
    )
    pairs = pairs_listing(study)
    if pairs.rows:
        yield "Final losses less those of the first curve, seed by seed.", pairs
