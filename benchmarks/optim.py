"""`largebatch bench optim`: the time of an optimizer's step, ours beside torch's and other peers'.

Two lists of tensors, one whose step is bound by memory and one whose step is bound by the number of
calls. Times are given as ratios to torch's fused AdamW in the same run, and as the share of the
memory's speed that the step's unavoidable traffic makes.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import Parameter

from largebatch.benchmarks import harness
from largebatch.benchmarks.contenders import PEERS, REFERENCE, Contender, contenders
from largebatch.benchmarks.harness import MEMORY_BYTES, Note, add_options, run, timed

FORMULAS: Final = {
    "ms": "median over the rounds of one optimizer.step(), device idle before and after",
    "ratio": f"median over the rounds of t / t({REFERENCE}) of the same round; then its quartiles",
    "GB/s": "4 B x (weight, gradient, state read once; weight, state written once) / median t",
    "of memory": "GB/s / that of scaling 128 MiB in place, median of the same rounds",
}


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Inventory:
    """The tensors of one model."""

    name: str
    shapes: tuple[Shape, ...]

    @property
    def num_parameters(self) -> int:
        return sum(map(math.prod, self.shapes))


def transformer(width: int = 512, num_blocks: int = 8, vocabulary: int = 8192) -> Inventory:
    """A decoder with tied embeddings and rotary positions: few tensors, and memory is the limit."""
    norm = [(width,), (width,)]
    block = [
        *norm,
        *linear(width, 3 * width),  # queries, keys and values
        *linear(width, width),
        *norm,
        *linear(width, 4 * width),
        *linear(4 * width, width),
    ]
    return Inventory("transformer", ((vocabulary, width), *(block * num_blocks), *norm))


def linear(num_in: int, num_out: int) -> list[Shape]:
    return [(num_out, num_in), (num_out,)]


def small_tensors(num_each: int = 200) -> Inventory:
    """Gains, small matrices and convolution kernels: they fit a cache, and calls are the limit."""
    return Inventory("small tensors", ((64,), (32, 32), (16, 16, 3, 3)) * num_each)


def main(arguments: Sequence[str]) -> int:
    """`largebatch bench optim`; 0, or 2 where an option cannot be."""
    parser = argparse.ArgumentParser(prog="largebatch bench optim", description=__doc__)
    add_options(parser, 40.0)
    inventories = small_tensors(), transformer()
    return run(parser, arguments, partial(measure, inventories), show)


def measure(
    inventories: Sequence[Inventory], device: torch.device, seconds: float
) -> dict[str, Any]:
    """The record: provenance, formulas, and the lines of each inventory."""
    rows, left_out = contenders()
    libraries = sorted({module.partition(".")[0] for _, _, (module, _), _ in PEERS})
    found, share = [], seconds / len(inventories)
    with harness.progress_bar() as begin:
        for inventory in inventories:
            samples = run_rounds(inventory, rows, device, share, begin(inventory.name, share))
            found.append(summarize(inventory, rows, samples))
    return harness.head_of("optim", device, FORMULAS) | {
        "peers": {name: version_of(name) for name in libraries},
        "left_out": left_out,
        "inventories": found,
    }


class Tensors:
    """Weights that all optimizers step in turn, and the gradients that each of them finds."""

    def __init__(self, inventory: Inventory, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(shape, generator=generator) for shape in inventory.shapes]
        self.params = [Parameter(0.02 * values.to(device)) for values in drawn]
        self._grads = [1e-3 * values.flip(0).to(device) for values in drawn]
        for param, grad in zip(self.params, self._grads, strict=True):
            param.grad = grad.clone()

    @torch.no_grad()
    def write_grads(self) -> None:
        for param, grad in zip(self.params, self._grads, strict=True):
            assert param.grad is not None
            param.grad.copy_(grad)


def run_rounds(
    inventory: Inventory,
    contenders: Sequence[Contender],
    device: torch.device,
    seconds: float,
    note: Note,
) -> dict[str, list[Any]]:
    """Seconds of one step of every optimizer a round; and as "memory" two of them: of reading and
    writing MEMORY_BYTES / 2 in place, as optimizers write, and of copying as much. That a CPU first
    reads what it overwrites is not counted.

    Before each step, outside of what is timed, the gradients are written anew: some optimizers
    change them.
    """
    tensors = Tensors(inventory, device)
    optimizers = {row.name: row.make(tensors.params) for row in contenders}
    memory = torch.ones(MEMORY_BYTES // 8, device=device)
    target = torch.ones_like(memory)

    def step(name: str) -> float:
        tensors.write_grads()
        return timed(optimizers[name].step, device)

    def move() -> tuple[float, float]:
        scaling = timed(lambda: memory.mul_(1.0), device)
        return scaling, timed(lambda: target.copy_(memory), device)

    samplers: dict[str, Callable[[], Any]] = {name: partial(step, name) for name in optimizers}
    return harness.run_rounds(samplers | {"memory": move}, seconds, note)


def summarize(
    inventory: Inventory, rows: Sequence[Contender], samples: dict[str, list[Any]]
) -> dict[str, Any]:
    """Medians and ratios over the samples of one inventory."""
    scalings, copies = zip(*samples["memory"], strict=True)
    memory_speed = MEMORY_BYTES / statistics.median(scalings)
    return {
        "name": inventory.name,
        "num_tensors": len(inventory.shapes),
        "num_parameters": inventory.num_parameters,
        "num_rounds": len(copies),
        "memory_bytes_per_second": memory_speed,
        "copy_bytes_per_second": MEMORY_BYTES / statistics.median(copies),
        "optimizers": [line(row, inventory, samples, memory_speed) for row in rows],
    }


def line(
    row: Contender, inventory: Inventory, samples: dict[str, list[float]], memory_speed: float
) -> dict[str, Any]:
    """One optimizer on one inventory."""
    told = harness.against(samples[row.name], samples[REFERENCE])
    least_bytes = 4 * row.words * inventory.num_parameters
    speed = least_bytes / told["seconds"]
    return {
        "name": row.name, **told, "least_bytes": least_bytes, "bytes_per_second": speed,
        "share_of_memory": speed / memory_speed,
    }  # fmt: skip


def version_of(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def show(record: dict[str, Any], console: Console) -> None:
    """What was measured with, how, and a table for each inventory."""
    harness.show_head(record, console, f"{record['num_warm_up']} warm-up steps", record["peers"])
    harness.say(console, *record["left_out"])
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
    heads = ("ms", "ratio", "quartiles", "GB/s", "of memory")
    shown = harness.make_table(title, "optimizer", heads)
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
