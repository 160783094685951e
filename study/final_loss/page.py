"""Final losses on the page and on the terminal."""

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING

from largebatch.records import printable
from largebatch.study.final_loss.answers import loss_answers
from largebatch.study.final_loss.section import LossSection
from largebatch.study.final_loss.tables import all_listings, short_listing
from largebatch.study.page.html import Drawn, figure_of, heading_of, table_of
from largebatch.study.page.terminal import terminal_table

if TYPE_CHECKING:
    from rich.console import Console

FIGURE = "final_loss"


def loss_html(study: LossSection, drawn: Mapping[str, Drawn]) -> str:
    """A section's part of the page, without its title."""
    said = "".join(
        f"<dt>{escape(asked)}</dt><dd>{escape(text)}</dd>" for asked, text in loss_answers(study)
    )
    bars = "Bars are 95% intervals." if study.has_intervals else "One seed a point: no bars."
    parts = [
        f'<dl class="answers">{said}</dl>',
        heading_of("Final loss"),
        figure_of(
            drawn[FIGURE].wide,
            drawn[FIGURE].narrow,
            "Evaluation loss when the budget is spent, against the global batch size, each point "
            f"at its best learning rate. {bars}",
        ),
        *(table_of(listing, caption) for caption, listing in all_listings(study)),
    ]
    return "".join(parts)


def print_losses(study: LossSection, console: "Console") -> None:
    """Print a section's points and answers."""
    console.print(terminal_table(study.title, short_listing(study)))
    for asked, text in loss_answers(study):
        console.print(printable(f"{asked}: {text}"), highlight=False, markup=False)
