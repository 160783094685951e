"""The look of each curve: an optimizer has one colour and one marker in every picture.

Colours go by name, never by position, so that two studies show an optimizer alike. All have a
contrast of 3 or more on the page's paper, light and dark, and no fact is shown by colour alone.
"""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

from largebatch.common.figures import COLOURS

Line = Literal["-", "--", "-.", ":"]
Name = TypeVar("Name", bound=str)
LINES: Final[tuple[Line, ...]] = ("-", "--", "-.", ":")
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "*")

DARK: Final = dict(
    zip(
        COLOURS,
        ("#4aa8e8", "#ff8a45", "#2fc79b", "#e39cc4", "#e0a92e", "#8fd0f7", "#e7e9ec", "#c99b6d"),
        strict=True,
    )
)
"""Of each colour, what stands for it on dark paper."""


@dataclass(frozen=True)
class Style:
    """How a curve is drawn."""

    colour: str
    marker: str
    line: Line = "-"


_FIRST: Final = {
    name: Style(colour, marker)
    for name, colour, marker in zip(
        ("adamw", "lamb", "lars", "sgd", "kfac", "shampoo", "muon", "soap"),
        COLOURS,
        MARKERS,
        strict=True,
    )
}
_KIN: Final[dict[str, tuple[str, str, Line]]] = {
    "muon_hyperball": ("muon", "s", "--"),
    "mano": ("muon", "^", ":"),
    "kl_soap": ("soap", "o", "--"),
    "soap_muon": ("soap", "v", "-."),
}
KNOWN: Final = _FIRST | {
    name: Style(_FIRST[of].colour, marker, line) for name, (of, marker, line) in _KIN.items()
}
"""Kin have one colour, with other lines and markers."""


def curve_styles(curves: Iterable[tuple[str, str]]) -> dict[str, Style]:
    """A style for each (curve, optimizer): the first of an optimizer by name has its own, others
    have its colour with another line and marker.

    Where all curves are of one optimizer, colours tell them apart.
    """
    kinds: dict[str, list[str]] = {}
    for curve, optimizer in sorted(set(curves)):
        kinds.setdefault(optimizer, []).append(curve)
    own = _optimizer_styles(kinds)
    found = {}
    for optimizer, names in kinds.items():
        first, alone = own[optimizer], len(kinds) == 1
        for place, name in enumerate(names):
            turn = place // len(COLOURS) if alone else place
            found[name] = Style(
                _from(COLOURS, first.colour, place if alone else place // len(LINES)),
                _from(MARKERS, first.marker, place),
                _from(LINES, first.line, turn),
            )
    return found


def _optimizer_styles(names: Iterable[str]) -> dict[str, Style]:
    """Known optimizers by the table; others by their name, among what is left."""
    names = sorted(names)
    found = {name: KNOWN[name] for name in names if name in KNOWN}
    for name in names:
        if name not in found:
            taken = {style.colour for style in found.values()}
            start = zlib.crc32(name.encode("utf-8", "replace")) % len(COLOURS)
            places = [(start + step) % len(COLOURS) for step in range(len(COLOURS))]
            place = next((p for p in places if COLOURS[p] not in taken), start)
            found[name] = Style(COLOURS[place], MARKERS[place])
    return found


def _from(cycle: tuple[Name, ...], first: Name, place: int) -> Name:
    return cycle[(cycle.index(first) + place) % len(cycle)]
