"""`largebatch bench time`: time to target and node-hours on N tiles, and where more do not pay.

From a study's curve with its interval, a measured step, and the cost model of `bench collectives`.
A projection: nothing runs.
"""

import argparse
import csv
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console

from largebatch.benchmarks.collectives.command import XE_LINK_BETA
from largebatch.benchmarks.collectives.models import (
    AURORA_ADAPTERS,
    AURORA_NODES,
    AURORA_RANKS_PER_NODE,
    Cluster,
    Link,
)
from largebatch.benchmarks.harness import check
from largebatch.benchmarks.scale.command import table
from largebatch.benchmarks.time_to_target.model import Step, TimeCurve, bubble, time_curves
from largebatch.benchmarks.time_to_target.picture import time_figure
from largebatch.common.console import output_console
from largebatch.common.figures import DPI
from largebatch.records import read_fields
from largebatch.records.fields import number, positive, whole
from largebatch.records.names import SUMMARY
from largebatch.study import read_study
from largebatch.study.section_study import seed_rows
from largebatch.study.statistics.intervals import Estimate
from largebatch.study.statistics.table import SeedSteps

NODES: Final = "1,4,16,64,256,1024,4096,10624"
COLUMNS: Final = (
    "optimizer,nodes,tiles,batch_size,micro_batches,steps,step_seconds,sum_seconds,seconds,"
    "seconds_low,seconds_high,node_hours,node_hours_low,node_hours_high,efficiency,bubble,"
    "extrapolated"
)


def main(arguments: Sequence[str]) -> int:
    """`largebatch bench time`; 0, or 2 where an option or a folder cannot be."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        step = step_of(options)
        tiles = tiles_of(options, step)
        check(0 < options.efficiency < 1, "--efficiency", "above 0 and below 1", options.efficiency)
        rows = rows_of(options.folder, options.optimizers)
        curves = time_curves(rows, step, tiles, options.most_nodes, options.efficiency)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    show(curves, step, options, output_console())
    if options.out is not None:
        write_csv(curves, step, options.out / "time.csv")
        figure = time_figure(curves, step.cluster.ranks_per_node)
        figure.savefig(options.out / "time.png", dpi=DPI)
        print(f"{options.out / 'time.csv'}, {options.out / 'time.png'}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("largebatch bench time", description=__doc__)
    add = parser.add_argument
    add("folder", type=Path, help="of a study of steps to a target, or of its basin.csv")
    add("--optimizers", metavar="LIST", help="of those in it (default: all)")
    add("--nodes", default=NODES, metavar="LIST", help="default: %(default)s")
    add("--most-nodes", type=int, default=AURORA_NODES, help="looked at (default: %(default)s)")
    add("--efficiency", type=float, default=0.5, help="below which more do not pay (%(default)s)")
    add("--out", type=Path, metavar="FOLDER", help="keep table and picture there")
    of_step = parser.add_argument_group("a step")
    add = of_step.add_argument
    add("--run", type=Path, metavar="RUN", help="take samples a second and parameters from it")
    add("--sample-seconds", type=float, help="of one tile for one sample")
    add("--parameters", type=float, help="of the model")
    add("--gradient-bytes", type=float, default=4, help="a parameter (default: %(default)g)")
    add("--step-seconds", type=float, default=0.0, help="that no split makes shorter (0)")
    add("--overlap", type=float, default=0.0, help="share of a sum behind the backward pass (0)")
    add("--stages", type=int, default=1, help="of a pipeline (1)")
    add("--micro-batch", type=int, default=1, help="samples of a replica at a time (1)")
    of_network = parser.add_argument_group("the machine")
    add = of_network.add_argument
    add("--alpha", type=float, default=2e-6, help="seconds a message (assumed: %(default)g)")
    add("--beta", type=float, default=4e-11, help="seconds a byte (assumed: %(default)g)")
    add("--inside-beta", type=float, default=XE_LINK_BETA, help="in a node (%(default).3g)")
    add("--tiles-per-node", type=int, default=AURORA_RANKS_PER_NODE, help="default: %(default)s")
    add("--adapters", type=int, default=AURORA_ADAPTERS, help="of a node (default: %(default)s)")
    return parser


def step_of(options: argparse.Namespace) -> Step:
    """What a step takes, by the options and the run that they name.

    Raises:
        ValueError: a value out of range, or one that is lacking.
    """
    sample, parameters = options.sample_seconds, options.parameters
    if options.run is not None:
        summary = read_fields(options.run / SUMMARY)
        rates = summary.inside("throughput")
        if sample is None:
            per_second = rates.take("samples_per_second", positive)
            sample = rates.take("num_devices", whole(1)) / per_second
        if parameters is None:
            parameters = summary.take("num_parameters", number)
    check(sample is not None, "--sample-seconds or --run", "given", "neither")
    check(parameters is not None, "--parameters or --run", "given", "neither")
    for name, value in (("sample-seconds", sample), ("parameters", parameters)):
        check(0 < value < math.inf, f"--{name}", "above 0", value)
    for name in ("step_seconds", "gradient_bytes"):
        value = getattr(options, name)
        check(0 <= value < math.inf, f"--{name.replace('_', '-')}", "a number >= 0", value)
    check(0 <= options.overlap <= 1, "--overlap", "from 0 to 1", options.overlap)
    for name in ("stages", "micro_batch", "tiles_per_node", "most_nodes"):
        value = getattr(options, name)
        check(value >= 1, f"--{name.replace('_', '-')}", "1 or more", value)
    per_node = options.tiles_per_node
    fits = per_node % options.stages == 0 or options.stages % per_node == 0
    accepted = f"a divisor or a multiple of the {per_node} tiles of a node"
    check(fits, "--stages", accepted, options.stages)
    inside, out = Link(options.alpha, options.inside_beta), Link(options.alpha, options.beta)
    return Step(
        Cluster(per_node, options.adapters, inside, out),
        float(sample),
        round(parameters * options.gradient_bytes),
        options.step_seconds,
        options.overlap,
        options.stages,
        options.micro_batch,
    )


def tiles_of(options: argparse.Namespace, step: Step) -> list[int]:
    """Tiles of whole nodes, ascending.

    Raises:
        ValueError: one that cannot be.
    """
    words = options.nodes.split(",")
    good = all(word.strip().isdecimal() and int(word) >= 1 for word in words)
    check(good, "--nodes", f"whole numbers of at least 1, as {NODES}", options.nodes)
    tiles = sorted({int(word) * step.cluster.ranks_per_node for word in words})
    least = max(step.stages, step.cluster.ranks_per_node)
    kept = [count for count in tiles if count >= least and count % step.stages == 0]
    check(bool(kept), "--nodes", f"of at least {step.stages} tiles, a replica", options.nodes)
    return kept


def rows_of(folder: Path, optimizers: str | None) -> list[SeedSteps]:
    """The steps of each seed at the rates that a study chose.

    Raises:
        ValueError: the folder holds none, or several tasks.
    """
    path = folder / "basin.csv"
    if path.exists():
        rows = _rows_of_csv(path)
    else:
        study = read_study(folder)
        check(len(study.sections) == 1, "the folder", "of one task and target", folder)
        points = study.sections[0].points.values()
        rows = [row for own in points for row in seed_rows(own)]
    if optimizers is not None:
        wanted = optimizers.split(",")
        known = {row.optimizer for row in rows}
        check({*wanted} <= known, "--optimizers", f"of {', '.join(sorted(known))}", optimizers)
        rows = [row for row in rows if row.optimizer in wanted]
    return rows


def _rows_of_csv(path: Path) -> list[SeedSteps]:
    with path.open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    check(bool(found) and "task" not in found[0], str(path), "of one task", "several or none")
    try:
        return [
            SeedSteps(
                row["optimizer"], int(row["batch_size"]), int(row["seed"]), float(row["steps"])
            )
            for row in found
            if row["chosen"] == "true"
        ]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is not what `largebatch report` writes: {error!r}") from None


def show(
    curves: Sequence[TimeCurve], step: Step, options: argparse.Namespace, console: Console
) -> None:
    """Print the assumptions, a table for each optimizer, and where more do not pay."""
    cluster = step.cluster
    assumed = [
        f"a tile takes {step.sample_seconds:.4g} s a sample, however few it has at a time",
        f"{step.gradient_bytes / 1e6:,.4g} MB of gradients are summed at each step over all tiles, "
        f"{step.overlap:.0%} of it hidden; reduced in the node first, then by the fastest of the "
        f"cost model's algorithms (alpha {cluster.out.alpha:g} s, beta {cluster.out.beta:g} s a "
        f"byte, {cluster.ranks_per_node} tiles and {cluster.adapters} adapters a node), no "
        "congestion",
        f"{step.fixed_seconds:g} s of a step are the same however it is split",
        f"{step.stages} pipeline stage(s), micro-batches of {step.micro_batch}; as many of them as "
        "make the run shortest",
        "the learning rate is tuned at each batch size, as in the study; evaluation, checkpoints, "
        "start and failures take no time",
        "intervals are those of the curve alone, by the jackknife over seeds; ~: a batch larger "
        "than any that was tried",
    ]
    for line in assumed:
        console.print(f"assumed: {line}", highlight=False, markup=False)
    is_pipeline = step.stages > 1
    heads = [
        "",
        "nodes",
        "batch",
        "steps",
        "step",
        "sums",
        "time to target",
        "node-hours",
        "of 1",
    ]
    rows = [
        [
            curve.optimizer, f"{point.nodes:,.0f}",
            f"{'~' * point.beyond}{point.batch_size:,}", f"{point.steps:,.3g}",
            clock(point.step_seconds), f"{point.sum_seconds / point.step_seconds:.0%}",
            _with_ends(point.seconds), f"{point.node_hours.value:,.3g}",
            f"{point.efficiency:.0%}",
            *([f"{bubble(step.stages, point.micro_batches):.0%}"] if is_pipeline else []),
        ]
        for curve in curves
        for point in curve.points
    ]  # fmt: skip
    heads += ["bubble"] * is_pipeline
    console.print(table("Time to target, a projection", heads, rows))
    for curve in curves:
        console.print(pays(curve, step, options), highlight=False, markup=False, soft_wrap=True)
    if step.stages > 1:
        show_bubbles(curves, step, console)


def pays(curve: TimeCurve, step: Step, options: argparse.Namespace) -> str:
    """Where more tiles do not pay, in words."""
    per_node = step.cluster.ranks_per_node
    fastest = (
        f"the least time is that of {curve.fastest:,} tiles ({curve.fastest // per_node:,} nodes)"
    )
    if curve.pays_to is None:
        told = f"pay up to {options.most_nodes:,} nodes, the most looked at"
    else:
        found = curve.pays_to
        ends = (
            "" if found.low is None or found.high is None
            else f", 95% interval {found.low:,.0f} to {found.high:,.0f}"
        )  # fmt: skip
        told = (
            f"do not pay beyond {found.value:,.0f} ({found.value / per_node:,.3g} nodes{ends}): "
            f"efficiency below {options.efficiency:.0%} of one node's"
        )
    return f"{curve.optimizer}: more tiles {told}; {fastest}"


def show_bubbles(curves: Sequence[TimeCurve], step: Step, console: Console) -> None:
    """How a larger batch shrinks a pipeline's bubble, on one node and on the most in the table."""
    tiles = [curves[0].points[0].tiles, curves[0].points[-1].tiles]
    rows = []
    for count in dict.fromkeys(tiles):
        for doubling in range(0, 9, 2):
            m = 2**doubling
            batch = f"{int(step.batch(count, m)):,}"
            rows.append((f"{count:,}", batch, f"{m}", f"{bubble(step.stages, m):.1%}"))
    heads = ("tiles", "batch", "micro-batches", "bubble")
    console.print(table(f"Idle share of {step.stages} stages, (p-1)/(m+p-1)", heads, rows))


def write_csv(curves: Sequence[TimeCurve], step: Step, path: Path) -> None:
    """A row for each optimizer and number of tiles."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*COLUMNS.split(","), "pays_to", "pays_to_low", "pays_to_high"])
        for curve in curves:
            pay = curve.pays_to
            for point in curve.points:
                numbers = (
                    point.nodes, point.tiles, point.batch_size, point.micro_batches, point.steps,
                    point.step_seconds, point.sum_seconds, *_numbers(point.seconds),
                    *_numbers(point.node_hours), point.efficiency,
                    bubble(step.stages, point.micro_batches),
                )  # fmt: skip
                of_pay = (None, None, None) if pay is None else _numbers(pay)
                writer.writerow(
                    [
                        curve.optimizer, *map(_cell, numbers), str(point.beyond).lower(),
                        *map(_cell, of_pay),
                    ]
                )  # fmt: skip


def clock(seconds: float, unit: float | None = None) -> str:
    """A time in the unit that suits it, or another: 12.3 ms, 4.97 s, 3.2 min, 1.4 h, 20 d.

    >>> clock(0.0123), clock(4.97), clock(190.0), clock(86400.0 * 20)
    ('12.3 ms', '4.97 s', '3.17 min', '20 d')
    """
    of = seconds if unit is None else unit
    for least, factor, name in ((172_800, 86_400, "d"), (7_200, 3_600, "h"), (120, 60, "min")):
        if of >= least:
            return f"{seconds / factor:.3g} {name}"
    return f"{seconds:.3g} s" if of >= 1 else f"{seconds * 1e3:.3g} ms"


def _with_ends(estimate: Estimate) -> str:
    text = clock(estimate.value)
    if estimate.low is None or estimate.high is None:
        return text
    low, high = (clock(end, estimate.value).split()[0] for end in (estimate.low, estimate.high))
    return f"{text} ({low} to {high})"


def _numbers(estimate: Estimate) -> tuple[float | None, float | None, float | None]:
    return estimate.value, estimate.low, estimate.high


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
