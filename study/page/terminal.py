"""A study on the terminal: its points, its answers, and what was left out."""

from typing import TYPE_CHECKING

from largebatch.records import printable
from largebatch.study.page.answers import answers
from largebatch.study.page.html import section_titles
from largebatch.study.page.tables import Listing, by_curve, points_table, rules_table
from largebatch.study.section_study import Study

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_study(study: Study, console: "Console") -> None:
    """Print each section."""
    for section, title in zip(study.sections, section_titles(study), strict=True):
        console.print(terminal_table(title, points_table(section), console))
        for one in answers(section):
            line = printable(f"{one.question}: {one.text}")
            console.print(line, highlight=False, markup=False)
        if section.rules:
            console.print(terminal_table("scaling rules", rules_table(section.rules), console))


def terminal_table(title: str, listing: Listing, console: "Console") -> "Table":
    """A table for a terminal, without as many of the listing's spare columns as leave no cell cut;
    a line sets off each curve's rows.
    """
    from rich.measure import Measurement

    left_out: set[str] = set()
    unbounded = console.options.update(max_width=1 << 16)
    table = _table(title, listing, left_out)
    for head in listing.spare:
        if Measurement.get(console, unbounded, table).minimum <= console.width:
            break
        left_out.add(head)
        table = _table(title, listing, left_out)
    return table


def _table(title: str, listing: Listing, left_out: set[str]) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape as plain
    from rich.table import Table

    kept = [place for place, head in enumerate(listing.heads) if head not in left_out]
    table = Table(title=plain(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for place in kept:
        head = listing.heads[place]
        if head in listing.words:
            table.add_column(head)
        else:
            cells = (printable(row[place].whole) for row in listing.rows)
            widest = max(map(len, (head, *cells)))
            table.add_column(head, justify="right", no_wrap=True, min_width=widest)
    for begins, row in by_curve(listing.rows):
        if begins:
            table.add_section()
        table.add_row(*(plain(printable(row[place].whole)) for place in kept))
    return table
