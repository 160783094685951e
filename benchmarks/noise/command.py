"""`largebatch bench noise`: what measuring the gradient noise scale adds to a training step.

Steps of the training loop with and without it, in interleaved rounds: in one process at the
bundled byte model and at a decoder, and on two gloo ranks at the decoder. Times are given as ratios
to the same step without it in the same round. A second row without it says how far a ratio can be
trusted here. Beside the time that is added stands the least that could be: that of reading from
memory, once, what the norms are taken of.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from operator import sub, truediv
from typing import Any, Final

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from largebatch.benchmarks import harness
from largebatch.benchmarks.harness import FEWEST_ROUNDS, MEMORY_BYTES, Note, plural, timed_on_ranks
from largebatch.benchmarks.noise.steps import ALONE, NUM_MICRO_BATCHES, ON_RANKS, NoiseStepper, Row
from largebatch.benchmarks.workloads import Bytewise, Decoding, Workload, describe
from largebatch.distributed.ranks import Ranks

NUM_RANKS: Final = 2
ONE_PROCESS: Final[tuple[Workload, ...]] = (
    Bytewise(256),
    Bytewise(1024),
    Bytewise(4096),
    Decoding(),
)
RANKS: Final[tuple[Workload, ...]] = (Decoding(),)

FORMULAS: Final = {
    "ms": "median over the rounds of one step, from an idle device to an idle device",
    "ratio": "median over the rounds of t / t(the row without, of the same round); its quartiles",
    "of work": "as the ratio, of this process's processor time: what else runs here hardly counts",
    "own ms": "processor time of one step inside of what measures, mean of 3 steps",
    "of step": "own ms / processor time of the row without, median",
    "floor ms": "bytes that norms are taken of / speed of adding up 256 MiB in the same rounds",
    "of floor": "own ms / floor ms: how far from the least that is possible",
    "collectives": "of one step, counted by the profiler, beyond those of the row without",
    "floats": "FP32 values beyond its own in the one all-reduce that takes the loss",
}


Samples = dict[str, list[tuple[float, float]]]
"""Of each row, round by round: seconds, and those of processor time, of all threads."""


def main(arguments: Sequence[str]) -> int:
    """`largebatch bench noise`; 0, or 2 where an option cannot be."""
    parser = argparse.ArgumentParser(prog="largebatch bench noise", description=__doc__)
    harness.add_options(parser, 240.0)
    return harness.run(parser, arguments, partial(measure, ONE_PROCESS, RANKS), show)


def measure(
    alone: Sequence[Workload], on_ranks: Sequence[Workload], device: torch.device, seconds: float
) -> dict[str, Any]:
    """The record: provenance, formulas, and the lines of each workload.

    Ranks are processes on the CPU, whatever the device, and share its threads.
    """
    share = seconds / (len(alone) + len(on_ranks))
    found = []
    with harness.progress_bar() as begin:
        for workload in alone:
            note = begin(workload.name, share)
            found.append(compare(Ranks(), ALONE, workload, device, share, note))
        for workload in on_ranks:
            begin(f"{workload.name}, {NUM_RANKS} ranks", None)
            found.append(compare_on_ranks(workload, share))
    head = harness.head_of("noise", device, FORMULAS)
    return head | {"num_micro_batches": NUM_MICRO_BATCHES, "workloads": found}


def compare(
    ranks: Ranks,
    rows: Sequence[Row],
    workload: Workload,
    device: torch.device,
    seconds: float,
    note: Note = lambda elapsed, what: None,
) -> dict[str, Any]:
    """What the rows cost at one workload, on every rank of `ranks`."""
    steppers = {row.name: NoiseStepper(row, workload, ranks, device) for row in rows}
    samples = run_rounds(steppers, device, seconds, note)
    collectives = {name: collectives_of(stepper.step) for name, stepper in steppers.items()}
    own = {name: stepper.own_work(FEWEST_ROUNDS) for name, stepper in steppers.items()}
    for stepper in steppers.values():
        stepper.finish()
    read_speed = MEMORY_BYTES / statistics.median(seconds for seconds, _ in samples["memory"])
    return describe(workload) | {
        "num_ranks": ranks.size,
        "num_rounds": len(samples["memory"]),
        "num_threads": torch.get_num_threads(),
        "read_bytes_per_second": read_speed,
        "collectives": collectives,
        "rows": [
            line(row, samples, steppers, collectives, own[row.name], read_speed) for row in rows
        ],
    }


def compare_on_ranks(workload: Workload, seconds: float) -> dict[str, Any]:
    """As `compare`, on gloo ranks of their own that share this process's threads."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the ranks' profiler speaks of itself, else
    threads = max(1, torch.get_num_threads() // NUM_RANKS)
    words = (ON_RANKS, workload, torch.device("cpu"), seconds)
    found: dict[str, Any] = harness.on_ranks(NUM_RANKS, threads, compare, *words)[0]
    return found


def run_rounds(
    steppers: dict[str, NoiseStepper], device: torch.device, seconds: float, note: Note
) -> Samples:
    """Sample one step of every row a round, and one read of MEMORY_BYTES as "memory"."""
    memory = torch.ones(MEMORY_BYTES // 4, device=device)
    work: dict[str, Callable[[], object]] = {name: each.step for name, each in steppers.items()}
    work["memory"] = memory.sum
    samplers = {name: partial(timed_on_ranks, each, device) for name, each in work.items()}
    return harness.run_rounds(samplers, seconds, note)


def collectives_of(step: Callable[[], None]) -> int:
    """How many collectives this process takes part in during one step."""
    if not dist.is_initialized():
        return 0
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
        dist.barrier()  # what is still on its way has begun
    counts: dict[str, int] = {event.key: event.count for event in seen.key_averages()}
    return sum(count for name, count in counts.items() if name.startswith("gloo:")) - 1


def line(
    row: Row,
    samples: Samples,
    steppers: dict[str, NoiseStepper],
    collectives: dict[str, int],
    own_seconds: float,
    read_speed: float,
) -> dict[str, Any]:
    """One row at one workload, beside its reference."""
    own, own_work = zip(*samples[row.name], strict=True)
    without, work = zip(*samples[row.reference], strict=True)
    stepper, reference = steppers[row.name], steppers[row.reference]
    return {
        "name": row.name,
        **harness.against(own, without),
        "work_ratio": statistics.median(map(truediv, own_work, work)),
        "extra_seconds": statistics.median(map(sub, own, without)),
        "own_seconds": own_seconds,
        "own_share": own_seconds / statistics.median(work),
        "floor_seconds": stepper.least_bytes / read_speed,
        "extra_collectives": collectives[row.name] - collectives[row.reference],
        "extra_floats": stepper.num_summed - reference.num_summed,
    }


def show(record: dict[str, Any], console: Console) -> None:
    """What was measured with, how, and a table for each workload."""
    how = (
        f"{record['num_warm_up']} warm-up steps; {record['num_micro_batches']} micro-batches a "
        "step on each rank"
    )
    harness.show_head(record, console, how)
    for workload in record["workloads"]:
        console.print()
        console.print(table(workload))


def table(workload: dict[str, Any]) -> Table:
    title = (
        f"{workload['name']}, {plural(workload['num_ranks'], 'rank')} of "
        f"{plural(workload['num_threads'], 'thread')}: {workload['num_parameters'] / 1e6:.2f} M "
        f"parameters, {workload['num_rounds']} rounds; memory "
        f"{workload['read_bytes_per_second'] / 1e9:.1f} GB/s reading"
    )
    heads = (
        "ms", "ratio", "quartiles", "of work", "own ms", "of step", "floor ms", "of floor",
        "collectives", "floats",
    )  # fmt: skip
    shown = harness.make_table(title, "noise scale", heads)
    for entry in workload["rows"]:
        low, high = entry["ratio_quartiles"]
        shown.add_row(
            entry["name"],
            f"{1e3 * entry['seconds']:.2f}",
            f"{entry['ratio']:.3f}",
            f"{low:.3f}-{high:.3f}",
            f"{entry['work_ratio']:.3f}",
            f"{1e3 * entry['own_seconds']:.3f}",
            f"{entry['own_share']:.1%}",
            f"{1e3 * entry['floor_seconds']:.3f}",
            f"{entry['own_seconds'] / floor:.1f}" if (floor := entry["floor_seconds"]) else "",
            f"{entry['extra_collectives']:+d}",
            f"{entry['extra_floats']:+d}",
        )
    return shown
