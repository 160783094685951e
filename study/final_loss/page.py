"""Final losses on the page and on the terminal."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from largebatch.records import printable
from largebatch.study.final_loss.answers import loss_answers
from largebatch.study.final_loss.section import LossSection
from largebatch.study.final_loss.tables import all_listings, points_listing
from largebatch.study.page.html import Drawn, answers_of, figure_of, heading_of, joined, table_of
from largebatch.study.page.terminal import terminal_table

if TYPE_CHECKING:
    from markupsafe import Markup
    from rich.console import Console

FIGURE = "final_loss"


def loss_html(study: LossSection, drawn: Mapping[str, Drawn]) -> "Markup":
    """A section's part of the page, without its title."""
    bars = "Bars are 95% intervals." if study.has_intervals else "One seed a point: no bars."
    parts = [
        answers_of(loss_answers(study)),
        heading_of("Final loss"),
        figure_of(
            drawn[FIGURE],
            "Evaluation loss when the budget is spent, against the global batch size, each point "
            f"at its best learning rate. {bars}",
        ),
        *(table_of(listing, caption) for caption, listing in all_listings(study)),
    ]
    return joined(parts)


def print_losses(study: LossSection, console: "Console") -> None:
    """Print a section's points and answers."""
    console.print(terminal_table(study.title, points_listing(study), console))
    for asked, text in loss_answers(study):
        console.print(printable(f"{asked}: {text}"), highlight=False, markup=False)
