"""The page of a study: one file that holds its sentences, pictures and tables.

Answers first; where the numbers come from, last. It runs nothing but a few lines that sort tables.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from largebatch.common.text import duration
from largebatch.records import printable
from largebatch.study.costs import read_cost
from largebatch.study.page.answers import answers
from largebatch.study.page.tables import (
    Listing,
    basins_table,
    by_curve,
    fits_table,
    points_table,
    ratios_table,
    rules_table,
    trials_table,
)
from largebatch.study.page.words import in_a_row, plural, seeds_in_words, short_hash
from largebatch.study.points import is_tuned
from largebatch.study.reading import recorded
from largebatch.study.section_study import SectionStudy, Study

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

TEMPLATES: Final = Path(__file__).with_name("templates")
_PROVENANCE: Final = {
    "command": "command", "data": "data", "data_hash": "data hash", "device": "device",
    "world_size": "ranks", "versions": "versions", "git_commit": "commit",
}  # fmt: skip
MOST_RECORDED: Final = 3
"""Values of one entry of provenance that the page lists."""


@dataclass(frozen=True)
class Drawn:
    """A picture as the page holds it, as SVG: for wide screens and paper, and for phones."""

    wide: str
    narrow: str


def page_title(study: Study) -> str:
    """What the study asks, and of what."""
    question = "How far can the batch grow?"
    titles = [*section_titles(study), *(one.title for one in study.losses)]
    if len(study.sections) > 1:
        return f"{question} {plural(len(study.sections), 'task')}"
    return f"{question} {printable(titles[0])}"


def section_titles(study: Study) -> list[str]:
    """Of each section its task and target, the data where these do not tell, and what was tried."""
    measured = [(one.section.task, one.section.target) for one in study.sections]
    titles = []
    for one, (task, target) in zip(study.sections, measured, strict=True):
        data = one.section.data_hash or "unknown"
        alike = measured.count((task, target)) > 1
        titles.append(
            f"{printable(task)} to {printable(target)}"
            + f" (data {printable(short_hash(data))})" * alike
            + f": {plural(len(one.names), 'curve')}, {plural(len(one.batch_sizes), 'batch size')}, "
            f"{plural(len(one.seeds), 'seed')}"
        )
    return titles


def page_of(
    study: Study, pictures: Sequence[Mapping[str, Drawn]], files: Iterable[Path], command: str,
    sources: Sequence[str] = (), more: Sequence[tuple[str, "Markup"]] = (),
) -> str:  # fmt: skip
    """The page; `pictures` are those of each section by name, `sources` of published curves, `more`
    the titles and bodies of further sections.
    """
    titles = [*section_titles(study), *(printable(title) for title, _ in more)]
    bodies = [
        _section(section, drawn, sources)
        for section, drawn in zip(study.sections, pictures, strict=True)
    ]
    return rendered(
        "report.html", page_title(study), command,
        sections=[*zip(titles, [*bodies, *(body for _, body in more)], strict=True)],
        problems=study.problems,
        files=[path.name for path in files],
        provenance=_provenance(study),
    )  # fmt: skip


def _section(study: SectionStudy, drawn: Mapping[str, Drawn], sources: Sequence[str]) -> "Markup":
    parts = [answers_of([(one.question, one.text) for one in answers(study)])]
    first = study.names[0]
    bars = "Bars are 95% intervals. " if study.has_intervals else "One seed a point: no bars. "
    parts += [
        heading_of("Steps to target"),
        _figure(
            drawn, "curve",
            f"Optimizer steps to the target against the global batch size, each at its best "
            f"learning rate. {bars}Thin lines are fits; the upright tick on each is its critical "
            "batch size, with its interval below. Dashed: twice the batch, half the steps."
            + _floor(study)
            + _published(sources, first),
        ),
    ]  # fmt: skip
    if "ratio" in drawn:
        bands = (
            "A band holds at all batch sizes at once; a hollow marker is not told apart from 1. "
            if study.has_intervals
            else "One seed a point: no band. "
        )
        parts += [
            heading_of(f"Against {first}"),
            _figure(
                drawn, "ratio",
                f"Steps over those of {first}, the curve of fewest steps, seed by seed. {bands}"
                "Above 1: more steps.",
            ),
        ]  # fmt: skip
    parts += [
        heading_of("Critical batch size and what is worth it"),
        table_of(fits_table(study), _FITS_NOTE),
        heading_of("Learning rates"),
        _figure(
            drawn, "learning_rate",
            "Best peak learning rate at each batch size, one panel a curve; all panels span the "
            "same number of decades. Shaded: rates that cost at most 10%. Cross: the lowest rate "
            "above that missed. Hollow: at the edge of the rates tried, so a better one may lie "
            "outside. Grey lines grow as B and as √B from the smallest batch.",
        ),
        _figure(
            drawn, "basins",
            "Steps to target against learning rate at each batch size, rates over the best one "
            "(the table has them). Lines join the runs of the "
            "seed that tried most rates, small markers are other seeds. Crosses along the top "
            "missed the target or diverged; triangles were cut, since they could only have lost.",
        ),
        table_of(basins_table(study), "How far off the best rate may be."),
        heading_of("Points"),
        table_of(points_table(study), "Steps are geometric means over the seeds."),
    ]  # fmt: skip
    if "ratio" in drawn:
        parts.append(table_of(ratios_table(study), f"Steps over those of {first}."))
    if study.rules:
        parts += [
            heading_of("Scaling rules"),
            table_of(
                rules_table(study.rules),
                "Learning rates that a rule carried over from the base batch, against the best one "
                "found at each batch: a ratio of 1 is as good as a search.",
            ),
        ]
    parts += [
        heading_of("Trials"),
        table_of(
            trials_table(study),
            "What each curve was given" + _allowed(study) + ". Runs that were cut ended early, "
            "as they could only have lost." + _untuned(study),
        ),
    ]
    return joined(parts)


_FITS_NOTE: Final = (
    "Batch sizes in samples, by the fit. B_crit: where both asymptotes meet, with n = 1 twice the "
    "fewest steps and samples. n: how sharply the curve bends there. CBS20: where a run takes 20% "
    "more samples than at the smallest batch. B_80, B_50: where 80% and 50% of that batch's sample "
    "efficiency are left."
)


def _allowed(study: SectionStudy) -> str:
    if study.most_trials is None:
        return ""
    return f"; the climb at a point may take up to {study.most_trials} trials, for all alike"


def _untuned(study: SectionStudy) -> str:
    names = [curve.name for curve in study.section.curves if not is_tuned(curve)]
    if not names:
        return ""
    return f" The curve of {in_a_row(names)} follows a scaling rule: no rate was searched."


def _floor(study: SectionStudy) -> str:
    if study.floor is None:
        return ""
    return (
        f" Dotted: {printable(study.floor.name)}, each layer's block solved at every step, from "
        "largebatch bench gauss_newton: how few steps a layer-wise method could need."
    )


def _published(sources: Sequence[str], first: str) -> str:
    if not sources:
        return ""
    return (
        f" Grey, with small marks: {'; '.join(sources)}. They are moved so that critical batch "
        f"size and fewest steps are those of {first}: compare the bends, not the places."
    )


def heading_of(text: str) -> "Markup":
    """A heading within a section."""
    return _part("heading", text=text)


def answers_of(pairs: Sequence[tuple[str, str]]) -> "Markup":
    """Questions and what is to be said of them."""
    return _part("answers", pairs=pairs)


def _figure(drawn: Mapping[str, Drawn], name: str, caption: str) -> "Markup":
    return figure_of(drawn[name], caption)


def figure_of(drawn: Drawn, caption: str, is_tall: bool = False) -> "Markup":
    """A picture with what it shows in words; on paper one that is tall has a page."""
    from markupsafe import Markup

    return _part(
        "figure", wide=Markup(drawn.wide), narrow=Markup(drawn.narrow), caption=caption,
        is_tall=is_tall,
    )  # fmt: skip


def table_of(listing: Listing, caption: str) -> "Markup":
    """A table; a line sets off each curve's rows."""
    words = [head in listing.words for head in listing.heads]
    return _part(
        "table", caption=caption, columns=[*zip(listing.heads, words, strict=True)],
        rows=[
            (begins, [*zip(row, words, strict=True)]) for begins, row in by_curve(listing.rows)
        ],
    )  # fmt: skip


def joined(parts: Iterable["Markup"]) -> "Markup":
    """Parts one after another."""
    from markupsafe import Markup

    return Markup().join(parts)


def rendered(template: str, title: str, command: str, **values: object) -> str:
    """A page by its template; text is escaped, parts are not.

    Args:
        command: that makes the page again.
    """
    from markupsafe import Markup

    from largebatch.study.page.svg import style_sheet

    css, script = (
        (TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.css", "sort.js")
    )
    return _templates().get_template(template).render(
        title=title, command=command, style=Markup(f"{style_sheet()}\n{css}"),
        script=Markup(script), **values,
    )  # fmt: skip


def _part(name: str, **values: object) -> "Markup":
    macro: Callable[..., Markup] = getattr(_templates().get_template("parts.html").module, name)
    return macro(**values)


@cache
def _templates() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def _provenance(study: Study) -> list[str]:
    """What ran, on what: a fact a line, hashes shortened."""
    runs = study.runs
    seconds = sum(run.seconds or 0.0 for run in runs)
    seeds = sorted({run.seed for run in runs})
    facts = [
        f"folder: {in_a_row([printable(folder) for folder in study.folders])}",
        f"{plural(len(runs), 'finished run')}, {seeds_in_words(seeds)}",
    ]
    if seconds:
        facts.append(f"together they took {duration(seconds)}")
    costs = [cost.in_words() for cost in map(read_cost, study.folders) if cost is not None]
    facts += [words for words in costs if words]
    return [*facts, *provenance_of([run.provenance for run in runs])]


def provenance_of(records: Sequence[Mapping[str, object]]) -> list[str]:
    """What runs ran on, with which data and versions: a fact a line, hashes shortened."""
    facts = []
    for key, label in _PROVENANCE.items():
        if values := recorded(records, key):
            more = f" and {len(values) - MOST_RECORDED} more" * (len(values) > MOST_RECORDED)
            facts.append(f"{label}: {' / '.join(map(short_hash, values[:MOST_RECORDED]))}{more}")
    return facts
