"""What all pictures share: the palette, the grid and the style of a paper."""

from contextlib import AbstractContextManager
from typing import Final

import matplotlib

# Okabe and Ito's palette, which colour-blind readers can distinguish. Its gold and its sky blue are
# darkened to a contrast of 3 on white; its yellow is too pale for that, a dark brown stands for it.
COLOURS: Final = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#C08400", "#3A98D6", "#1A1A1A", "#6B3E1D",
)  # fmt: skip
BLUE, RED, GREEN, PURPLE = COLOURS[:4]
INK, GREY, GRID = "#222222", "#777777", "#e4e4e4"
DPI: Final = 200
TITLE_SIZE: Final = 10.5  # points


def paper_style() -> AbstractContextManager[None]:
    """Within it figures are drawn as for a paper's column; touches no global state."""
    return matplotlib.rc_context(
        {
            "font.size": 9.0,
            "axes.titlesize": TITLE_SIZE,
            "axes.labelsize": 9.5,
            "legend.fontsize": 8.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "text.hinting": "none",  # letters of few pixels need it, and it takes a while
        }
    )
