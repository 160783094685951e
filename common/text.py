"""Text from a file, made safe to show."""

from typing import Any, Final

LONGEST: Final = 80  # characters of a value in a sentence
_ENDS: Final = " …"


def printable(text: object) -> str:
    """In one line and without effect on a terminal: control and direction characters, and what
    no encoding has, are written as their escapes.
    """
    plain = str(text)
    if plain.isprintable():
        return plain
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in plain
    )


def shown(value: Any) -> str:
    """A value in a sentence: as Python writes it, and not all of a long one."""
    try:
        text = printable(repr(value))
    except (ValueError, RecursionError):  # a number of thousands of digits, lists in lists
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= LONGEST else text[: LONGEST - len(_ENDS)] + _ENDS
