"""Where commands print what they found."""

from typing import Final

from rich.console import Console

WIDTH: Final = 160
"""Characters of a line in a pipe or a file, so many that no cell of a table is cut."""


def output_console() -> Console:
    """Make the console of standard output."""
    found = Console()
    return found if found.is_terminal else Console(width=WIDTH)
