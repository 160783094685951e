"""Pictures as SVG, with a text on every marker, for a page that follows the reader's colours."""

import io
import re
import struct
import xml.etree.ElementTree as ET
import zlib
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any, Final

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_mixed import MixedModeRenderer
from matplotlib.backends.backend_svg import RendererSVG
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from largebatch.common.figures import COLOURS, DPI, GREY, GRID, INK
from largebatch.study.page.axes import Picture
from largebatch.study.page.styles import DARK

_SVG: Final = "http://www.w3.org/2000/svg"
_LINK: Final = "http://www.w3.org/1999/xlink"
_FONTS: Final = re.compile(r"'DejaVu Sans',[^;]*")
_PNG, _RGB, _UP = b"\x89PNG\r\n\x1a\n", 2, 2  # its signature, kind of pixels, filter of a row
_NO_METADATA: Final = dict.fromkeys(("Creator", "Date", "Format", "Type"))

PAPER: Final = ("#ffffff", "#16181b")
_VARIABLES: Final = {
    "paper": PAPER,
    "ink": (INK, "#e7e9ec"),
    "black": ("#000000", "#e7e9ec"),
    "grey": (GREY, "#9aa1a9"),
    "grid": (GRID, "#2f3338"),
    **{f"c{number}": (colour, DARK[colour]) for number, colour in enumerate(COLOURS)},
}
"""What stands for each colour of a picture on the page: its name, on light paper, on dark."""


def write_png(picture: Picture, path: Path) -> None:
    """The picture as PNG."""
    picture.figure.set_dpi(DPI)
    canvas: Any = FigureCanvasAgg(picture.figure)
    canvas.draw()
    path.write_bytes(png_of(np.asarray(canvas.buffer_rgba())[..., :3]))


def png_of(pixels: "np.ndarray[Any, np.dtype[np.uint8]]") -> bytes:
    """An image of (height, width, 3) as PNG, packed fast: each row less the one above it."""
    height, width, _ = pixels.shape
    rows = pixels.reshape(height, -1)
    packed = np.full((height, 1 + 3 * width), _UP, np.uint8)
    packed[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=packed[1:, 1:])
    a_metre = round(DPI / 0.0254)
    return _PNG + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (
            (b"IHDR", struct.pack(">2I5B", width, height, 8, _RGB, 0, 0, 0)),
            (b"pHYs", struct.pack(">2IB", a_metre, a_metre, 1)),
            (b"IDAT", zlib.compress(packed.tobytes(), 1)),
            (b"IEND", b""),
        )
    )


def svg_of(picture: Picture, prefix: str) -> str:
    """The picture as SVG; `prefix` sets its identifiers apart from those of others on a page."""
    figure, file = picture.figure, io.StringIO()
    images_dpi = figure.dpi
    figure.set_dpi(72)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "largebatch"}):
        svg = _RENDERER(*figure.bbox.size, file, image_dpi=images_dpi, metadata=_NO_METADATA)
        renderer = _MIXED(figure, *figure.get_size_inches(), images_dpi, svg)
        figure.draw(renderer)
        renderer.finalize()
    root = ET.fromstring(file.getvalue())
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    for name in ("width", "height"):
        root.attrib.pop(name, None)
    groups = {element.get("id"): element for element in root.iter(f"{{{_SVG}}}g")}
    for name, tips in picture.tips.items():
        markers = list(groups[name].iter(f"{{{_SVG}}}use")) if tips else []
        assert len(markers) == len(tips), (name, len(markers), len(tips))
        for marker, tip in zip(markers, tips, strict=True):
            ET.SubElement(marker, f"{{{_SVG}}}title").text = tip
    for element in root.iter():
        _set_apart(element, prefix)
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _LINK)
    return ET.tostring(root, encoding="unicode")


class _Renderer(RendererSVG):
    """Knows how large a text is from the pictures before, which have many of its texts."""

    def get_text_width_height_descent(
        self, s: str, prop: FontProperties, ismath: Any
    ) -> tuple[float, float, float]:
        size: tuple[float, float, float] = _text_size(s, prop, ismath)
        return size


# matplotlib types what they are made with nowhere, or not as it is.
_RENDERER: Final[Any] = _Renderer
_MIXED: Final[Any] = MixedModeRenderer


@lru_cache(4096)
def _text_size(text: str, font: FontProperties, ismath: Any) -> tuple[float, float, float]:
    size: tuple[float, float, float] = text_to_path.get_text_width_height_descent(
        text, font, ismath
    )
    return size


def themed(svg: str, description: str) -> str:
    """The picture with the page's colours in the place of its own."""
    names = {light.lower(): name for name, (light, _) in _VARIABLES.items()}
    coloured = re.sub(
        "#[0-9a-f]{6}", lambda found: _variable(found.group(), names), svg, flags=re.IGNORECASE
    )
    return coloured.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)


def style_sheet() -> str:
    """The variables of the page, light and dark; on paper always light."""
    light, dark = (
        " ".join(f"--{name}: {colours[place]};" for name, colours in _VARIABLES.items())
        for place in (0, 1)
    )
    return (
        f":root {{ {light} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
    )


def _variable(colour: str, names: dict[str, str]) -> str:
    name = names.get(colour.lower())
    return colour if name is None else f"var(--{name})"


def _set_apart(element: ET.Element, prefix: str) -> None:
    for name, value in element.attrib.items():
        if name == "id" or (name == f"{{{_LINK}}}href" and value.startswith("#")):
            element.set(name, f"#{prefix}{value[1:]}" if value[0] == "#" else f"{prefix}{value}")
        elif "url(#" in value:
            element.set(name, value.replace("url(#", f"url(#{prefix}"))
        elif name == "style":
            # The reader's own font: few have matplotlib's, which takes more room than most.
            element.set(name, re.sub(_FONTS, "system-ui, sans-serif", value))
