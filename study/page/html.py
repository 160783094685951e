"""The page of a study: one file that holds its sentences, pictures and tables.

Answers first; where the numbers come from, last. It runs nothing but a few lines that sort tables.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Final

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

TEMPLATES: Final = Path(__file__).with_name("templates")
_PROVENANCE: Final = {
    "command": "command", "data": "data", "data_hash": "data hash", "device": "device",
    "world_size": "ranks", "versions": "versions", "git_commit": "commit",
}  # fmt: skip
MOST_RECORDED: Final = 3
"""Values of one entry of provenance that the page lists."""


@dataclass(frozen=True)
class Drawn:
    """A picture as the page holds it: for wide screens and paper, and for phones."""

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
    sources: Sequence[str] = (), more: Sequence[tuple[str, str]] = (),
) -> str:  # fmt: skip
    """The page; `pictures` are those of each section by name, `sources` of published curves, `more`
    the titles and bodies of further sections.
    """
    from largebatch.study.page.svg import style_sheet

    titles = [*section_titles(study), *(printable(title) for title, _ in more)]
    several = len(titles) > 1
    headings = [
        f'<h2 id="task-{number}">{escape(title)}</h2>' if several else ""
        for number, title in enumerate(titles, 1)
    ]
    bodies = [
        _section(section, drawn, heading, sources)
        for section, drawn, heading in zip(study.sections, pictures, headings, strict=False)
    ]
    further = zip(headings[len(study.sections) :], more, strict=True)
    bodies += [f"<section>{heading}{body}</section>" for heading, (_, body) in further]
    template = Template((TEMPLATES / "report.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(page_title(study)),
        style=style_sheet() + "\n" + (TEMPLATES / "page.css").read_text(encoding="utf-8"),
        script=(TEMPLATES / "sort.js").read_text(encoding="utf-8"),
        contents=_contents(titles) if several else "",
        sections="\n".join(bodies),
        problems=_problems(study.problems),
        files=", ".join(f'<a href="{escape(p.name)}">{escape(p.name)}</a>' for p in files),
        provenance=items_of(_provenance(study)),
        command=escape(command),
    )


def _contents(titles: Sequence[str]) -> str:
    links = [
        f'<a href="#task-{number}">{escape(title)}</a>' for number, title in enumerate(titles, 1)
    ]
    return f"<nav><ul>{''.join(f'<li>{link}</li>' for link in links)}</ul></nav>"


def _section(
    study: SectionStudy, drawn: Mapping[str, Drawn], heading: str,
    sources: Sequence[str],
) -> str:  # fmt: skip
    said = "".join(
        f"<dt>{escape(one.question)}</dt><dd>{escape(one.text)}</dd>" for one in answers(study)
    )
    parts = [heading, f'<dl class="answers">{said}</dl>']
    first = study.names[0]
    bars = "Bars are 95% intervals. " if study.has_intervals else "One seed a point: no bars. "
    parts += [
        heading_of("Steps to target"),
        _figure(
            drawn, "curve",
            f"Optimizer steps to the target against the global batch size, each at its best "
            f"learning rate. {bars}Thin lines are fits; the upright tick on each is its critical "
            "batch size, with its interval below. Dashed: twice the batch, half the steps."
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
    return f"<section>{''.join(parts)}</section>"


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


def _published(sources: Sequence[str], first: str) -> str:
    if not sources:
        return ""
    return (
        f" Grey, with small marks: {'; '.join(sources)}. They are moved so that critical batch "
        f"size and fewest steps are those of {first}: compare the bends, not the places."
    )


def heading_of(text: str) -> str:
    """A heading within a section."""
    return f"<h3>{escape(text)}</h3>"


def _figure(drawn: Mapping[str, Drawn], name: str, caption: str) -> str:
    return figure_of(drawn[name].wide, drawn[name].narrow, caption)


def figure_of(wide: str, narrow: str, caption: str) -> str:
    """A picture for wide screens and for phones, with what it shows in words."""
    return (
        f'<figure><div class="for-wide">{wide}</div><div class="for-phone">{narrow}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def table_of(listing: Listing, caption: str) -> str:
    """A table; a line sets off each curve's rows."""
    words = [head in listing.words for head in listing.heads]
    heads = "".join(
        f'<th scope="col"{_word(is_word)}><button type="button">{escape(head) or "remarks"}'
        "</button></th>"
        for head, is_word in zip(listing.heads, words, strict=True)
    )
    rows = []
    for begins, row in by_curve(listing.rows):
        cells = "".join(
            f"<td{_word(is_word)}"
            + ("" if entry.number is None else f' data-n="{entry.number:.6g}"')
            + f">{escape(entry.text)}"
            + f"<small>{escape(entry.interval)}</small>" * bool(entry.interval)
            + "</td>"
            for entry, is_word in zip(row, words, strict=True)
        )
        rows.append(f'<tr class="first">{cells}</tr>' if begins else f"<tr>{cells}</tr>")
    return (
        f'<p class="soft">{escape(caption)}</p><div class="wide" tabindex="0"><table>'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>"
    )


def _word(is_word: bool) -> str:
    return ' class="words"' if is_word else ""


def _problems(problems: Sequence[str]) -> str:
    if not problems:
        return ""
    return f'<h2>Left out</h2><ul class="soft">{items_of(problems)}</ul>'


def items_of(lines: Iterable[str]) -> str:
    """Lines as the items of a list."""
    return "\n".join(f"<li>{escape(line)}</li>" for line in lines)


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
