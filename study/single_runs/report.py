"""Runs for people: one page, with a table and pictures of their course, and the pictures as files.

Written into a run's folder, or of several runs into that of the first, unless elsewhere is asked
for: `run.html`, `run.png`, `run.svg`; beside them, of a single run, `layers.png` and `noise.png`
where it recorded trust ratios by layer or its noise scale.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from matplotlib.figure import Figure

from largebatch.common.figures import DPI, paper_style
from largebatch.common.text import duration
from largebatch.records import printable
from largebatch.records.names import EVALUATED, METRICS
from largebatch.records.summary import status_in_words
from largebatch.study.page.axes import NARROW, WIDE, Picture
from largebatch.study.page.html import Drawn, figure_of, provenance_of, rendered, table_of
from largebatch.study.page.styles import curve_styles
from largebatch.study.page.svg import svg_of, themed, write_png
from largebatch.study.page.tables import Entry, Listing
from largebatch.study.page.terminal import terminal_table
from largebatch.study.page.words import DASH, plural
from largebatch.study.single_runs.figure import MOST_METRICS, Against, runs_figure
from largebatch.study.single_runs.history import RunHistory, is_run, names_of, read_history
from largebatch.study.single_runs.layers import layers_figure, read_layers
from largebatch.study.single_runs.noise import noise_figure, read_noise

if TYPE_CHECKING:
    from rich.console import Console

_LONGEST_TITLE: Final = 80
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
    title = f"Run {next(iter(histories))}" if len(read) == 1 else plural(len(read), "run")
    told = f"{title}: loss and what was recorded beside it over {against}"
    draw = partial(runs_figure, read, [*histories], styles, against=against)
    drawn = _drawn(draw, told, pictures["run"], pictures["run.svg"])
    figures = [figure_of(drawn, _CAPTION, is_tall=True)]
    if len(folders) == 1:
        for name, caption in _SINGLE.items():
            png = target / f"{name}.png"
            if (one := _single(name, caption, folders[0], problems, png)) is not None:
                figures.append(figure_of(one, caption))
                pictures[name] = png
    words = ["largebatch", "report", *map(str, folders), *(["--out", str(out)] if out else [])]
    words += ["--against", against] if against != "samples" else []
    html = target / "run.html"
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
                Entry(status_in_words(history.status)),
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


def _single(name: str, told: str, folder: Path, problems: list[str], png: Path) -> Drawn | None:
    """Draw a picture that only one run can have; None where it did not record what it shows."""
    try:
        draw: Callable[..., Figure]
        if name == "layers":
            draw = partial(layers_figure, read_layers(folder, problems))
        else:
            draw = partial(noise_figure, read_noise(folder, problems))
    except ValueError:
        return None
    title = f"{told}: {folder.resolve().name}"

    def titled(width: float) -> Picture:
        # The page's caption says it too, and a phone has no room for a name.
        return Picture(draw(title[:_LONGEST_TITLE] if width >= WIDE else "", width))

    return _drawn(titled, title, png)


def _drawn(
    draw: Callable[[float], Picture], told: str, png: Path, file: Path | None = None
) -> Drawn:
    """Draw for paper and for phones, and write the picture as PNG and, into `file`, as SVG."""
    with paper_style():
        wide, narrow = draw(WIDE), draw(NARROW)
        write_png(wide, png)
        shown = svg_of(wide, f"w-{png.stem}-")
        if file is not None:
            file.write_text(shown, encoding="utf-8")
        narrow.tips.clear()  # no pointer rests on a phone
        narrow.figure.set_dpi(DPI)
        return Drawn(themed(shown, told), themed(svg_of(narrow, f"n-{png.stem}-"), told))


def _number(value: float | None, form: str) -> Entry:
    return Entry(DASH) if value is None else Entry(format(value, form), value)
