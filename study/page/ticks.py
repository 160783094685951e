"""Axes whose ticks are drawn all at once.

matplotlib makes five artists of each tick and lays every one out, which is most of what drawing
many small panels takes. Here the grid of an axis is one line and its marks are another. As plain as
the pictures need it: ticks and labels at the bottom and on the left, none turned, minor ones
without labels, no offset as of + 1e6.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, ClassVar, Final, Literal

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis, Tick, XAxis, YAxis
from matplotlib.backend_bases import RendererBase
from matplotlib.font_manager import FontProperties
from matplotlib.markers import TICKDOWN, TICKLEFT, MarkerStyle
from matplotlib.path import Path
from matplotlib.text import Text
from matplotlib.transforms import Bbox, IdentityTransform, Transform

from largebatch.common.figures import GRID

_SLACK: Final = 1e-9
"""By which rounding may set a tick beyond the end of its axis, as a share."""

_MOST_LAYOUTS: Final = 10_000
_layouts: Final[dict[Hashable, Any]] = {}
_STYLE: Final = (
    "color", "labelsize", "major.pad", "major.size", "major.width", "minor.size", "minor.width",
)  # fmt: skip


class PlainText(Text):
    """A level text in one font, laid out once for all pictures that have it somewhere."""

    def _get_layout(self, renderer: RendererBase) -> Any:  # of where it stands it knows nothing
        figure: Any = self.get_figure(root=True)
        style = self.get_fontsize(), self.get_horizontalalignment(), self.get_verticalalignment()
        key = self.get_text(), *style, figure.dpi, type(renderer)
        if key not in _layouts:
            if len(_layouts) >= _MOST_LAYOUTS:  # of many studies in one process
                _layouts.clear()
            laid_out: Any = super()
            _layouts[key] = laid_out._get_layout(renderer)
        return _layouts[key]


class PlainAxis(Axis):
    """What both axes share. The labels of the last drawing stay: what overlaps can be asked."""

    majorTicks: Any = ()  # matplotlib's own make one each, to know by it how ticks look
    minorTicks: Any = ()
    _is_x: ClassVar[bool]
    _labels: ClassVar[str]
    _mark: ClassVar[MarkerStyle]

    def __init__(self, axes: Axes, **options: Any) -> None:
        self._texts: list[Text] = []
        self._is_label_placed = False
        styles: Any = matplotlib.rcParams
        self._style = {name: styles[f"{'x' if self._is_x else 'y'}tick.{name}"] for name in _STYLE}
        self._font_size = FontProperties(size=self._style["labelsize"]).get_size_in_points()
        super().__init__(axes, **options)

    def get_children(self) -> list[Artist]:
        return [self.label, *self._texts]

    def get_major_ticks(self, numticks: int | None = None) -> list[Tick]:
        return []

    def get_minor_ticks(self, numticks: int | None = None) -> list[Tick]:
        return []

    def get_ticks_position(self) -> Any:
        return "bottom" if self._is_x else "left"

    def get_majorticklabels(self) -> list[Text]:
        return self._texts

    def set_label_coords(self, x: float, y: float, transform: Transform | None = None) -> None:
        self._is_label_placed = True
        super().set_label_coords(x, y, transform)

    def get_tightbbox(
        self, renderer: RendererBase | None = None, *, for_layout_only: bool = False
    ) -> Bbox | None:
        texts = [text for text in [self.label, *self._texts] if text.get_text()]
        if not texts or not self.get_visible():
            return None
        return Bbox.union([text.get_window_extent(renderer) for text in texts])

    def draw(self, renderer: RendererBase) -> None:
        if not self.get_visible():
            return
        renderer.open_group("axis", gid=self.get_gid())
        look = self.get_tick_params()
        places = self.get_majorticklocs()
        words = self.get_major_formatter().format_ticks([*places])
        majors = self._within(places)
        if look["gridOn"]:
            self._draw_grid(renderer, majors)
        self._draw_marks(renderer, majors, "major")
        self._draw_marks(renderer, self._within(self.get_minorticklocs()), "minor")
        labelled = majors if look.get(self._labels, True) else []
        self._set_texts([(at, word) for at, word in zip(places, words, strict=True)
                         if word and at in labelled])  # fmt: skip
        for text in self._texts:
            text.draw(renderer)
        if self.label.get_text():
            if not self._is_label_placed:
                self._place_label(renderer)
            self.label.draw(renderer)
        renderer.close_group("axis")
        self.stale = False

    def _within(self, places: Iterable[float]) -> list[float]:
        low, high = sorted(self.get_view_interval())
        low, high = low - _SLACK * abs(low), high + _SLACK * abs(high)
        return [place for place in places if low <= place <= high]

    def _draw_grid(self, renderer: RendererBase, places: Sequence[float]) -> None:
        along, across = np.repeat(places, 2), np.tile([0.0, 1.0], len(places))
        points = self._blended("grid").transform(np.stack(self._xy(along, across), axis=1))
        pen = renderer.new_gc()
        pen.set_foreground(GRID)
        pen.set_linewidth(0.6)
        pen.set_capstyle("projecting")
        pen.set_clip_rectangle(self.axes.bbox)
        grid = Path(points, [Path.MOVETO, Path.LINETO] * len(places))
        renderer.draw_path(pen, grid, IdentityTransform())
        pen.restore()

    def _draw_marks(self, renderer: RendererBase, places: Sequence[float], kind: str) -> None:
        transform = self._blended("tick1")  # where there are none too: it sets the axis' own line
        if not places:
            return
        points = transform.transform(np.stack(self._xy(places, [0.0] * len(places)), axis=1))
        size: Any = renderer.points_to_pixels(self._style[f"{kind}.size"])
        pen = renderer.new_gc()
        pen.set_foreground(self._style["color"])
        pen.set_linewidth(self._style[f"{kind}.width"])
        pen.set_snap(size >= 1)
        mark: Any = self._mark.get_transform()
        path = self._mark.get_path()
        renderer.draw_markers(pen, path, mark.scale(size), Path(points), IdentityTransform())
        pen.restore()

    def _set_texts(self, shown: Sequence[tuple[float, str]]) -> None:
        """Let there be a text for each label, where it belongs."""
        while len(self._texts) < len(shown):
            axes, pad = self.axes, self._style["major.size"] + self._style["major.pad"]
            beside = (
                axes.get_xaxis_text1_transform if self._is_x else axes.get_yaxis_text1_transform
            )
            transform, vertical, horizontal = beside(pad)
            text: Text = PlainText(
                fontsize=self._font_size, color=self._style["color"], va=vertical,
                ha=horizontal, transform=transform,
            )  # fmt: skip
            text.set_figure(self._figure)
            self._texts.append(text)
        del self._texts[len(shown) :]
        for text, (place, words) in zip(self._texts, shown, strict=True):
            text.set_text(words)
            text.set_position(self._xy(place, 0.0))

    def _place_label(self, renderer: RendererBase) -> None:
        """Set what the axis is called beyond the longest of its labels."""
        most = max((len(text.get_text()) for text in self._texts), default=0)
        longest = [text for text in self._texts if len(text.get_text()) >= most - 1]
        boxes = [text.get_window_extent(renderer) for text in longest]
        box = Bbox.union([self.axes.bbox, *boxes])
        pad = self.labelpad * self._figure.dpi / 72
        if self._is_x:
            self.label.set_y(box.y0 - pad)
        else:
            self.label.set_x(box.x0 - pad)

    def _xy(self, along: Any, across: Any) -> tuple[Any, Any]:
        return (along, across) if self._is_x else (across, along)

    def _blended(self, which: Literal["grid", "tick1"]) -> Transform:
        """Of data along the axis, and across it of shares of the panel."""
        axes = self.axes
        return axes.get_xaxis_transform(which) if self._is_x else axes.get_yaxis_transform(which)

    @property
    def _figure(self) -> Any:
        return self.get_figure()


class PlainXAxis(PlainAxis, XAxis):
    """The one below."""

    _is_x, _labels, _mark = True, "labelbottom", MarkerStyle(TICKDOWN)


class PlainYAxis(PlainAxis, YAxis):
    """The one on the left."""

    _is_x, _labels, _mark = False, "labelleft", MarkerStyle(TICKLEFT)


class PlainAxes(Axes):
    """A panel with such axes."""

    def _init_axis(self) -> None:  # what matplotlib's own projections override, too
        self.xaxis, self.yaxis = PlainXAxis(self, clear=False), PlainYAxis(self, clear=False)
        for side in ("bottom", "top"):
            self.spines[side].register_axis(self.xaxis)
        for side in ("left", "right"):
            self.spines[side].register_axis(self.yaxis)
