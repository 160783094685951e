"""Ramps that follow the noise against constant batches: two tables, and the picture of them.

`python docs/site/ramps.py RAMPS TABLES` makes the tables of the two sweeps of docs/schedules.md.
"""

import csv
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from largebatch.common.figures import COLOURS, DPI, GREY, INK, paper_style
from largebatch.study import runs
from largebatch.study.page.axes import (
    WIDE,
    LineEnd,
    handle,
    name_ends,
    new_panels,
    set_grid,
    set_log_axis,
)
from largebatch.study.page.styles import MARKERS

COURSES_OF = 0  # the seed whose courses are kept
COURSES = (300.0, 1000.0, 4000.0)  # the exchange rates whose courses are
MOST_LINES = 120  # of a course in its table

Row = Mapping[str, str]


def tabulate(ramps: Path, tables: Path) -> None:
    """Write `runs.csv`, a row a run, and `courses.csv`, batch and noise along some of them."""
    found = [row for kind in ("constant", "noise") for row in runs(ramps / kind, config=True)]
    key = "config.batch.exchange_rate"
    names = ("exchange_rate", "batch_size", "rate", "seed", "steps", "samples")
    kept = [
        {name: row[name] for name in names[1:4]}
        | {"exchange_rate": row.get(key)}
        | {"steps": row["whole_steps"], "samples": samples_of(row)}
        for row in found
    ]
    write(tables / "runs.csv", names, kept)
    courses = [
        {"exchange_rate": row[key]} | line
        for row in found
        if row.get(key) in COURSES and row["seed"] == COURSES_OF
        for line in course_of(Path(row["folder"]))
    ]
    write(
        tables / "courses.csv", ("exchange_rate", "samples", "batch_size", "noise_scale"), courses
    )


def samples_of(row: Mapping[str, Any]) -> int:
    summary = json.loads((Path(row["folder"]) / "summary.json").read_text(encoding="utf-8"))
    return int(summary["samples_to_target"])


def course_of(folder: Path) -> Iterable[dict[str, Any]]:
    """Some lines of a run: every change of its batch, and the noise scale where it is resolved."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    every = math.ceil(len(lines) / MOST_LINES)
    before = None
    for place, line in enumerate(lines):
        size = line["global_batch_size"]
        if place % every == 0 or size != before or place == len(lines) - 1:
            noise = line.get("noise_scale") if line.get("noise_resolved") else None
            yield {"samples": line["samples"], "batch_size": size, "noise_scale": noise}
        before = size


def write(path: Path, names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for row in rows:
            values = [row[name] for name in names]
            writer.writerow(f"{v:.6g}" if isinstance(v, float) else v for v in values)


def rows_of(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def medians(rows: Iterable[Row]) -> tuple[float, float]:
    """Of samples and of steps."""
    rows = list(rows)
    return tuple(statistics.median(float(row[key]) for row in rows) for key in ("samples", "steps"))


def constants(rows: Sequence[Row]) -> dict[int, list[Row]]:
    """The runs of each constant batch at its best rate: that of the fewest median steps."""
    by_size: dict[int, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if not row["exchange_rate"]:
            by_size[int(row["batch_size"])][row["rate"]].append(row)
    return {
        size: min(by_rate.values(), key=lambda own: medians(own)[1])
        for size, by_rate in sorted(by_size.items())
    }


def ramps_of(rows: Sequence[Row]) -> dict[float, list[Row]]:
    """The runs of each exchange rate."""
    found: dict[float, list[Row]] = defaultdict(list)
    for row in rows:
        if row["exchange_rate"]:
            found[float(row["exchange_rate"])].append(row)
    return dict(sorted(found.items()))


def draw(tables: Path, path: Path) -> None:
    """Steps against samples to the target; and batch and noise along the runs."""
    rows, courses = rows_of(tables / "runs.csv"), rows_of(tables / "courses.csv")
    ramps = ramps_of(rows)
    looks = dict(zip(ramps, zip(COLOURS, MARKERS, strict=True), strict=False))
    handles = [
        Line2D([], [], color=INK, marker="o", markersize=5.5, label="constant batch"),
        *(
            Line2D([], [], color=colour, marker=marker, linestyle="none", label=f"r = {rate:,.0f}")
            for rate, (colour, marker) in looks.items()
        ),
        handle("o", "its seeds", markersize=3.0, alpha=0.7),
        Line2D([], [], color=GREY, linestyle=":", label="noise scale, where resolved"),
    ]
    with paper_style():
        picture, (left, right) = new_panels(WIDE, [3.0], 2, handles, room=0.55)
        _draw_costs(left, constants(rows), ramps, looks)
        _draw_courses(right, courses, looks)
        picture.figure.savefig(path, dpi=DPI)


def _draw_costs(
    axes: Axes, constant: Mapping[int, list[Row]], ramps: Mapping[float, list[Row]],
    looks: Mapping[float, tuple[str, str]],
) -> None:  # fmt: skip
    middles = {size: medians(own) for size, own in constant.items()}
    points = [*middles.values(), *map(medians, ramps.values())]
    points += [(float(r["samples"]), float(r["steps"])) for own in ramps.values() for r in own]
    samples, steps = zip(*points, strict=True)
    set_log_axis(axes.xaxis, min(samples) / 1.06, max(samples) * 1.06, 5)
    set_log_axis(axes.yaxis, min(steps) / 1.2, max(steps) * 1.2, 7)
    set_grid(axes)
    axes.plot(
        *zip(*middles.values(), strict=True), color=INK, marker="o", markersize=5.5, linewidth=1.4
    )
    for size, point in middles.items():
        axes.annotate(f"{size:,}", point, (7, 4), textcoords="offset points", fontsize=8.5)
    for rate, own in ramps.items():
        colour, marker = looks[rate]
        for row in own:
            axes.plot(float(row["samples"]), float(row["steps"]), marker=marker, color=colour,
                      markersize=3.0, alpha=0.5, linestyle="none")  # fmt: skip
        axes.plot(*medians(own), marker=marker, color=colour, markersize=6.5, zorder=4)
    axes.set(xlabel="Samples to target", ylabel="Steps to target")


def _draw_courses(
    axes: Axes, courses: Sequence[Row], looks: Mapping[float, tuple[str, str]]
) -> None:
    ends = []
    values = [float(row["batch_size"]) for row in courses]
    values += [float(row["noise_scale"]) for row in courses if row["noise_scale"]]
    samples = [float(row["samples"]) for row in courses]
    set_log_axis(axes.xaxis, min(samples) / 1.2, max(samples) * 1.2, 5)
    set_log_axis(axes.yaxis, min(values) / 1.2, max(values) * 1.2, 7)
    set_grid(axes)
    for rate, (colour, _) in looks.items():
        own = [row for row in courses if float(row["exchange_rate"]) == rate]
        if not own:
            continue
        x, y = [float(row["samples"]) for row in own], [float(row["batch_size"]) for row in own]
        axes.plot(x, y, color=colour, linewidth=1.5, drawstyle="steps-pre")
        noise = [float(row["noise_scale"] or "nan") for row in own]
        axes.plot(x, noise, color=colour, linewidth=1.0, linestyle=":")
        ends.append(LineEnd(f"r = {rate:,.0f}", x[-1], y[-1], colour))
    name_ends(axes, ends)
    axes.set(xlabel="Samples", ylabel="Global batch size (samples)")


if __name__ == "__main__":
    tabulate(Path(sys.argv[1]), Path(sys.argv[2]))
