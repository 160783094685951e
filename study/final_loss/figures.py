"""Final loss against batch size, a panel a budget, as a figure of matplotlib."""

from collections.abc import Mapping

from matplotlib.axes import Axes

from largebatch.study.final_loss.answers import loss_text
from largebatch.study.final_loss.section import BudgetStudy, LossSection
from largebatch.study.page.axes import (
    WIDE,
    LineEnd,
    Picture,
    curve_handles,
    name_ends,
    new_panels,
    room_for,
    set_batch_axis,
    set_grid,
)
from largebatch.study.page.styles import Style
from largebatch.study.page.words import seeds_in_words


def final_loss_figure(study: LossSection, styles: Mapping[str, Style], width: float) -> Picture:
    """Final evaluation loss against the global batch size, each point at its best setting."""
    names = study.budgets[-1].names
    columns = min(len(study.budgets), 2 if width >= WIDE else 1)
    rows = -(-len(study.budgets) // columns)
    heights = [2.9 if width >= WIDE else 2.5] * rows
    has_ends = all(one.means.get(name) for one in study.budgets for name in one.names)
    room = room_for(names, width) if has_ends else 0.0
    handles = [] if room else curve_handles(styles, names)
    picture, panels = new_panels(
        width, heights, columns, handles, gaps=(0.62, 0.62), top=0.3, room=room
    )
    for panel, one in zip(panels, study.budgets, strict=False):
        _draw_budget(picture, panel, one, styles, 9 // columns if width >= WIDE else 5)
        if room:
            last = {name: one.means[name][-1] for name in one.names}
            name_ends(
                panel,
                [LineEnd(name, mean.batch_size, mean.loss.value, styles[name].colour)
                 for name, mean in last.items()],
            )  # fmt: skip
        panel.set_xlabel("Global batch size (samples)")
    for panel in panels[::columns]:
        panel.set_ylabel("Final loss")
    for panel in panels[len(study.budgets) :]:
        panel.set_axis_off()
    return picture


def _draw_budget(
    picture: Picture, axes: Axes, study: BudgetStudy, styles: Mapping[str, Style], most: int
) -> None:
    set_batch_axis(axes, study.batch_sizes, most)
    for name in study.names:
        means, style = study.means.get(name, ()), styles[name]
        if not means:
            continue
        sizes = [mean.batch_size for mean in means]
        (line,) = axes.plot(
            sizes, [mean.loss.value for mean in means], color=style.colour, marker=style.marker,
            linestyle=style.line, linewidth=1.6, markersize=5.5, zorder=3,
        )  # fmt: skip
        picture.tell(line, [_tip(study, name, size) for size in sizes])
        bars = [
            (mean.batch_size, e.value, e.value - e.low, e.high - e.value)
            for mean in means
            if (e := mean.loss).low is not None and e.high is not None
        ]
        if bars:
            at, losses, below, above = zip(*bars, strict=True)
            axes.errorbar(
                at, losses, yerr=[below, above], fmt="none", color=style.colour, elinewidth=1.1,
                capsize=3.0, zorder=3,
            )  # fmt: skip
    set_grid(axes)
    axes.set_title(f"{study.budget:,} samples", loc="left", fontsize=9.0)


def _tip(study: BudgetStudy, name: str, size: int) -> str:
    mean = study.mean(name, size)
    assert mean is not None
    (point,) = (one for one in study.points[name] if one.batch_size == size)
    tuned = "".join(f", {key} {value:g}" for key, value in point.tuned.items())
    ends = (
        ""
        if mean.loss.low is None or mean.loss.high is None
        else f" ({loss_text(mean.loss.low)} to {loss_text(mean.loss.high)})"
    )
    return (
        f"{name}, batch {size:,}: loss {loss_text(mean.loss.value)}{ends} after "
        f"{study.budget:,} samples, rate {point.lr:.3g}{tuned}, "
        f"{seeds_in_words(sorted(point.losses))}"
    )
