"""`largebatch report DIR`: one folder of runs becomes tables, two figures and one HTML page.

Written into DIR, or where `--out` says: `report.html` (self-contained), `curve.png`,
`learning_rate.png`, `curve.csv`, `fits.csv`, and `rules.csv` where runs under a scaling rule stand
beside tuned ones. The folder of a single run gives `layers.png`, the trust ratio of every layer
over the run, and `noise.png`, its gradient noise scale, where it recorded them. Exit code 0, or 2
and one sentence on stderr where there is nothing to report.
"""

import argparse
import base64
import csv
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import starmap
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from largebatch.common.text import duration
from largebatch.records import printable
from largebatch.study.fit import CurveFit, fit_points
from largebatch.study.labels import cell
from largebatch.study.points import (
    RulePoint,
    StudyPoint,
    curve_points,
    rule_points,
    tuned_optimizers,
)
from largebatch.study.runs import RunSummary, check_one_study, read_runs, recorded
from largebatch.study.tables import (
    FIT_HEADS,
    POINT_HEADS,
    RULE_HEADS,
    critical_batch,
    fit_cells,
    html_table,
    point_cells,
    rule_cells,
    terminal_table,
)

if TYPE_CHECKING:
    from rich.console import Console

CURVE_COLUMNS = "optimizer,batch_size,steps,samples,lr,trials,at_edge,missed"
FIT_COLUMNS = "optimizer,s_min,e_min,b_crit"
RULE_COLUMNS = "optimizer,rule,base_batch,batch_size,lr,steps,tuned_steps,ratio"


@dataclass(frozen=True)
class Study:
    """What the runs below one folder say together: one task, one target, one data set."""

    runs: list[RunSummary]
    points: list[StudyPoint]
    fits: dict[str, CurveFit | None]
    rules: list[RulePoint]
    problems: list[str]

    @property
    def task(self) -> str:
        return self.runs[0].task

    @property
    def target_loss(self) -> float:
        target = self.runs[0].target_loss
        assert target is not None  # `read_study` refuses runs without one
        return target

    @property
    def title(self) -> str:
        return f"{self.task}: steps to evaluation loss {self.target_loss:g}"


@dataclass(frozen=True)
class StudyReport:
    """A study and the files that tell it; `rules_csv` is None without rule runs to compare."""

    study: Study
    html: Path
    curve_png: Path
    learning_rate_png: Path
    curve_csv: Path
    fits_csv: Path
    rules_csv: Path | None


def read_study(folder: Path | str) -> Study:
    """Read, check and fit the runs below `folder`.

    Raises `FileNotFoundError` without the folder, `ValueError` without a finished run or where
    several tasks, target losses or data sets are mixed.
    """
    found, problems = read_runs(folder)
    runs = [run for run in found if run.conclusive]
    if not runs:
        raise ValueError("; ".join([f"no finished run below {folder}", *problems]))
    check_one_study(runs)
    points = curve_points(runs)
    names = sorted({point.optimizer for point in points})
    fits = {name: fit_points([p for p in points if p.optimizer == name]) for name in names}
    return Study(runs, points, fits, rule_points(runs, points), problems)


def write_report(folder: Path | str, out: Path | str | None = None) -> StudyReport:
    """Write the report of the runs below `folder` into `out` (default: the folder itself).

    Raises as `read_study` does, before anything is written.
    """
    from largebatch.common.figures import DPI
    from largebatch.study.figures import curve_figure, learning_rate_figure

    study = read_study(folder)
    target = Path(folder if out is None else out)
    target.mkdir(parents=True, exist_ok=True)
    report = StudyReport(
        study=study,
        html=target / "report.html",
        curve_png=target / "curve.png",
        learning_rate_png=target / "learning_rate.png",
        curve_csv=target / "curve.csv",
        fits_csv=target / "fits.csv",
        rules_csv=target / "rules.csv" if study.rules else None,
    )
    curve_figure(study.points, study.fits, study.title).savefig(report.curve_png, dpi=DPI)
    rates = learning_rate_figure(study.points, f"{study.task}: best learning rate")
    rates.savefig(report.learning_rate_png, dpi=DPI)
    _write_csv(report.curve_csv, CURVE_COLUMNS, [_row(p, CURVE_COLUMNS) for p in study.points])
    fits = [(n, fit.s_min, fit.e_min, fit.b_crit) for n, fit in study.fits.items() if fit]
    _write_csv(report.fits_csv, FIT_COLUMNS, fits)
    if report.rules_csv is not None:
        _write_csv(report.rules_csv, RULE_COLUMNS, [_row(r, RULE_COLUMNS) for r in study.rules])
    report.html.write_text(_html(report), encoding="utf-8")
    return report


def write_pictures(folder: Path, problems: list[str], out: Path | None = None) -> dict[str, Path]:
    """The pictures of a single run, of what it recorded, written into `out` (default: its folder).
    What is damaged is noted.

    Raises:
        ValueError: it recorded nothing that there is a picture of.
    """
    from largebatch.study.layers import write_layers
    from largebatch.study.noise import write_noise

    pictures, missing = {}, []
    for what, write in (("layers", write_layers), ("noise", write_noise)):
        try:
            pictures[what] = write(folder, problems, out)
        except ValueError as error:
            missing.append(str(error))
    if not pictures:
        raise ValueError("; ".join(missing))
    return pictures


def headlines(study: Study) -> list[str]:
    """A sentence an optimizer: what the largest batch bought, and its critical batch size."""
    lines = []
    for name, fit in study.fits.items():
        reached = [p for p in study.points if p.optimizer == name and p.steps is not None]
        if not reached:
            lines.append(f"{name}: missed the target at every batch size.")
            continue
        first, last = reached[0], reached[-1]
        assert first.steps is not None
        assert last.steps is not None
        bought = f"{first.steps:,} steps at batch {first.batch_size:,}"
        if last is not first:
            bought += (
                f", {last.steps:,} at {last.batch_size:,}: {first.steps / last.steps:.1f}x fewer "
                f"steps for a {last.batch_size / first.batch_size:g}x larger batch"
            )
        lines.append(f"{name}: {bought}; {critical_batch(fit)}.")
    return lines


def print_report(report: StudyReport, console: "Console | None" = None) -> None:
    """The points, the headlines and where the files lie, on the terminal."""
    from rich.console import Console

    console = console or Console()
    study = report.study
    console.print(terminal_table(study.title, POINT_HEADS, map(point_cells, study.points)))
    for line in headlines(study):
        console.print(printable(line), highlight=False, markup=False)
    if study.rules:
        console.print(terminal_table("scaling rules", RULE_HEADS, map(rule_cells, study.rules)))
    for problem in study.problems:
        console.print(f"note: {printable(problem)}", style="yellow", highlight=False, markup=False)
    console.print(f"report: {report.html}", highlight=False, markup=False, soft_wrap=True)


def main(argv: Sequence[str]) -> int:
    """`largebatch report DIR [--out DIR]`; 0, or 2 where there is nothing to report."""
    parser = argparse.ArgumentParser(
        prog="largebatch report",
        description=__doc__.split("\n")[0],
        epilog="exit codes: 0 done; 2 refused, or nothing to report",
    )
    parser.add_argument("folder", type=Path, help="a folder with runs at any depth, or of one run")
    parser.add_argument("--out", type=Path, help="where to write (default: the folder itself)")
    arguments = parser.parse_args(argv)
    try:
        from largebatch.study.layers import is_run

        if is_run(arguments.folder):
            problems: list[str] = []
            try:
                for what, path in write_pictures(arguments.folder, problems, arguments.out).items():
                    print(f"{what}: {path}")
            finally:
                for problem in dict.fromkeys(problems):
                    print(f"note: {printable(problem)}")
        else:
            print_report(write_report(arguments.folder, arguments.out))
    except ModuleNotFoundError as error:
        advice = "install it with: pip install 'largebatch[train]'"
        print(f"largebatch report needs {error.name}; {advice}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"largebatch report: {printable(error)}", file=sys.stderr)
        return 2
    return 0


def _write_csv(path: Path, columns: str, rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns.split(","))
        writer.writerows([cell(value) for value in row] for row in rows)


def _row(record: StudyPoint | RulePoint, columns: str) -> list[object]:
    return [getattr(record, column) for column in columns.split(",")]


def _html(report: StudyReport) -> str:
    study = report.study
    template = Path(__file__).with_name("templates") / "report.html"
    return Template(template.read_text(encoding="utf-8")).substitute(
        title=escape(study.title),
        measured=escape(_measured(study)),
        headlines=_items(headlines(study)),
        problems=_problems(study.problems),
        curve_png=_embedded(report.curve_png),
        curve_caption=escape(_curve_caption(study)),
        learning_rate_png=_embedded(report.learning_rate_png),
        points_table=html_table(POINT_HEADS, map(point_cells, study.points)),
        fits_table=html_table(FIT_HEADS, starmap(fit_cells, study.fits.items())),
        rules_section=_rules_section(study.rules),
        seeds_note=escape(_seeds_note(study.points)),
    )


def _measured(study: Study) -> str:
    """One paragraph: what was measured, on what, with what."""
    runs = study.runs
    seeds = sorted({run.seed for run in runs})
    seconds = sum(run.seconds or 0.0 for run in runs)
    facts = [
        f"Finished runs: {len(runs)}. Each trained the task {study.task} to an evaluation loss "
        f"of {study.target_loss:g} or less, or until it gave up",
        f"optimizers: {', '.join(study.fits)}",
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}",
        f"together they took {duration(seconds)}" if seconds else "",
    ]
    labels = {
        "data": "data", "data_hash": "data hash", "device": "device", "world_size": "ranks",
        "versions": "versions", "git_commit": "commit",
    }  # fmt: skip
    for key, label in labels.items():
        if values := recorded(runs, key):
            facts.append(f"{label}: {' / '.join(values)}")
    text = ". ".join(fact[0].upper() + fact[1:].rstrip(".") for fact in facts if fact) + "."
    untuned = sorted(set(study.fits) - tuned_optimizers(runs))
    if untuned:
        text += f" The curve of {', '.join(untuned)} follows a scaling rule: no rate was searched."
    return text


def _curve_caption(study: Study) -> str:
    sentences = [
        "Optimizer steps to the target against the global batch size, each at its best learning "
        "rate; a dashed line halves the steps with every doubling of the batch"
    ]
    if any(study.fits.values()):
        sentences.append(
            "Thin lines are the fits S_min + E_min / B, the upright tick on each is its B_crit, "
            "where steps are twice S_min; the panel below gives its value and, as a bar, the "
            "leave-one-out range"
        )
    if any(point.missed for point in study.points):
        sentences.append("Hollow markers at the top missed the target at every rate tried")
    return ". ".join([*sentences, _seeds_note(study.points)])


def _seeds_note(points: Sequence[StudyPoint]) -> str:
    if all(point.seeds == 1 for point in points):
        return "Each point is one seed, so it has no error bar."
    return "Error bars span the seeds at the best rate (least to most steps)."


def _rules_section(rules: Sequence[RulePoint]) -> str:
    if not rules:
        return ""
    return (
        "<h2>Scaling rules</h2>\n<p>Learning rates that a rule carried over from the base batch, "
        "against the best one found at each batch: a ratio of 1 is as good as a search.</p>\n"
        + html_table(RULE_HEADS, map(rule_cells, rules))
    )


def _items(lines: Sequence[str]) -> str:
    return "\n".join(f"<li>{escape(line)}</li>" for line in lines)


def _problems(problems: Sequence[str]) -> str:
    return f'<p class="soft">Left out:</p><ul class="soft">{_items(problems)}</ul>' * bool(problems)


def _embedded(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode("ascii")
