"""A legend below all panels, laid out in one pass.

matplotlib's own nests boxes, each of which asks all texts within it for their size again.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from matplotlib.artist import Artist
from matplotlib.backend_bases import RendererBase
from matplotlib.lines import Line2D
from matplotlib.text import Text

from largebatch.study.page.ticks import PlainText

SIZE: Final = 8.5
"""Of its letters, in points; lengths below are in units of it."""
ROW: Final = 1.61
_HANDLE, _BESIDE, _BETWEEN, _BELOW = 2.0, 0.8, 2.0, 1.05


class PlainLegend(Artist):
    """Rows of lines and what they are called, column by column, in the middle of the figure."""

    def __init__(self, handles: Sequence[Line2D], columns: int) -> None:
        super().__init__()
        self._columns: Any = np.array_split(np.arange(len(handles)), columns)
        self._lines = list(handles)
        self._texts: list[Text] = [
            PlainText(text=str(line.get_label()), fontsize=SIZE, va="center_baseline")
            for line in handles
        ]
        for line in handles:
            line.set_markevery([1])

    def get_children(self) -> list[Artist]:
        return [*self._lines, *self._texts]

    def get_texts(self) -> list[Text]:
        return self._texts

    def set_figure(self, fig: Any) -> None:
        super().set_figure(fig)
        for artist in self.get_children():
            artist.set_figure(fig)

    def draw(self, renderer: RendererBase) -> None:
        figure: Any = self.get_figure()
        unit = SIZE * figure.dpi / 72
        widths = [
            max(self._texts[place].get_window_extent(renderer).width for place in column)
            for column in self._columns
        ]
        beside = (_HANDLE + _BESIDE) * unit
        taken = sum(widths) + len(widths) * beside + (len(widths) - 1) * _BETWEEN * unit
        x = (figure.bbox.width - taken) / 2
        top = (_BELOW + ROW * (len(self._columns[0]) - 1)) * unit
        renderer.open_group("legend", gid=self.get_gid())
        for column, width in zip(self._columns, widths, strict=True):
            for row, place in enumerate(column):
                y = top - ROW * row * unit
                line, text = self._lines[place], self._texts[place]
                line.set_data([x + part * _HANDLE * unit for part in (0, 0.5, 1)], [y] * 3)
                text.set_position((x + beside, y))
                line.draw(renderer)
                text.draw(renderer)
            x += beside + width + _BETWEEN * unit
        renderer.close_group("legend")
        self.stale = False
