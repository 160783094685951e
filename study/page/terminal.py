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
        console.print(terminal_table(title, _short(points_table(section))))
        for one in answers(section):
            line = printable(f"{one.question}: {one.text}")
            console.print(line, highlight=False, markup=False)
        if section.rules:
            console.print(terminal_table("scaling rules", rules_table(section.rules)))


def _short(listing: Listing) -> Listing:
    """Without the columns that a narrow terminal has no room for."""
    kept = [place for place, head in enumerate(listing.heads) if head not in ("samples", "seconds")]
    rows = [[row[place] for place in kept] for row in listing.rows]
    return Listing([listing.heads[place] for place in kept], rows, listing.words)


def terminal_table(title: str, listing: Listing) -> "Table":
    """A table for a terminal; a line sets off each curve's rows."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape as plain
    from rich.table import Table

    table = Table(title=plain(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for head in listing.heads:
        table.add_column(head, justify="left" if head in listing.words else "right")
    for begins, row in by_curve(listing.rows):
        if begins:
            table.add_section()
        table.add_row(*(plain(printable(entry.whole)) for entry in row))
    return table
