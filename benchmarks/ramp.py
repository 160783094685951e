"""`largebatch bench ramp`: what a batch that follows the noise scale buys, beside constant ones.

Steps and samples to the target of `task=bytes` with AdamW: of constant batch sizes, each with the
best of several learning rates, and of `batch=sqrt_noise` at several exchange rates with the
learning rate of one of the constant ones, untuned, scaled by the square-root rule. Medians over
seeds; with the noise scale at the target. Every run is an ordinary one of `largebatch sweep`, in a
folder of its own.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BASE: Final = 256
RATES: Final = (0.0113, 0.016, 0.0226)
"""Learning rates at BASE; half a power of two apart."""
SIZES: Final = (64, 128, 256, 512, 1024)
EXCHANGE_RATES: Final = (300, 1000, 1500, 2000, 4000)
COMMON: Final = (
    "task=bytes", "optim=adamw", "target.loss=2.2", "budget.samples=4e5", "scaling=sqrt",
    f"scaling.base_batch={BASE}", "noise.small=example", "noise.half_life_samples=8192",
)  # fmt: skip


class Run(NamedTuple):
    """A run that has reached its target."""

    folder: Path
    steps: int
    samples: int
    noise_scale: float
    """At the target, in samples; infinite where it is lost in the noise."""


class Setting(NamedTuple):
    """One way to choose the batch, and the runs that did, a seed each."""

    name: str
    lr: float
    runs: Sequence[Run]

    @property
    def steps(self) -> float:
        return statistics.median(run.steps for run in self.runs)

    @property
    def samples(self) -> float:
        return statistics.median(run.samples for run in self.runs)

    @property
    def noise_scale(self) -> float:
        return statistics.median(run.noise_scale for run in self.runs)


def main(arguments: list[str]) -> int:
    """Run the comparison; returns 1 where a run has missed its target."""
    parser = argparse.ArgumentParser(prog="largebatch bench ramp", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="runs of every setting, from 1 on")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/ramp"), help="of the runs")
    parser.add_argument("--picture", type=Path, help="where it goes (default: FOLDER/ramp.png)")
    options = parser.parse_args(arguments)
    folder: Path = options.folder
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    if folder.exists():
        print(f"largebatch: {folder} is there already; choose another --folder", file=sys.stderr)
        return 2
    seeds = ",".join(map(str, range(options.seeds)))
    rates, sizes = (",".join(map(str, values)) for values in (RATES, SIZES))
    sweep(folder / "constant", f"batch.size={sizes}", f"optim.lr={rates}", f"seed={seeds}")
    found = settings(folder / "constant", "batch.size")
    constants = [
        min((s for s in found if s.name == str(size)), key=lambda s: (s.steps, s.samples))
        for size in SIZES
        if any(s.name == str(size) for s in found)
    ]
    tuned = next(s.lr for s in constants if s.name == str(BASE))
    exchange = ",".join(map(str, EXCHANGE_RATES))
    sweep(
        folder / "ramp", "batch=sqrt_noise", "batch.start=64", "batch.size=2048", "batch.votes=1",
        f"batch.exchange_rate={exchange}", f"optim.lr={tuned}", f"seed={seeds}",
    )  # fmt: skip
    ramps = settings(folder / "ramp", "batch.exchange_rate")
    ramps.sort(key=lambda s: float(s.name))
    print(table(constants, ramps))
    picture = options.picture or folder / "ramp.png"
    draw(constants, ramps).savefig(picture, dpi=150)
    print(f"\npicture: {picture}")
    wanted = (len(SIZES) * len(RATES) + len(EXCHANGE_RATES)) * options.seeds
    missed = wanted - sum(len(s.runs) for s in [*found, *ramps])
    if missed:
        print(f"{missed} of {wanted} runs missed the target", file=sys.stderr)
    return 1 if missed else 0


def sweep(folder: Path, *overrides: str) -> None:
    """The runs of a Hydra multirun, at a time as many as there are cores."""
    command = [sys.executable, "-m", "largebatch", "sweep", *COMMON, *overrides]
    subprocess.run([*command, f"hydra.sweep.dir={folder}"], check=True, stdout=subprocess.DEVNULL)


def settings(folder: Path, key: str) -> list[Setting]:
    """The runs in a sweep's folder that reached the target, by the value of `key` and the rate."""
    found: dict[tuple[str, float], list[Run]] = {}
    for path in sorted(folder.glob("*/summary.json")):
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if summary["status"] != "reached":
            continue
        text = (path.parent / ".hydra" / "overrides.yaml").read_text(encoding="utf-8")
        words = dict(line.removeprefix("- ").split("=", 1) for line in text.splitlines())
        *_, last = read_lines(path.parent)
        run = Run(
            path.parent, summary["steps_to_target"], summary["samples_to_target"],
            last["noise_scale"] or math.inf,
        )  # fmt: skip
        found.setdefault((words[key], summary["base_lr"]), []).append(run)
    return [Setting(name, lr, runs) for (name, lr), runs in found.items()]


def read_lines(folder: Path) -> list[dict[str, Any]]:
    texts: Iterable[str] = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(text) for text in texts]


def table(constants: Sequence[Setting], ramps: Sequence[Setting]) -> str:
    """Every setting, and for each constant batch the ramp with the fewest steps that takes at most
    a tenth more samples.
    """
    rows = [f"{'':24} {'lr at 256':>9} {'steps':>6} {'samples':>8} {'noise scale':>12}"]
    rows += [f"{'sqrt_noise, r = ' + s.name:24} {_figures(s)}" for s in ramps]
    for constant in constants:
        told = ""
        rivals = [s for s in ramps if s.samples <= 1.1 * constant.samples]
        if rivals:
            best = min(rivals, key=lambda s: s.steps)
            steps, samples = best.steps / constant.steps - 1, best.samples / constant.samples - 1
            told = f"   r = {best.name}: {steps:+.0%} steps, {samples:+.0%} samples"
        rows.append(f"{'constant ' + constant.name:24} {_figures(constant)}{told}")
    return "\n".join(rows)


def _figures(s: Setting) -> str:
    return f"{s.lr:9g} {s.steps:6g} {s.samples:8,.0f} {s.noise_scale:12,.0f}"


def draw(constants: Sequence[Setting], ramps: Sequence[Setting]) -> Figure:
    """Steps against samples to the target, and the batch along one run of each ramp."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_costs(left, constants, ramps)
    _draw_runs(right, ramps)
    return figure


def _draw_costs(axes: Axes, constants: Sequence[Setting], ramps: Sequence[Setting]) -> None:
    axes.plot(
        [s.samples for s in constants], [s.steps for s in constants], "o-", color="0.4",
        label="constant batch, tuned",
    )  # fmt: skip
    for s in constants:
        axes.annotate(s.name, (s.samples, s.steps), xytext=(6, 4), textcoords="offset points")
    for place, s in enumerate(ramps):
        color = f"C{place}"
        axes.plot(s.samples, s.steps, "D", color=color, label=f"√(r · noise scale), r = {s.name}")
        axes.plot(
            [run.samples for run in s.runs], [run.steps for run in s.runs], ".", color=color,
            alpha=0.5,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="samples to target", ylabel="steps to target")
    axes.margins(0.12)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(which="minor", labelsize=8)
    axes.legend(frameon=False)


def _draw_runs(axes: Axes, ramps: Sequence[Setting]) -> None:
    for place, setting in enumerate(ramps):
        if 1 < place < len(ramps) - 1:
            continue  # more would hide one another
        lines = read_lines(setting.runs[0].folder)
        axes.step(
            [line["samples"] for line in lines], [line["global_batch_size"] for line in lines],
            where="pre", color=f"C{place}", label=f"batch, r = {setting.name}",
        )  # fmt: skip
        known = [line for line in lines if line["noise_scale"] and line["noise_resolved"]]
        axes.plot(
            [line["samples"] for line in known], [line["noise_scale"] for line in known],
            color=f"C{place}", linewidth=0.8, alpha=0.7, linestyle=":",
        )  # fmt: skip
    axes.plot([], [], ":", color="0.3", label="noise scale, where resolved")
    axes.set(xscale="log", yscale="log", xlabel="samples", ylabel="samples")
    axes.legend(frameon=False)
