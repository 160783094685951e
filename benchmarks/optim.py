"""`largebatch bench optim`: the time of an optimizer's step, ours beside torch's and other peers'.

Two lists of tensors, one whose step is bound by memory and one whose step is bound by the number of
calls. Times are told as ratios to torch's fused AdamW in the same run, and as the share of the
memory's speed that the step's unavoidable traffic makes.
"""

import argparse
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from largebatch.benchmarks.arguments import add_options, run
from largebatch.benchmarks.contenders import PEERS, REFERENCE, Contender, contenders
from largebatch.benchmarks.inventories import Inventory, small_tensors, transformer
from largebatch.benchmarks.rounds import MEMORY_BYTES, NUM_WARM_UP, Rounds, run_rounds
from largebatch.distributed.ranks import Ranks
from largebatch.train.reporting.provenance import provenance

FORMULAS: Final = {
    "ms": "median over the rounds of one optimizer.step(), device idle before and after",
    "ratio": f"median over the rounds of t / t({REFERENCE}) of the same round; then its quartiles",
    "GB/s": "4 B x (weight, gradient, state read once; weight, state written once) / median t",
    "of memory": "GB/s / that of scaling 128 MiB in place, median of the same rounds",
}


@dataclass(frozen=True)
class Line:
    """One optimizer on one inventory. A ratio is to the reference of the same round."""

    name: str
    seconds: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    least_bytes: int
    bytes_per_second: float
    share_of_memory: float


def main(arguments: Sequence[str]) -> int:
    """`largebatch bench optim`; 0, or 2 where an option cannot be."""
    parser = argparse.ArgumentParser(prog="largebatch bench optim", description=__doc__)
    add_options(parser, 40.0)

    def measured(device: torch.device, seconds: float) -> dict[str, Any]:
        return measure((small_tensors(), transformer()), device, seconds)

    return run(parser, arguments, measured, show)


def measure(
    inventories: Sequence[Inventory], device: torch.device, seconds: float
) -> dict[str, Any]:
    """The record: provenance, formulas, and the lines of each inventory."""
    rows, left_out = contenders()
    record: dict[str, Any] = {
        "benchmark": "optim",
        "provenance": provenance(Ranks(), device),
        "peers": {name: version_of(name) for name in peer_libraries()},
        "left_out": left_out,
        "load_average": os.getloadavg()[0],
        "num_warm_up": NUM_WARM_UP,
        "formulas": FORMULAS,
        "inventories": [],
    }
    bar = Progress(
        BarColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        disable=not Console(stderr=True).is_terminal,
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=seconds)
        for index, inventory in enumerate(inventories):
            share = seconds / len(inventories)

            def progress(elapsed: float, what: str, before: float = index * share) -> None:
                bar.update(task, completed=before + elapsed, description=what)

            rounds = run_rounds(inventory, rows, device, share, progress)
            record["inventories"].append(told(inventory, rows, rounds))
    return record


def told(inventory: Inventory, rows: Sequence[Contender], rounds: Rounds) -> dict[str, Any]:
    """What the samples of one inventory say."""
    memory_speed = MEMORY_BYTES / statistics.median(rounds.scalings)
    return {
        "name": inventory.name,
        "num_tensors": len(inventory.shapes),
        "num_parameters": inventory.num_parameters,
        "num_rounds": len(rounds),
        "memory_bytes_per_second": memory_speed,
        "copy_bytes_per_second": MEMORY_BYTES / statistics.median(rounds.copies),
        "optimizers": [asdict(line(row, inventory, rounds, memory_speed)) for row in rows],
    }


def line(row: Contender, inventory: Inventory, rounds: Rounds, memory_speed: float) -> Line:
    times = rounds.steps[row.name]
    seconds = statistics.median(times)
    ratios = [a / b for a, b in zip(times, rounds.steps[REFERENCE], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    least_bytes = 4 * row.words * inventory.num_parameters
    return Line(
        name=row.name,
        seconds=seconds,
        ratio=middle,
        ratio_quartiles=(low, high),
        least_bytes=least_bytes,
        bytes_per_second=least_bytes / seconds,
        share_of_memory=least_bytes / seconds / memory_speed,
    )


def peer_libraries() -> list[str]:
    return sorted({module.partition(".")[0] for _, _, (module, _), _ in PEERS})


def version_of(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def show(record: dict[str, Any], console: Console) -> None:
    """What was measured with, how, and a table for each inventory."""
    made, peers = record["provenance"], record["peers"]
    versions = made["versions"] | {name: number for name, number in peers.items() if number}
    lines = [
        ", ".join(f"{name} {number}" for name, number in versions.items()),
        f"{made['device']}, {made['num_threads']} threads; {record['num_warm_up']} warm-up steps; "
        f"load average {record['load_average']:.1f} at the start, best below 0.5",
        *(f"{name}: {formula}" for name, formula in record["formulas"].items()),
        *record["left_out"],
    ]
    for text in lines:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    for inventory in record["inventories"]:
        console.print()
        console.print(table(inventory))


def table(inventory: dict[str, Any]) -> Table:
    title = (
        f"{inventory['name']}: {inventory['num_parameters'] / 1e6:.1f} M parameters in "
        f"{inventory['num_tensors']} tensors, {inventory['num_rounds']} rounds; memory "
        f"{inventory['memory_bytes_per_second'] / 1e9:.1f} GB/s in place, "
        f"{inventory['copy_bytes_per_second'] / 1e9:.1f} GB/s copying"
    )
    shown = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    shown.add_column("optimizer")
    for head in ("ms", "ratio", "quartiles", "GB/s", "of memory"):
        shown.add_column(head, justify="right", no_wrap=True)
    for entry in inventory["optimizers"]:
        low, high = entry["ratio_quartiles"]
        shown.add_row(
            entry["name"],
            f"{1e3 * entry['seconds']:.2f}",
            f"{entry['ratio']:.2f}",
            f"{low:.2f}-{high:.2f}",
            f"{entry['bytes_per_second'] / 1e9:.1f}",
            f"{entry['share_of_memory']:.0%}",
        )
    return shown
