"""`largebatch bench scale`: what a rank of 384, 3,840 and 38,400 has to send, hold and work out.

One rank is built and run here, on tensors without data and in a group whose other ranks are not
there: the exchange of each second-order optimizer, the norms of layer-wise ones, the planning of a
checkpoint. The model has the matrices of a decoder of 7 B parameters. Bytes, collectives and memory
are counted; seconds of planning and of the host are measured, as processor time of this machine;
messages, and seconds on the wire, are modelled.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from largebatch.benchmarks.collectives.models import Cost, Link, rabenseifner
from largebatch.benchmarks.harness import Record, check, say
from largebatch.benchmarks.scale.steps import (
    EXCHANGES,
    LAYOUTS,
    PER_NODE,
    Exchanged,
    Shapes,
    exchanged,
    matrices,
    norms_reduced,
    planned,
    takes_meta,
)
from largebatch.common.console import output_console

WORLD_SIZES: Final = (384, 3840, 38400)

HEADS: Final = {
    "layout": "ddp: a copy on each rank; hsdp: shards within a node of 12 ranks, copies from node "
    "to node",
    "owners": "ranks that precondition anything; share: what the one with most has made, MB",
    "calls": "counted: collectives that the rank begins in a step",
    "sent": "counted: MB that it puts into them",
    "memory": "counted: the most MB that the exchange has in hand at once, beside the share",
    "to each": "modelled: MB of the share if it were sent to every other rank by itself",
    "messages": "modelled: Rabenseifner's 2 lg p for an all-reduce; for an all-to-all counted, one "
    "for each rank that is sent anything",
    "wire": "modelled: seconds by alpha a message and beta a byte, all ranks alike, nothing "
    "overlapped, no congestion",
    "plan": "measured: seconds of building it, once; host: seconds of the host in a step",
}
PLAN_HEADS: Final = {
    "writers": "counted: ranks that may write; the others plan nothing",
    "first": "measured: seconds of rank 0, at the first save and when shapes or places change",
    "idle": "measured: seconds of a rank that writes nothing, then",
    "again": "measured: seconds of every rank at each later save",
    "sent": "counted: bytes that a rank sends, for ranks to agree that their plans are one",
    "by torch": "modelled, at every save: GB of pickles that rank 0 would gather (one is "
    "counted here), and the seconds of unpickling and joining them (8 are measured)",
}


def main(arguments: Sequence[str]) -> int:
    """`largebatch bench scale`; 0, or 2 where an option cannot be."""
    parser = argparse.ArgumentParser(prog="largebatch bench scale", description=__doc__)
    add = parser.add_argument
    default = ",".join(map(str, WORLD_SIZES))
    add("--ranks", default=default, metavar="LIST", help="world sizes (default: %(default)s)")
    add("--alpha", type=float, default=2e-6, help="seconds a message (assumed: %(default)g)")
    add("--beta", type=float, default=4e-11, help="seconds a byte (assumed: %(default)g)")
    add("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args(arguments)
    try:
        sizes = [int(word) for word in options.ranks.split(",") if word.strip().isdecimal()]
        good = len(sizes) == len(options.ranks.split(",")) and all(
            size % PER_NODE == 0 and PER_NODE < size <= 10**6 for size in sizes
        )
        accepted = f"multiples of {PER_NODE}, from {2 * PER_NODE} to a million, as {default}"
        check(good, "--ranks", accepted, options.ranks)
        for name in ("alpha", "beta"):
            value = getattr(options, name)
            check(0 <= value < math.inf, f"--{name}", "a number of seconds of at least 0", value)
        folder = Path() if options.json is None else options.json.parent
        check(folder.is_dir(), "--json", "a file in a folder that exists", options.json)
        accepted = "one whose collectives take meta tensors, as those of 2.13 do"
        check(takes_meta(), "torch", accepted, torch.__version__)
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    record = measure(matrices(), sizes, Link(options.alpha, options.beta))
    show(record, output_console())
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(shapes: Shapes, sizes: Sequence[int], link: Link) -> Record:
    """Of a model's matrices, for each world size."""
    found: list[dict[str, Any]] = []
    plans: list[dict[str, Any]] = []
    for layout in LAYOUTS:
        for size in sizes:
            for name in EXCHANGES:
                row = exchanged(name, shapes, layout, size)
                found.append(exchange_row(name, layout, size, row, link))
            row = norms_reduced(shapes, layout, size)
            found.append(exchange_row("LAMB, LARS: norms", layout, size, row, link))
            plan = planned(shapes, layout, size)
            plans.append({
                "layout": layout, "ranks": size, **plan,
                "all_torch_bytes": size * plan["torch_bytes"],
                "all_torch_seconds": size * plan["torch_seconds"],
            })  # fmt: skip
    return {
        "benchmark": "scale",
        "matrices": len(shapes),
        "parameters": sum(map(math.prod, shapes.values())),
        "alpha": link.alpha,
        "beta": link.beta,
        "heads": HEADS,
        "exchanges": found,
        "plan_heads": PLAN_HEADS,
        "plans": plans,
    }


def exchange_row(name: str, layout: str, size: int, row: Exchanged, link: Link) -> dict[str, Any]:
    """A row of the record, with what is modelled."""
    # A sum goes from copy to copy, over the nodes, where each of these has one.
    over = size if layout == "ddp" else size // PER_NODE
    cost = sum((rabenseifner(over, sent) for sent in row.reduced), Cost())
    for sent, partners in row.partners:
        cost += Cost(partners, sent)
    counted = {
        key: value for key, value in asdict(row).items() if key not in ("partners", "reduced")
    }
    return {
        "optimizer": name, "layout": layout, "ranks": size, **counted,
        "messages": cost.messages, "wire_seconds": cost.seconds(link),
        "to_each_bytes": (size - 1) * row.largest_share,
    }  # fmt: skip


def show(record: Record, console: Console) -> None:
    say(
        console,
        f"{record['matrices']} matrices of {record['parameters'] / 1e9:.2f} B elements in FP32; "
        f"alpha {record['alpha']:g} s, beta {record['beta']:g} s, both assumed",
        *(f"{name}: {words}" for name, words in record["heads"].items()),
    )
    heads = ("layout", "ranks", "", "owners", "share", "calls", "sent", "memory", "to each",
             "messages", "wire", "plan", "host")  # fmt: skip
    console.print(table("A step's exchange, on the rank with the largest share", heads, [
        (
            row["layout"], f"{row['ranks']:,}", row["optimizer"], f"{row['owners']:,}",
            mega(row["largest_share"]), f"{sum(row['collectives'].values()):,}",
            mega(row["sent"]), mega(row["memory"]), mega(row["to_each_bytes"]),
            f"{row['messages']:,.0f}", f"{row['wire_seconds']:.3g}",
            f"{row['plan_seconds']:.2f}", f"{row['host_seconds']:.2f}",
        )
        for row in record["exchanges"]
    ]))  # fmt: skip
    say(
        console,
        "",
        *(f"{name}: {words}" for name, words in record["plan_heads"].items()),
    )
    of_plans = ("layout", "ranks", "writers", "first", "idle", "again", "sent", "by torch", "")
    console.print(table("The planning of a checkpoint of the model and LAMB's state", of_plans, [
        (
            row["layout"], f"{row['ranks']:,}", f"{row['writers']:,}",
            f"{row['first_seconds']:.2f}", f"{row['bystander_seconds']:.2f}",
            f"{row['again_seconds']:.2f}", f"{row['agreed_bytes']}",
            f"{row['all_torch_bytes'] / 1e9:.2f} GB", f"{row['all_torch_seconds']:,.0f} s",
        )
        for row in record["plans"]
    ]))  # fmt: skip


def mega(count: float) -> str:
    return f"{count / 1e6:,.3g}" if count < 1e9 else f"{count / 1e6:,.0f}"


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    shown = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    for head in heads:
        left = head in ("layout", "")
        shown.add_column(head, justify="left" if left else "right", no_wrap=True)
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and before[:2] != row[:2]:
            shown.add_section()
        shown.add_row(*row)
    return shown
