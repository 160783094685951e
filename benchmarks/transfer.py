"""`largebatch bench transfer`: is the best rate of a narrow decoder the best of a wide one?

For each optimizer the loss after a few steps at rates a factor √2 apart, at each width with rates
of the narrowest (`scaling.base_width`) and, at the widest, with one rate for all tensors. The mean
over seeds decides: rates are searched from the optimizer's own outwards until both sides are worse
in the mean, and a parabola through the best and its neighbours says where between them the best one
lies. The same of each seed alone says how far to trust it. Rates rise over a tenth of the steps and
fall to 0 at the end, both linearly: at a constant rate the last steps' noise would decide.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, Final, NamedTuple

from largebatch.benchmarks.harness import check
from largebatch.common.errors import ConfigError
from largebatch.conf.build import build
from largebatch.conf.config import TrainConfig, typed
from largebatch.train.tasks import Task
from largebatch.train.transfer.coordinates import ShortRun, widened

OPTIMIZERS: Final = "adamw,lamb,muon,shampoo,soap"
STEP: Final = math.sqrt(2.0)
MOST_RATES: Final = 16
"""Of one search: 2^7.5 between the lowest and the highest."""
TEXT: Final = (
    "task=text", "task.num_bytes=1_000_000", "task.sequence_length=32", "model.depth=2",
    "model.heads=4", "model.hidden=128",
)  # fmt: skip
"""A decoder of heads of 16, its SwiGLU twice as wide as it."""

Losses = dict[int, float]
"""By the rate, in powers of √2."""


def main(arguments: Sequence[str]) -> int:
    """`largebatch bench transfer`; 0, or 2 where an option cannot be."""
    parser = argparse.ArgumentParser(prog="largebatch bench transfer", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="of largebatch train, for every run")
    parser.add_argument("--optimizers", default=OPTIMIZERS, help=f"(default: {OPTIMIZERS})")
    parser.add_argument("--widths", default="64,256", help="the first is tuned (default: 64,256)")
    parser.add_argument("--steps", type=int, default=80, help="of a run (default: 80)")
    parser.add_argument("--samples", type=int, default=16, help="in a batch (default: 16)")
    parser.add_argument("--seeds", type=int, default=3, help="that are averaged (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw it here")
    options = parser.parse_args(arguments)
    try:
        widths = sorted(int(width) for width in options.widths.split(","))
        check(len(widths) >= 2, "--widths", "two or more", options.widths)
        check(options.steps >= 10, "--steps", "10 or more", options.steps)
        check(options.samples >= 1, "--samples", "1 or more", options.samples)
        check(options.seeds >= 1, "--seeds", "1 or more", options.seeds)
        record = measure(
            options.optimizers.split(","), widths, options.overrides, options.steps,
            options.samples, options.seeds,
        )  # fmt: skip
    except (ConfigError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(table(record))
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.picture is not None:
        draw(record, options.picture)
    return 0


def measure(
    optimizers: Sequence[str],
    widths: Sequence[int],
    overrides: Sequence[str],
    steps: int,
    samples: int,
    seeds: int,
) -> dict[str, Any]:
    """Search the rate of each optimizer at each width; returns the record of all losses."""
    curves: list[dict[str, Any]] = []
    task: Task | None = None
    for optimizer in optimizers:
        start = None
        for width, transferred in _asked(widths):
            config = configured(optimizer, width, widths[0] if transferred else None, overrides)
            task = build(config.task, "task") if task is None else task
            loss = LossesAtRate(config, task, steps, samples, seeds)
            means = search(loss.mean, 0 if start is None else start)
            best = min(means, key=means.__getitem__)
            start = best if start is None else start
            curve = {
                "optimizer": optimizer,
                "width": width,
                "transferred": transferred,
                "losses": {loss.rate(power): of for power, of in sorted(loss.of_seeds.items())},
                "best_lr": loss.rate(vertex(means)),
                "best_loss": means[best],
                "best_lr_of_seeds": [loss.rate(vertex(loss.alone(seed))) for seed in range(seeds)],
            }
            curves.append(curve)
            print(f"{optimizer} {width}: {curve['best_lr']:.3g}", file=sys.stderr, flush=True)
    return {
        "benchmark": "transfer", "widths": list(widths), "steps": steps, "samples": samples,
        "seeds": seeds, "overrides": list(overrides), "curves": curves,
    }  # fmt: skip


def _asked(widths: Sequence[int]) -> list[tuple[int, bool]]:
    """Widths, and whether rates come from the first: one that is not, for comparison."""
    return [*((width, True) for width in widths), (widths[-1], False)]


def configured(
    optimizer: str, width: int, base: int | None, overrides: Sequence[str]
) -> TrainConfig:
    """The run at a width, with rates of the width `base`; None: with one rate for all tensors."""
    from hydra import compose, initialize_config_module

    words = [*TEXT, f"optim={optimizer}", *overrides]
    words += ["scaling.step=null"] if base is None else [f"scaling.base_width={base}"]
    with initialize_config_module("largebatch.conf", version_base="1.3"):
        return widened(typed(compose("train", words)), "dim", width)


class LossesAtRate:
    """The evaluation losses of a run's seeds at a rate, in powers of √2 from the optimizer's own.

    Attributes:
        of_seeds: by the power, what has been asked for.
    """

    def __init__(
        self, config: TrainConfig, task: Task, steps: int, samples: int, seeds: int
    ) -> None:
        self._configs = [replace(config, seed=config.seed + seed) for seed in range(seeds)]
        self._task, self._steps, self._samples = task, steps, samples
        self._own = float(config.optim["lr"])
        self.of_seeds: dict[int, list[float]] = {}

    def rate(self, power: float) -> float:
        return self._own * float(STEP**power)

    def mean(self, power: int) -> float:
        self.of_seeds[power] = [self._loss(config, power) for config in self._configs]
        return fmean(self.of_seeds[power])

    def alone(self, seed: int) -> Losses:
        """One seed's losses."""
        return {power: losses[seed] for power, losses in self.of_seeds.items()}

    def _loss(self, config: TrainConfig, power: int) -> float:
        optim = config.optim | {"lr": self.rate(power)}
        run = ShortRun(replace(config, optim=optim), self._task, self._samples)
        steps, warmup = self._steps, max(1, self._steps // 10)
        for step in range(steps):
            run.set_lr_factor(min((step + 1) / warmup, (steps - step) / (steps - warmup)))
            if not math.isfinite(run.step()):
                return math.inf
        loss = run.evaluate()
        return loss if math.isfinite(loss) else math.inf


def search(loss: Callable[[int], float], start: int) -> Losses:
    """Losses at rates around the best, found from `start` downhill; both its sides are there."""
    found = {power: loss(power) for power in (start - 2, start, start + 2)}
    while len(found) < MOST_RATES:
        best = min(found, key=found.__getitem__)
        if best == min(found):
            found[best - 2] = loss(best - 2)
        elif best == max(found):
            found[best + 2] = loss(best + 2)
        else:
            missing = [power for power in (best - 1, best + 1) if power not in found]
            if not missing:
                break
            found[missing[0]] = loss(missing[0])
    return found


def vertex(losses: Mapping[int, float]) -> float:
    """Where the best rate lies, by the parabola through the best one and those beside it."""
    best = min(losses, key=losses.__getitem__)
    left, right = losses.get(best - 1, math.inf), losses.get(best + 1, math.inf)
    if not (math.isfinite(left) and math.isfinite(right)):
        return float(best)
    curvature = left + right - 2 * losses[best]
    return best if curvature <= 0 else best + 0.5 * (left - right) / curvature


class Ratio(NamedTuple):
    """Of the best rate of the widest to that of the narrowest."""

    of_means: float
    lowest: float
    """Of the seeds', each alone at both widths."""
    highest: float

    def __str__(self) -> str:
        return f"{self.of_means:.2f} ({self.lowest:.2f} to {self.highest:.2f})"


def ratios(record: Mapping[str, Any]) -> dict[str, tuple[Ratio, Ratio]]:
    """By optimizer: with rates of the narrowest brought to each tensor, and with one for all."""
    found: dict[str, tuple[Ratio, Ratio]] = {}
    for name in dict.fromkeys(curve["optimizer"] for curve in record["curves"]):
        first, *_, wide, plain = (c for c in record["curves"] if c["optimizer"] == name)
        found[name] = _ratio(wide, first), _ratio(plain, first)
    return found


def _ratio(wide: Mapping[str, Any], narrow: Mapping[str, Any]) -> Ratio:
    pairs = zip(wide["best_lr_of_seeds"], narrow["best_lr_of_seeds"], strict=True)
    of_seeds = [ours / other for ours, other in pairs]
    return Ratio(wide["best_lr"] / narrow["best_lr"], min(of_seeds), max(of_seeds))


def table(record: Mapping[str, Any]) -> str:
    """A table in Markdown: best rates, their ratio (with the lowest and highest of a seed alone),
    and losses at them.
    """
    first, last = record["widths"][0], record["widths"][-1]
    lines = [
        f"| optimizer | best rate at {first} | at {last} | ratio (of seeds) | within √2 | loss "
        f"| one rate for all: at {last} | ratio (of seeds) | loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (ratio, plain) in ratios(record).items():
        narrow, *_, wide, bare = (c for c in record["curves"] if c["optimizer"] == name)
        within = "yes" if 1 / STEP <= ratio.of_means <= STEP else "no"
        lines.append(
            f"| {name} | {narrow['best_lr']:.3g} | {wide['best_lr']:.3g} | {ratio} | {within} "
            f"| {wide['best_loss']:.2f} | {bare['best_lr']:.3g} | {plain} "
            f"| {bare['best_loss']:.2f} |"
        )
    return "\n".join(lines)


def draw(record: Mapping[str, Any], path: Path) -> None:
    """A panel for each optimizer: loss against rate, a line for each width."""
    from matplotlib.lines import Line2D

    from largebatch.common.figures import DPI, GREY, paper_style
    from largebatch.study.page.axes import (
        WIDE,
        columns_of,
        handle,
        new_panels,
        set_grid,
        set_log_axis,
    )
    from largebatch.study.page.styles import LINES, curve_styles

    names, widths = list(ratios(record)), record["widths"]
    styles = curve_styles((name, name) for name in names)
    columns = columns_of(WIDE, len(names))
    rows = math.ceil(len(names) / columns)
    handles = [
        Line2D([], [], color=GREY, marker="o", markersize=4, label=f"width {width:,}",
               linestyle=LINES[place % len(LINES)], markerfacecolor=_face(GREY, width, widths))
        for place, width in enumerate(widths)
    ]  # fmt: skip
    handles += [
        Line2D([], [], color=GREY, linestyle=":", label=f"{widths[-1]:,}, one rate for all"),
        handle("|", "its best rate", markersize=9, markeredgewidth=1.5),
    ]
    least = min(curve["best_loss"] for curve in record["curves"])
    with paper_style():
        picture, panels = new_panels(
            WIDE, [1.6] * rows, columns, handles, gaps=(0.5, 0.55), top=0.3
        )
        for place, (axes, name) in enumerate(zip(panels, names, strict=False)):
            curves = [curve for curve in record["curves"] if curve["optimizer"] == name]
            rates = [float(rate) for curve in curves for rate in curve["losses"]]
            set_log_axis(axes.xaxis, min(rates) / 1.2, max(rates) * 1.2, 3)
            axes.set_ylim(least - 0.15, least + 0.9)
            for curve in curves:
                points = sorted((float(r), fmean(losses)) for r, losses in curve["losses"].items())
                own, width = curve["transferred"], curve["width"]
                colour = styles[name].colour if own else GREY
                axes.plot(
                    *zip(*points, strict=True), color=colour, linewidth=1.3,
                    marker=styles[name].marker if own else "none", markersize=4,
                    markerfacecolor=_face(colour, width, widths),
                    linestyle=LINES[widths.index(width) % len(LINES)] if own else ":",
                )  # fmt: skip
                axes.plot(
                    [curve["best_lr"]], [0.03], color=colour, marker="|", markersize=9,
                    markeredgewidth=1.5, transform=axes.get_xaxis_transform(), clip_on=False,
                )  # fmt: skip
            axes.set_title(name, y=1.0)
            if place + columns >= len(names):
                axes.set_xlabel("Learning rate")
            if place % columns == 0:
                axes.set_ylabel(f"Loss after {record['steps']} steps")
            set_grid(axes)
        for axes in panels[len(names) :]:
            axes.set_axis_off()
        picture.figure.savefig(path, dpi=DPI)


def _face(colour: str, width: int, widths: Sequence[int]) -> str:
    """Of a width's markers: filled at the widest only, hollow below."""
    return colour if width == widths[-1] else "white"
