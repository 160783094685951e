"""`largebatch bench second_order`: what Shampoo, SOAP and K-FAC cost, beside torch's fused AdamW.

Real training steps of a decoder and of the bundled byte model, in interleaved rounds. In one
process by the interval from roots to roots; and on 1, 2 and 4 gloo ranks of one thread each, that
share the work out among them: time, memory and what travels, rank by rank.
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch.multiprocessing.spawn import start_processes

from largebatch.benchmarks.arguments import add_options, run
from largebatch.benchmarks.contenders import REFERENCE
from largebatch.benchmarks.noise.steps import Bytewise, Decoding, Workload
from largebatch.benchmarks.second_order.steps import ROWS, Samples, Stepper, run_rounds
from largebatch.benchmarks.second_order.tables import show
from largebatch.common.files import read_json
from largebatch.distributed.ranks import Ranks
from largebatch.train.reporting.provenance import provenance

INTERVALS: Final[tuple[int, ...]] = (1, 10, 50)
WORLD_SIZES: Final[tuple[int, ...]] = (1, 2, 4)
INTERVAL_ON_RANKS: Final = 10  # the optimizers' own


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


@dataclass(frozen=True)
class Line:
    """One optimizer at one interval. Ratios are to the reference of the same rounds."""

    name: str
    interval: int
    num_rounds: int
    seconds: float
    ratio: float
    mean_ratio: float
    work_ratio: float
    worst_seconds: float
    worst_by_median: float
    early_worst_seconds: float
    whole_seconds: float
    whole_ratio: float
    whole_worst_by_median: float


@dataclass(frozen=True)
class RankLine:
    """One optimizer on so many ranks; a list has an entry for each rank."""

    name: str
    num_ranks: int
    num_rounds: int
    step_seconds: list[float]
    work_seconds: list[float]
    worst_seconds: list[float]
    state_bytes: list[int]
    replicated_bytes: int
    """Of what every rank has."""
    num_collectives: list[float]
    sent_bytes: list[float]


def main(arguments: Sequence[str]) -> int:
    """`largebatch bench second_order`; 0, or 2 where an option cannot be."""
    parser = argparse.ArgumentParser(prog="largebatch bench second_order", description=__doc__)
    add_options(parser, 180.0, " in one process", "; more where whole intervals take longer")

    def measured(device: torch.device, seconds: float) -> dict[str, Any]:
        return measure(PARTS, device, seconds)

    return run(parser, arguments, measured, show)


def measure(parts: Sequence[Part], device: torch.device, seconds: float) -> dict[str, Any]:
    """The record: provenance, formulas, and the lines of each workload, alone and on ranks.

    Ranks are processes on the CPU, whatever the device.
    """
    half = seconds / 2
    columns = TextColumn("{task.description}"), BarColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        return {
            "benchmark": "second_order",
            "provenance": provenance(Ranks(), device),
            "load_average": os.getloadavg()[0],
            "num_cores": os.cpu_count(),
            "interval_on_ranks": INTERVAL_ON_RANKS,
            "formulas": FORMULAS,
            "rank_formulas": RANK_FORMULAS,
            "alone": [by_interval(part, device, half * part.share, bar) for part in parts],
            "on_ranks": by_world_size(parts, half, bar),
        }


def by_interval(part: Part, device: torch.device, seconds: float, bar: Progress) -> dict[str, Any]:
    """All rows at every interval, in this process."""
    lines: list[Line] = []
    spend = seconds / len(INTERVALS)
    for interval in INTERVALS:
        task = bar.add_task(f"{part.workload.name}, interval {interval}", total=spend)

        def progress(elapsed: float, task: Any = task) -> None:
            bar.update(task, completed=elapsed)

        seen = compare(part.workload, interval, Ranks(), device, spend, progress)
        lines += [line(name, interval, seen.samples) for name in ROWS]
        bar.remove_task(task)
    threads = {"num_threads": torch.get_num_threads()}
    return told(part.workload) | threads | {"rows": [asdict(each) for each in lines]}


def by_world_size(parts: Sequence[Part], seconds: float, bar: Progress) -> list[dict[str, Any]]:
    """All rows on every number of ranks, for each part."""
    lines: list[list[RankLine]] = [[] for _ in parts]
    for num_ranks in WORLD_SIZES:
        task = bar.add_task(f"{num_ranks} rank{'s' * (num_ranks > 1)}", total=None)
        found = compare_on_ranks(parts, num_ranks, seconds / len(WORLD_SIZES))
        for rows, more in zip(lines, found, strict=True):
            rows += more
        bar.remove_task(task)
    return [
        told(part.workload) | {"rows": [asdict(each) for each in rows]}
        for part, rows in zip(parts, lines, strict=True)
    ]


def told(workload: Workload) -> dict[str, Any]:
    num_parameters = sum(param.numel() for param in workload.model().parameters())
    return {"name": workload.name, "num_parameters": num_parameters}


@dataclass(frozen=True)
class Seen:
    """Of all rows in one process."""

    samples: dict[str, Samples]
    state_bytes: dict[str, dict[str, int]]


def compare(
    workload: Workload,
    interval: int,
    ranks: Ranks,
    device: torch.device,
    seconds: float,
    progress: Callable[[float], None],
) -> Seen:
    """All rows, in this process."""
    steppers = {
        name: Stepper(make, interval, workload, ranks, device) for name, make in ROWS.items()
    }
    samples = run_rounds(steppers, interval, device, seconds, progress)
    return Seen(samples, {name: stepper.state_bytes() for name, stepper in steppers.items()})


def line(name: str, interval: int, samples: Mapping[str, Samples]) -> Line:
    own, reference = samples[name], samples[REFERENCE]
    seconds = statistics.median(own.steps)
    ratios = [a / b for a, b in zip(own.steps, reference.steps, strict=True)]
    return Line(
        name=name,
        interval=interval,
        num_rounds=len(own),
        seconds=seconds,
        ratio=statistics.median(ratios),
        mean_ratio=sum(own.steps) / sum(reference.steps),
        work_ratio=sum(own.work) / sum(reference.work),
        worst_seconds=max(own.steps),
        worst_by_median=max(own.steps) / seconds,
        early_worst_seconds=max(own.early),
        whole_seconds=statistics.mean(own.wholes),
        whole_ratio=sum(own.wholes) / sum(reference.wholes),
        whole_worst_by_median=max(own.wholes) / statistics.median(own.wholes),
    )


def compare_on_ranks(parts: Sequence[Part], num_ranks: int, seconds: float) -> list[list[RankLine]]:
    """The rows of each part, on gloo ranks of one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(  # type: ignore[no-untyped-call]
            _as_rank,
            args=(num_ranks, parts, INTERVAL_ON_RANKS, seconds, folder),
            nprocs=num_ranks,
            start_method="spawn",
        )
        found = [read_json(Path(folder, f"{rank}.json")) for rank in range(num_ranks)]
    return [
        [rank_line(name, [every[place][name] for every in found]) for name in ROWS]
        for place in range(len(parts))
    ]


def _as_rank(
    rank: int,
    num_ranks: int,
    parts: Sequence[Part],
    interval: int,
    seconds: float,
    folder: str,
) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks
    )
    try:
        ranks = Ranks(rank=rank, size=num_ranks, local_rank=rank, local_size=num_ranks)
        found = []
        for workload, share in parts:
            seen = compare(
                workload,
                interval,
                ranks,
                torch.device("cpu"),
                seconds * share,
                lambda elapsed: None,
            )
            found.append({name: of_rank(name, seen) for name in ROWS})
            del seen
            gc.collect()  # models and their hooks hold one another, and the group that is to go
        dist.barrier()
        Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    finally:
        dist.destroy_process_group()


def of_rank(name: str, seen: Seen) -> dict[str, Any]:
    """What one rank says of one row."""
    own = seen.samples[name]
    collectives, sent = zip(*own.traffic, strict=True)
    return {
        "name": name,
        "num_rounds": len(own),
        "step_seconds": statistics.mean(own.steps),
        "work_seconds": statistics.mean(own.work),
        "worst_seconds": max(own.steps),
        "num_collectives": statistics.mean(collectives),
        "sent_bytes": statistics.mean(sent),
        "state": seen.state_bytes[name],
    }


def rank_line(name: str, ranks: Sequence[Mapping[str, Any]]) -> RankLine:
    """What all ranks say of one row."""
    states = [rank["state"] for rank in ranks]
    on_each = [key for key, size in states[0].items() if all(state[key] for state in states)]
    return RankLine(
        name=name,
        num_ranks=len(ranks),
        num_rounds=ranks[0]["num_rounds"],
        step_seconds=[rank["step_seconds"] for rank in ranks],
        work_seconds=[rank["work_seconds"] for rank in ranks],
        worst_seconds=[rank["worst_seconds"] for rank in ranks],
        state_bytes=[sum(state.values()) for state in states],
        replicated_bytes=sum(states[0][key] for key in on_each),
        num_collectives=[rank["num_collectives"] for rank in ranks],
        sent_bytes=[rank["sent_bytes"] for rank in ranks],
    )
