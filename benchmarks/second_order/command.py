"""`largebatch bench second_order`: what Shampoo, SOAP and K-FAC cost, beside torch's fused AdamW.

Real training steps of a decoder and of the bundled byte model, in interleaved rounds. In one
process by the interval from roots to roots; and on 1, 2 and 4 gloo ranks of one thread each, that
share the work out among them: time, memory and what travels, rank by rank.
"""

import argparse
import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import truediv
from typing import Any, Final, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from largebatch.benchmarks import harness
from largebatch.benchmarks.contenders import REFERENCE
from largebatch.benchmarks.harness import Note, Record, add_options, make_table, plural, run, say
from largebatch.benchmarks.second_order.steps import (
    ROWS,
    SecondOrderStepper,
    StepSamples,
    run_rounds,
)
from largebatch.benchmarks.workloads import Bytewise, Decoding, Workload, describe
from largebatch.distributed.ranks import Ranks

INTERVALS: Final[tuple[int, ...]] = (1, 10, 50)
WORLD_SIZES: Final[tuple[int, ...]] = (1, 2, 4)
INTERVAL_ON_RANKS: Final = 10  # the optimizers' own


Begin = Callable[[str, float | None], Note]


class Part(NamedTuple):
    """Of what is measured."""

    workload: Workload
    share: float
    """Of the time."""


PARTS: Final = (
    # Matrices as a small transformer has them, 256 and 1024 wide.
    Part(Decoding(batch_size=8, places=32, width=256, num_blocks=2, vocabulary=512), 0.85),
    Part(Bytewise(4096), 0.15),
)

FORMULAS: Final = {
    "ms": "median over the steps of one optimizer.step(), from an idle device to an idle device",
    "ratio": f"median over the rounds of t / t({REFERENCE}, of the same round)",
    "mean": f"time of all steps / that of {REFERENCE}'s: roots count, whichever steps take them",
    "of work": "as the mean, of this process's processor time",
    "worst": "the longest optimizer.step(), ms; by median: by the row's median",
    "early": "the longest step of the first interval, ms: the first makes the state, and roots are "
    "taken more often; counted nowhere else",
    "step": "the whole training step, forward and backward pass and optimizer.step(): its mean, "
    f"that by {REFERENCE}'s, and the longest by the row's median",
}
RANK_FORMULAS: Final = {
    "ms": "mean over the steps of optimizer.step(), least and most over ranks, waiting included",
    "work": "as ms, of processor time",
    "1/n": "what the column before has on one rank, by the number of ranks: ideal",
    "worst": "the longest step of any rank, ms",
    "MB": "of all tensors in optimizer.state, least and most over ranks",
    "on each": "MB of those that every rank has: moments that are not shared out, counts of steps",
    "collectives": "begun by optimizer.step(), the most over ranks, mean over steps",
    "sent": "MB put into them in a step, mean; by gradient: the most, by the MB that DDP averages",
}


def main(arguments: Sequence[str]) -> int:
    """`largebatch bench second_order`; 0, or 2 where an option cannot be."""
    parser = argparse.ArgumentParser(prog="largebatch bench second_order", description=__doc__)
    add_options(parser, 180.0, " in one process", "; more where whole intervals take longer")
    return run(parser, arguments, partial(measure, PARTS), show)


def measure(parts: Sequence[Part], device: torch.device, seconds: float) -> dict[str, Any]:
    """The record: provenance, formulas, and the lines of each workload, alone and on ranks.

    Ranks are processes on the CPU, whatever the device.
    """
    half = seconds / 2
    with harness.progress_bar() as begin:
        alone = [by_interval(part, device, half * part.share, begin) for part in parts]
        on_ranks = by_world_size(parts, half, begin)
    return harness.head_of("second_order", device, FORMULAS) | {
        "interval_on_ranks": INTERVAL_ON_RANKS,
        "rank_formulas": RANK_FORMULAS,
        "alone": alone,
        "on_ranks": on_ranks,
    }


def by_interval(part: Part, device: torch.device, seconds: float, begin: Begin) -> dict[str, Any]:
    """All rows at every interval, in this process."""
    lines: list[Record] = []
    spend = seconds / len(INTERVALS)
    for interval in INTERVALS:
        note = begin(f"{part.workload.name}, interval {interval}", spend)
        samples, _ = compare(Ranks(), part.workload, interval, device, spend, note)
        lines += [line(name, interval, samples) for name in ROWS]
    return describe(part.workload) | {"num_threads": torch.get_num_threads(), "rows": lines}


def by_world_size(parts: Sequence[Part], seconds: float, begin: Begin) -> list[dict[str, Any]]:
    """All rows on every number of ranks, for each part."""
    lines: list[list[Record]] = [[] for _ in parts]
    for num_ranks in WORLD_SIZES:
        begin(plural(num_ranks, "rank"), None)
        words = (parts, INTERVAL_ON_RANKS, seconds / len(WORLD_SIZES))
        found = harness.on_ranks(num_ranks, 1, compare_parts, *words)
        for place, rows in enumerate(lines):
            rows += [rank_line(name, [every[place][name] for every in found]) for name in ROWS]
    return [
        describe(part.workload) | {"rows": rows} for part, rows in zip(parts, lines, strict=True)
    ]


def compare_parts(
    ranks: Ranks, parts: Sequence[Part], interval: int, seconds: float
) -> list[dict[str, Any]]:
    """What one rank says of each row, for each part."""
    found = []
    for workload, share in parts:
        samples, state = compare(ranks, workload, interval, torch.device("cpu"), seconds * share)
        found.append({name: of_rank(name, samples[name], state[name]) for name in ROWS})
        gc.collect()  # models and their hooks hold one another
    return found


def compare(
    ranks: Ranks,
    workload: Workload,
    interval: int,
    device: torch.device,
    seconds: float,
    note: Note = lambda elapsed, what: None,
) -> tuple[dict[str, StepSamples], dict[str, dict[str, int]]]:
    """Samples, and bytes of state, of all rows in this process."""
    steppers = {
        name: SecondOrderStepper(make, interval, workload, ranks, device)
        for name, make in ROWS.items()
    }
    samples = run_rounds(steppers, interval, device, seconds, note)
    return samples, {name: stepper.state_bytes() for name, stepper in steppers.items()}


def line(name: str, interval: int, samples: Mapping[str, StepSamples]) -> Record:
    """One optimizer at one interval, beside the reference of the same rounds."""
    own, reference = samples[name], samples[REFERENCE]
    seconds = statistics.median(own.steps)
    return {
        "name": name,
        "interval": interval,
        "num_rounds": len(own),
        "seconds": seconds,
        "ratio": statistics.median(map(truediv, own.steps, reference.steps)),
        "mean_ratio": sum(own.steps) / sum(reference.steps),
        "work_ratio": sum(own.work) / sum(reference.work),
        "worst_seconds": max(own.steps),
        "worst_by_median": max(own.steps) / seconds,
        "early_worst_seconds": max(own.early),
        "whole_seconds": statistics.mean(own.wholes),
        "whole_ratio": sum(own.wholes) / sum(reference.wholes),
        "whole_worst_by_median": max(own.wholes) / statistics.median(own.wholes),
    }


def of_rank(name: str, own: StepSamples, state_bytes: Mapping[str, int]) -> Record:
    """What one rank says of one row."""
    collectives, sent = zip(*own.traffic, strict=True)
    return {
        "name": name,
        "num_rounds": len(own),
        "step_seconds": statistics.mean(own.steps),
        "work_seconds": statistics.mean(own.work),
        "worst_seconds": max(own.steps),
        "num_collectives": statistics.mean(collectives),
        "sent_bytes": statistics.mean(sent),
        "state": state_bytes,
    }


def rank_line(name: str, ranks: Sequence[Record]) -> Record:
    """What all ranks say of one row; a list has an entry for each."""
    states = [rank["state"] for rank in ranks]
    on_each = [key for key in states[0] if all(state[key] for state in states)]
    by_rank = ("step_seconds", "work_seconds", "worst_seconds", "num_collectives", "sent_bytes")
    return {
        "name": name,
        "num_ranks": len(ranks),
        "num_rounds": ranks[0]["num_rounds"],
        "state_bytes": [sum(state.values()) for state in states],
        "replicated_bytes": sum(states[0][key] for key in on_each),
        **{key: [rank[key] for rank in ranks] for key in by_rank},
    }


def show(record: dict[str, Any], console: Console) -> None:
    """What was measured with, how, and two tables for each workload."""
    harness.show_head(record, console, "whole training steps")
    for workload in record["alone"]:
        console.print()
        console.print(table(workload))
    say(
        console,
        "\nOn ranks of one thread each, batch and optimizer shared out among them; interval "
        f"{record['interval_on_ranks']}:",
        *(f"{name}: {formula}" for name, formula in record["rank_formulas"].items()),
    )
    cores = record["num_cores"]
    sizes = [row["num_ranks"] for workload in record["on_ranks"] for row in workload["rows"]]
    if cores is not None and max(sizes) > cores:
        say(
            console,
            f"More ranks than the {cores} cores here take turns on them: their ms and worst are "
            "mostly waiting, and only work says what a rank has to do.",
        )
    for workload in record["on_ranks"]:
        console.print()
        console.print(rank_table(workload))


def table(workload: dict[str, Any]) -> Table:
    title = (
        f"{workload['name']}, in one process of "
        f"{plural(workload['num_threads'], 'thread')}: {workload['num_parameters'] / 1e6:.2f} M "
        "parameters"
    )
    heads = (
        "interval", "rounds", "ms", "ratio", "mean", "of work", "worst", "by median", "early",
        "step ms", "step ratio", "step worst",
    )  # fmt: skip
    shown = make_table(title, "optimizer", heads)
    for before, entry in zip([None, *workload["rows"]], workload["rows"], strict=False):
        if before is not None and before["interval"] != entry["interval"]:
            shown.add_section()
        shown.add_row(
            entry["name"],
            str(entry["interval"]),
            str(entry["num_rounds"]),
            f"{1e3 * entry['seconds']:.2f}",
            f"{entry['ratio']:.2f}",
            f"{entry['mean_ratio']:.2f}",
            f"{entry['work_ratio']:.2f}",
            f"{1e3 * entry['worst_seconds']:.2f}",
            f"{entry['worst_by_median']:.1f}",
            f"{1e3 * entry['early_worst_seconds']:.1f}",
            f"{1e3 * entry['whole_seconds']:.1f}",
            f"{entry['whole_ratio']:.2f}",
            f"{entry['whole_worst_by_median']:.1f}",
        )
    return shown


def rank_table(workload: dict[str, Any]) -> Table:
    title = f"{workload['name']}: {workload['num_parameters'] / 1e6:.2f} M parameters"
    heads = (
        "ranks", "ms", "work", "1/n", "worst", "MB", "1/n", "on each", "collectives", "sent",
        "by gradient",
    )  # fmt: skip
    shown = make_table(title, "optimizer", heads)
    names = [*dict.fromkeys(entry["name"] for entry in workload["rows"])]
    for name in names:
        entries = [entry for entry in workload["rows"] if entry["name"] == name]
        alone = entries[0]
        assert alone["num_ranks"] == 1
        for entry in entries:
            n, sent = entry["num_ranks"], entry["sent_bytes"]
            shown.add_row(
                name,
                str(n),
                spread(entry["step_seconds"], 1e3),
                spread(entry["work_seconds"], 1e3),
                f"{1e3 * alone['work_seconds'][0] / n:.1f}",
                f"{1e3 * max(entry['worst_seconds']):.1f}",
                spread(entry["state_bytes"], 1e-6, 2),
                f"{1e-6 * alone['state_bytes'][0] / n:.2f}",
                f"{1e-6 * entry['replicated_bytes']:.2f}" if n > 1 else "",
                f"{max(entry['num_collectives']):.3g}",
                spread(sent, 1e-6, 2),
                f"{max(sent) / (4 * workload['num_parameters']):.2f}",
            )
        if name != names[-1]:
            shown.add_section()
    return shown


def spread(values: Sequence[float], unit: float, digits: int = 1) -> str:
    """Least and most; one number where they are shown alike."""
    least, most = (f"{unit * value:.{digits}f}" for value in (min(values), max(values)))
    return least if least == most else f"{least}-{most}"
