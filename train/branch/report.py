"""What branches come to, for people and programs: a table, sentences, a CSV file, a picture."""

import csv
import math
from pathlib import Path
from typing import TYPE_CHECKING

from largebatch.train.branch.verdict import Branch, BranchVerdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    "multiple",
    "batch_size",
    "lr",
    "loss",
    "over",
    "low",
    "high",
    "over_batch",
    "holds",
    "sure",
    "steps",
)


def table(verdict: BranchVerdict) -> str:
    """A row a branch, and what follows."""
    rows = [("batch", "k", "rate", "loss", "over a smaller one's", "95% interval", "")]
    for branch in verdict.branches:
        rows.append(
            (
                f"{branch.batch_size:,}", f"{branch.multiple}", f"{branch.lr:.3g}",
                _loss(branch.loss), *_over(branch), _told(branch, verdict.tolerance),
            )
        )  # fmt: skip
    widths = [max(len(row[place]) for row in rows) for place in range(6)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=False))
        + (f"  {row[6]}" if row[6] else "")
        for row in rows
    ]
    return "\n".join([*lines, *sentences(verdict)])


def sentences(verdict: BranchVerdict) -> list[str]:
    """The largest batch that holds, and the noise scale beside it."""
    told = [
        f"from {verdict.samples:,} samples on, {verdict.window:,} each; rate by the rule "
        f"{verdict.rule}; a loss within {verdict.tolerance:g} of every smaller batch's holds"
    ]
    if verdict.next_size is None:
        told.append(f"critical batch size: {verdict.critical:,} or more, the largest tried holds")
    else:
        told.append(
            f"critical batch size: {verdict.critical:,} holds, {verdict.next_size:,} does not"
        )
    if verdict.noise is None:
        told.append("noise scale: not measured")
    else:
        scale, error, resolved = verdict.noise
        doubt = "" if resolved else ", which is not resolved: a longer --window tells more"
        told.append(f"noise scale there: {scale:,.0f} ± {error:,.0f} (standard error){doubt}")
    return told


def write_csv(verdict: BranchVerdict, path: Path) -> None:
    """A row a branch, and the noise scale, under the name of its own."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*COLUMNS, "critical", "noise_scale", "noise_scale_error"])
        noise = verdict.noise or (math.nan, math.nan, False)
        for branch in verdict.branches:
            over = branch.over or (0.0, math.nan, math.nan)
            numbers = [branch.lr, branch.loss, *over]
            writer.writerow(
                [
                    branch.multiple, branch.batch_size,
                    *(f"{value:.6g}" if math.isfinite(value) else "" for value in numbers),
                    branch.over_batch or "", str(branch.holds(verdict.tolerance)).lower(),
                    str(branch.is_sure(verdict.tolerance)).lower(), len(branch.losses),
                    verdict.critical,
                    *("" if math.isnan(value) else f"{value:.6g}" for value in noise[:2]),
                ]
            )  # fmt: skip


def draw(verdict: BranchVerdict, title: str) -> "Figure":
    """Losses over the window, and at its end against the batch size beside the tolerance."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, ScalarFormatter

    from largebatch.common.figures import COLOURS, GREY, GRID, RED, paper_style

    with paper_style():
        figure = Figure(figsize=(7.4, 3.1), layout="constrained")
        curves, ends = figure.subplots(1, 2)
        for place, branch in enumerate(verdict.branches):
            smooth = _smoothed(branch, verdict.branches[-1].batch_size)
            curves.plot(
                branch.samples, smooth, color=COLOURS[place % len(COLOURS)], linewidth=1.2,
                label=f"{branch.batch_size:,}",
            )  # fmt: skip
        curves.set(xlabel="Samples seen", ylabel="Training loss, smoothed")
        curves.legend(title="Batch", frameon=False, fontsize=7.5, title_fontsize=7.5)
        known = [branch for branch in verdict.branches[1:] if math.isfinite(branch.loss)]
        for branch in known:
            assert branch.over is not None
            middle, low, high = branch.over
            bars = [[middle - low], [high - middle]] if math.isfinite(high) else None
            ends.errorbar(
                [branch.batch_size], [middle], yerr=bars, marker="o", capsize=3,
                color=COLOURS[0] if branch.holds(verdict.tolerance) else RED,
            )  # fmt: skip
        ends.axhline(verdict.tolerance, color=GREY, linestyle="--", linewidth=1.0)
        ends.annotate(
            f"tolerance {verdict.tolerance:g}", (0.02, verdict.tolerance), color=GREY, fontsize=7.5,
            xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
        )  # fmt: skip
        if verdict.noise is not None and verdict.noise[2]:
            ends.axvline(verdict.noise[0], color=GREY, linestyle=":", linewidth=1.2)
            ends.annotate(
                "noise scale", (verdict.noise[0], 0.98), rotation=90, ha="right", va="top",
                color=GREY, fontsize=7.5, xycoords=("data", "axes fraction"),
            )  # fmt: skip
        ends.set(
            xscale="log",
            xlabel="Global batch size (samples)",
            ylabel="Loss over that of smaller batches",
        )
        ends.set_xticks([branch.batch_size for branch in verdict.branches])
        ends.xaxis.set_major_formatter(ScalarFormatter())
        ends.xaxis.set_minor_locator(NullLocator())
        for panel in (curves, ends):
            panel.grid(True, color=GRID, linewidth=0.6)
        figure.suptitle(title, fontsize=9.5)
    return figure


def _smoothed(branch: Branch, largest: int) -> list[float]:
    """Means over the samples of the last `largest`, as many for every branch."""
    count = max(1, largest // branch.batch_size)
    sums = [0.0]
    for loss in branch.losses:
        sums.append(sums[-1] + loss)
    ends = range(1, len(sums))
    return [(sums[end] - sums[max(0, end - count)]) / min(end, count) for end in ends]


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "diverged"


def _over(branch: Branch) -> tuple[str, str]:
    if branch.over is None:
        return "0", "-"
    middle, low, high = branch.over
    if not math.isfinite(middle):
        return "-", "-"
    ends = f"{low:+.4f} to {high:+.4f}" if math.isfinite(high) else "-"
    return f"{middle:+.4f}", ends


def _told(branch: Branch, tolerance: float) -> str:
    if branch.over is None:
        return "baseline"
    told = "holds" if branch.holds(tolerance) else "does not hold"
    return told if branch.is_sure(tolerance) else f"{told}, not for sure"
