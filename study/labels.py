"""Names from records and numbers, as pictures and spreadsheets show them."""

from typing import Final

LONGEST: Final = 60  # characters


def label(name: str) -> str:
    """The name in a figure's text as it is: not as mathematics, and none too long to lay out."""
    shown = name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
    # matplotlib leaves a label that begins with _ out of its legends.
    return (" " * shown.startswith("_") + shown).replace("$", r"\$")


def cell(value: object) -> str:
    """A cell of a CSV file; text never begins as what a spreadsheet takes for a formula."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    return "'" * (str(value)[:1] in tuple("=+-@")) + str(value)


def plain(value: float, _: object = None) -> str:
    """1,024 and 0.02 rather than 10³ and 2 x 10⁻²."""
    return f"{value:,.0f}" if value >= 1 and value == round(value) else f"{value:.4g}"
