"""`largebatch report DIR …`: folders of runs become sentences, tables, pictures and one page.

Written into DIR, or where `--out` says: `report.html` (self-contained), `curve`, `ratio`,
`learning_rate` and `basins` as .png and .svg, `curve.csv`, `fits.csv`, `pairs.csv`, `basin.csv`,
and `rules.csv` where runs under a scaling rule stand beside tuned ones. Runs that spent their
budgets without a target have `final_loss` .png and .svg, `final_loss.csv`, `loss_pairs.csv` and
`loss_basin.csv`. Several folders are compared on one page. Folders of single runs are drawn over
their course instead, laid over each other (`single_runs/`). Exit code 0, or 2 and one sentence on
stderr where there is nothing to report.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from largebatch.common.loading import load, load_matplotlib
from largebatch.common.text import missing
from largebatch.records import printable
from largebatch.records.names import METRICS
from largebatch.study.final_loss.page import FIGURE, loss_html, print_losses
from largebatch.study.final_loss.section import LossSection
from largebatch.study.final_loss.tables import write_loss_csv
from largebatch.study.forks import made, may_fork
from largebatch.study.page.csv_files import write_csv_files
from largebatch.study.page.html import Drawn, page_of, section_titles
from largebatch.study.page.references import SOURCES, Reference, references
from largebatch.study.page.terminal import print_study
from largebatch.study.section_study import Study, read_study

if TYPE_CHECKING:
    from rich.console import Console

    from largebatch.study.page.axes import Picture
    from largebatch.study.page.styles import Style

_LONGEST_NAME: Final = 60


@dataclass(frozen=True)
class StudyReport:
    """A study and the files that tell it, by name: `curve`, `ratio`, …; `rules` only where there
    are rule runs.
    """

    study: Study
    html: Path
    pictures: Mapping[str, Path]
    tables: Mapping[str, Path]


def write_report(
    *folders: Path | str, out: Path | str | None = None, reference: Sequence[str] = (),
    forked: bool = False,
) -> StudyReport:  # fmt: skip
    """Write the report of the runs below `folders` into `out` (default: the first of them).

    Args:
        reference: published curves to draw beside the study's: mlperf, zhang.
        forked: half of the pictures are drawn by a copy of this process, which must have no other
            threads.

    Raises as `read_study` does, before anything is written; `ValueError` for a reference that there
    is not.
    """
    published = references(reference)
    study = read_study(*folders)
    target = Path(folders[0] if out is None else out)
    target.mkdir(parents=True, exist_ok=True)
    tables = write_csv_files(study, target) if study.sections else {}
    if study.losses:
        tables |= write_loss_csv(study.losses, target)
    pictures: dict[str, Path] = {}
    drawn = [
        _draw(study, place, target, name, pictures, published, forked)
        for place, name in enumerate(_file_names(study))
    ]
    further = [
        (one.title, loss_html(one, _draw_losses(study, one, target, pictures)))
        for one in study.losses
    ]
    words = ["largebatch", "report", *map(str, folders)]
    words += ["--reference", ",".join(reference)] if reference else []
    command = printable(shlex.join(words if out is None else [*words, "--out", str(out)]))
    html = target / "report.html"
    sources = [SOURCES[name] for name in reference]
    files = [*tables.values(), *pictures.values()]
    html.write_text(page_of(study, drawn, files, command, sources, further), encoding="utf-8")
    return StudyReport(study, html, pictures, tables)


def print_report(report: StudyReport, console: "Console | None" = None) -> None:
    """The points, the answers and where the files lie, on the terminal."""
    from largebatch.common.console import output_console

    console = console or output_console()
    print_study(report.study, console)
    for one in report.study.losses:
        print_losses(one, console)
    for problem in report.study.problems:
        console.print(f"note: {printable(problem)}", style="yellow", highlight=False, markup=False)
    console.print(f"report: {report.html}", highlight=False, markup=False, soft_wrap=True)


def main(argv: Sequence[str]) -> int:
    """`largebatch report DIR … [--out DIR]`; 0, or 2 where there is nothing to report."""
    parser = argparse.ArgumentParser(
        prog="largebatch report",
        usage="largebatch report [OPTIONS] FOLDER …",
        description=__doc__.split("\n")[0],
        epilog="exit codes: 0 done; 2 refused, or nothing to report",
    )
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="folder",
        help="a folder with runs at any depth, several to compare studies; or single runs' folders",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="where to write (default: the first folder)")
    parser.add_argument(
        "--reference", default="", metavar="NAMES",
        help=f"published curves to draw beside these: {','.join(SOURCES)}",
    )  # fmt: skip
    parser.add_argument(
        "--against", choices=("samples", "steps", "seconds"), default="samples",
        help="what single runs are drawn over (default: samples)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    named = [name for name in arguments.reference.split(",") if name]
    folders = arguments.folders
    try:
        if all(folder.is_dir() for folder in folders):  # else it is refused, at once
            load_matplotlib()
            load("largebatch.study.page.svg")
        if any((folder / METRICS).is_file() for folder in folders):
            from largebatch.study.single_runs.report import print_runs, write_runs_report

            print_runs(write_runs_report(*folders, out=arguments.out, against=arguments.against))
        else:
            print_report(
                write_report(*folders, out=arguments.out, reference=named, forked=may_fork())
            )
    except ModuleNotFoundError as error:
        advice = "install it with: pip install 'largebatch[train]'"
        print(f"largebatch report needs {missing(error)}; {advice}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"largebatch report: {printable(error)}", file=sys.stderr)
        return 2
    return 0


def _file_names(study: Study) -> list[str]:
    """What each section adds to the names of its pictures: nothing where it is the only one."""
    if len(study.sections) == 1:
        return [""]
    names: list[str] = []
    for section in study.sections:
        target = str(section.section.target).removeprefix("loss ")
        text = f"-{section.section.task}-{target}"
        name = re.sub(r"[^A-Za-z0-9.]+", "-", text)[:_LONGEST_NAME]
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
    return names


def _draw(
    study: Study, place: int, folder: Path, suffix: str, pictures: dict[str, Path],
    published: Sequence[Reference], forked: bool,
) -> dict[str, Drawn]:  # fmt: skip
    """Draw a section's pictures, write them as files and note these in `pictures`."""
    from largebatch.study.page.figures import ratio_figure, steps_figure
    from largebatch.study.page.rate_figures import basin_figure, rate_figure

    section, styles = study.sections[place], _styles(study)
    kinds: dict[str, tuple[Callable[..., Picture], str]] = {
        "curve": (partial(steps_figure, published=published), "Steps to target against batch size"),
        "ratio": (ratio_figure, "Steps against batch size, over those of the first curve"),
        "learning_rate": (rate_figure, "Best learning rate against batch size"),
        "basins": (basin_figure, "Steps to target against learning rate at each batch size"),
    }
    if not any(pair.points for pair in section.pairs if pair.other == section.names[0]):
        del kinds["ratio"]
    titles = section_titles(study)
    drawn = made(
        [
            partial(
                _drawn, partial(draw, study, section, styles),
                f"{description}: {titles[place]}", *_noted(f"{name}{suffix}", folder, pictures),
            )
            for name, (draw, description) in kinds.items()
        ],
        forked=forked,
    )  # fmt: skip
    return dict(zip(kinds, drawn, strict=True))


def _draw_losses(
    study: Study, section: LossSection, folder: Path, pictures: dict[str, Path]
) -> dict[str, Drawn]:
    """Draw the final losses of a section."""
    from largebatch.study.final_loss.figures import final_loss_figure

    several = len(study.losses) > 1
    suffix = re.sub(r"[^A-Za-z0-9.]+", "-", f"-{section.task}")[:_LONGEST_NAME] if several else ""
    draw = partial(final_loss_figure, section, _styles(study))
    told = f"Final loss against batch size: {section.title}"
    return {FIGURE: _drawn(draw, told, *_noted(f"{FIGURE}{suffix}", folder, pictures))}


def _styles(study: Study) -> Mapping[str, "Style"]:
    from largebatch.study.page.styles import curve_styles

    curves = [(c.name, c.optimizer) for s in study.sections for c in s.section.curves]
    return curve_styles([*curves, *(pair for one in study.losses for pair in one.curves)])


def _noted(name: str, folder: Path, pictures: dict[str, Path]) -> tuple[Path, Path]:
    """A picture's files, noted in `pictures`."""
    pictures |= {name: folder / f"{name}.png", f"{name}.svg": folder / f"{name}.svg"}
    return pictures[name], pictures[f"{name}.svg"]


def _drawn(draw: Callable[[float], "Picture"], told: str, png: Path, svg: Path) -> Drawn:
    """Draw for paper and for phones, and write the files."""
    from largebatch.common.figures import paper_style
    from largebatch.study.page.axes import NARROW, WIDE
    from largebatch.study.page.svg import svg_of, themed, write_png

    with paper_style():
        picture = draw(WIDE)
        write_png(picture, png)
        wide = svg_of(picture, f"w-{png.stem}-")
        svg.write_text(wide, encoding="utf-8")
        phone = draw(NARROW)
        phone.tips.clear()  # no pointer rests on a phone
        narrow = svg_of(phone, f"n-{png.stem}-")
    return Drawn(themed(wide, told), themed(narrow, told))
