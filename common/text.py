"""Text for people: made safe to show, lines and lists that fit, durations and sizes in words."""

import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple, TextIO

LONGEST: Final = 80  # characters of a value in a sentence
SEPARATOR: Final = " · "
"""Of the fields of a line."""
_ENDS: Final = " …"
_UNITS: Final = ("B", "kB", "MB", "GB", "TB")


def say(what: object) -> None:
    """One line on stderr."""
    print(f"largebatch: {what}", file=sys.stderr, flush=True)


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


class LineField(NamedTuple):
    """A field of a line; where the line is too long, those that weigh least go first."""

    text: str
    weight: int


def fitted(parts: Iterable[LineField], width: int | None) -> str:
    """Join the fields that fit into `width` characters, whole; None: all of them. Nothing where not
    even the one that weighs most fits.

    >>> line = [LineField("12%", 2), LineField("lr 0.02", 0), LineField("loss 2.61", 1)]
    >>> fitted(line, 20), fitted(line, 2), fitted(line, None)
    ('12% · loss 2.61', '', '12% · lr 0.02 · loss 2.61')
    """
    kept = list(parts)
    while kept and width is not None and len(SEPARATOR.join(part.text for part in kept)) > width:
        kept.remove(min(kept, key=lambda part: part.weight))
    return SEPARATOR.join(part.text for part in kept)


def wrapped(text: str, width: int | None) -> str:
    """Break a line between words, where a terminal of `width` characters would within them; None:
    leave it.

    >>> print(wrapped("lamb · batch 256 · runs/some/where", 20))
    lamb · batch 256 ·
      runs/some/where
    """
    if width is None or len(text) <= width:
        return text
    return textwrap.fill(
        text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def terminal_width(stream: TextIO) -> int | None:
    """Characters in a line of a terminal; None where the stream is another's: a pipe, a file."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or None if stream.isatty() else None
    except (OSError, ValueError):  # no descriptor of its own, or closed
        return None


def and_more(names: Sequence[object], most: int) -> str:
    """The first `most` of them and how many more there are: `a, b and 3 more`."""
    rest = len(names) - most
    return ", ".join(map(str, names[:most])) + (f" and {rest:,} more" if rest > 0 else "")


def common_words(lists: Sequence[Sequence[str]]) -> set[str]:
    """The words that all of several lists have, which set none of them apart.

    >>> common_words([["a", "b"], ["a", "c"]]), common_words([["a", "b"]])
    ({'a'}, set())
    """
    return set.intersection(*map(set, lists)) if len(lists) > 1 else set()


def int_spans(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """The first and the last of each run of numbers, which ascend."""
    spans: list[tuple[int, int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1] = spans[-1][0], number
        else:
            spans.append((number, number))
    return spans


def int_ranges(numbers: Iterable[int]) -> list[str]:
    """Ascending numbers as ranges, each in words: 0, 2-5, 7, 8; two in a row are no range."""
    return [
        f"{first}" if first == last else f"{first}{', ' if last == first + 1 else '-'}{last}"
        for first, last in int_spans(numbers)
    ]


def spell_cores(cores: Iterable[int]) -> str:
    """Cores as Linux and launchers write them: 42-47,94-99."""
    spans = int_spans(sorted(cores))
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def clock(seconds: float) -> str:
    """A duration as HH:MM:SS."""
    total = int(seconds)
    return f"{total // 3600:02}:{total // 60 % 60:02}:{total % 60:02}"


def duration(seconds: float) -> str:
    """A duration in the largest unit that fits twice: 90 seconds, 2 minutes, 3.5 hours."""
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"


def byte_size(num_bytes: float) -> str:
    """Bytes in the largest unit that leaves a digit before the point: 12.3 MB."""
    value, unit = float(num_bytes), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {_UNITS[unit]}"


def counted(number: float) -> str:
    """A count in three digits and a unit: 999, 1.05 k, 21 M.

    >>> [counted(number) for number in (7, 999, 1049, 120_000, 999_999, 2**30)]
    ['7', '999', '1.05 k', '120 k', '1 M', '1.07 G']
    """
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if float(f"{number:.3g}") >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def one_line(error: BaseException) -> str:
    """An exception's message in one line; its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """An exception's message without the stack that torch adds; its class where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


_PACKAGES: Final = {"hydra": "hydra-core", "sklearn": "scikit-learn", "PIL": "pillow"}


def missing(error: ModuleNotFoundError) -> str:
    """Return the package, as pip calls it, that brings the module which is not there."""
    module = (error.name or "").partition(".")[0]
    return _PACKAGES.get(module, module)
