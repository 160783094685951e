"""Runs for people: one page, with a table and pictures of their course, and the pictures as files.

Written into a run's folder, or of several runs into that of the first, unless elsewhere is asked
for: `run.html`, `run.png`, `run.svg`; beside them, of a single run, `layers.png` and `noise.png`
where it recorded trust ratios by layer or its noise scale.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from largebatch.common.figures import paper_style
from largebatch.common.text import duration
from largebatch.records import printable
from largebatch.records.names import EVALUATED, METRICS
from largebatch.study.page.axes import NARROW, WIDE
from largebatch.study.page.html import embedded, figure_of, provenance_of, rendered, table_of
from largebatch.study.page.styles import curve_styles
from largebatch.study.page.svg import svg_of, themed, write_png
from largebatch.study.page.tables import Entry, Listing
from largebatch.study.page.terminal import terminal_table
from largebatch.study.page.words import DASH, plural
from largebatch.study.single_runs.figure import MOST_METRICS, Against, runs_figure
from largebatch.study.single_runs.history import RunHistory, is_run, names_of, read_history
from largebatch.study.single_runs.layers import write_layers
from largebatch.study.single_runs.noise import write_noise

if TYPE_CHECKING:
    from rich.console import Console

MOST_RUNS: Final = 24
"""That one picture can hold."""


@dataclass(frozen=True)
class RunsReport:
    """What was read of runs, by name, and the files that tell it."""

    histories: dict[str, RunHistory]
    html: Path
    pictures: dict[str, Path]
    problems: list[str]


def write_runs_report(
    *folders: Path, out: Path | None = None, against: Against = "samples"
) -> RunsReport:
    """Write the report of one run or of several laid over each other.

    Args:
        against: what their course is drawn over: samples, steps or seconds.

    Raises:
        ValueError: too many runs, a folder that is none, or a run without a step; before anything
            is written.
    """
    if len(folders) > MOST_RUNS:
        raise ValueError(
            f"{len(folders)} runs are more than one picture can hold, {MOST_RUNS}: name fewer, or "
            "the folder above them, whose report compares their steps to the target"
        )
    for folder in folders:
        if not is_run(folder):
            what = "holds no run itself" if folder.is_dir() else "is no folder"
            raise ValueError(
                f"{printable(folder)} {what} ({METRICS} is not in it): name single runs, or only "
                "folders above runs"
            )
    problems: list[str] = []
    read = [read_history(folder, problems) for folder in dict.fromkeys(folders)]
    histories = dict(zip(names_of(read), read, strict=True))
    target = folders[0] if out is None else out
    target.mkdir(parents=True, exist_ok=True)
    styles = curve_styles((name, history.optimizer) for name, history in histories.items())
    pictures = {"run": target / "run.png", "run.svg": target / "run.svg"}
    shown = {}
    with paper_style():
        for kind, width in (("w", WIDE), ("n", NARROW)):
            picture = runs_figure(read, [*histories], styles, width, against)
            if kind == "w":
                write_png(picture, pictures["run"])
            else:
                picture.tips.clear()  # no pointer rests on a phone
            shown[kind] = svg_of(picture, f"{kind}-run-")
    pictures["run.svg"].write_text(shown["w"], encoding="utf-8")
    if len(folders) == 1:
        pictures |= _single(folders[0], problems, target)
    words = ["largebatch", "report", *map(str, folders), *(["--out", str(out)] if out else [])]
    words += ["--against", against] if against != "samples" else []
    html = target / "run.html"
    title = f"Run {next(iter(histories))}" if len(read) == 1 else plural(len(read), "run")
    told = f"{title}: loss and what was recorded beside it over {against}"
    figures = [figure_of(themed(shown["w"], told), themed(shown["n"], told), _CAPTION)]
    figures += [embedded(pictures[name], _SINGLE[name]) for name in _SINGLE if name in pictures]
    page = rendered(
        "run.html", title, printable(shlex.join(words)),
        table=table_of(runs_table(histories), "Losses are the last recorded."),
        figures=figures,
        problems=[*dict.fromkeys(map(printable, problems))],
        provenance=provenance_of([history.provenance for history in read]),
    )  # fmt: skip
    html.write_text(page, encoding="utf-8")
    return RunsReport(histories, html, pictures, list(dict.fromkeys(problems)))


def print_runs(report: RunsReport, console: "Console | None" = None) -> None:
    """The table of the runs and where the files lie, on the terminal."""
    from largebatch.common.console import output_console

    console = console or output_console()
    console.print(terminal_table("", runs_table(report.histories), console))
    for name, path in {"report": report.html, **report.pictures}.items():
        if "." not in name:
            console.print(f"{name}: {path}", highlight=False, markup=False, soft_wrap=True)
    for problem in report.problems:
        console.print(f"note: {printable(problem)}", style="yellow", highlight=False, markup=False)


def runs_table(histories: dict[str, RunHistory]) -> Listing:
    """How each run stands: steps, samples, losses, metrics, rate, batch size, time."""
    metrics = sorted({name for one in histories.values() for name in one.metrics})[:MOST_METRICS]
    heads = ["run", "status", "steps", "samples", "loss", "eval", *metrics, "rate", "batch", "time"]
    rows = []
    for name, history in histories.items():
        seconds = history.last("seconds")
        rows.append(
            [
                Entry(name),
                Entry(history.status),
                *(_number(history.last(key), ",.0f") for key in ("step", "samples")),
                *(
                    _number(history.last(key), ".4g")
                    for key in ("loss", "eval_loss", *(EVALUATED + name for name in metrics), "lr")
                ),
                _number(history.last("global_batch_size"), ",.0f"),
                Entry(DASH if seconds is None else duration(seconds), seconds),
            ]
        )
    spare = ("time", "samples", "batch", "rate", *reversed(metrics))
    return Listing(heads, rows, words=("run", "status"), spare=spare)


_CAPTION: Final = (
    "Markers are evaluations. Faint: as recorded; solid: running means over a fiftieth of the run. "
    "Dashed: the target. Losses far above the first are cut off."
)
_SINGLE: Final = {
    "layers": "Trust ratio of each layer",
    "noise": "Gradient noise scale, and the batch size",
}


def _single(folder: Path, problems: list[str], out: Path) -> dict[str, Path]:
    """The pictures that only one run can have, where it recorded what they show."""
    pictures = {}
    for name, write in (("layers", write_layers), ("noise", write_noise)):
        try:
            pictures[name] = write(folder, problems, out)
        except ValueError:  # it did not record them
            continue
    return pictures


def _number(value: float | None, form: str) -> Entry:
    return Entry(DASH) if value is None else Entry(format(value, form), value)
