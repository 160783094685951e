"""What `largebatch bench collectives` prints and keeps.

Bus bandwidth is nccl-tests' (its doc/PERFORMANCE.md): bytes over seconds, times 2 (p-1)/p for
all-reduce, (p-1)/p for reduce-scatter and all-gather, 1 for broadcast. Other tools multiply by
other factors, DLcomm_benchmark by the number of ranks: such figures do not compare.
"""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table

from largebatch.benchmarks.collectives.fit import Fit
from largebatch.benchmarks.collectives.models import Cluster, binary
from largebatch.benchmarks.collectives.steps import Measurement
from largebatch.distributed.ranks import Ranks
from largebatch.train.reporting.provenance import provenance

FACTORS: Final[dict[str, Callable[[int], float]]] = {
    "all_reduce": lambda ranks: 2 * (ranks - 1) / ranks,
    "reduce_scatter": lambda ranks: (ranks - 1) / ranks,
    "all_gather": lambda ranks: (ranks - 1) / ranks,
    "broadcast": lambda ranks: 1.0,
}
COLUMNS: Final = (
    "collective", "backend", "device", "ranks", "local_ranks", "bytes", "seconds", "seconds_least",
    "seconds_most", "rounds", "algbw_bytes_per_second", "busbw_factor_nccl_tests",
    "busbw_bytes_per_second", "values",
)  # fmt: skip
TABLES: Final = ("collectives.csv", "projection.csv")


def bandwidths(row: Measurement) -> tuple[float, float]:
    """Algorithm and bus bandwidth in bytes a second."""
    algorithm = row.nbytes / median(row.seconds)
    return algorithm, algorithm * FACTORS[row.collective](row.ranks)


def show_measured(measured: Sequence[Measurement], console: Console) -> None:
    table = Table(title=f"{measured[0].backend} on {measured[0].device}, FP32, median of rounds")
    for name in ("collective", "ranks", "bytes", "µs", "algbw GB/s", "busbw GB/s", "values"):
        table.add_column(name, justify="left" if name in ("collective", "values") else "right")
    for row in measured:
        if row.wrong:
            table.add_row(row.collective, f"{row.ranks:,}", f"{row.nbytes:,}", "", "", "", "WRONG")
            continue
        algorithm, bus = bandwidths(row)
        table.add_row(
            row.collective, f"{row.ranks:,}", f"{row.nbytes:,}",
            f"{1e6 * median(row.seconds):,.1f}", f"{algorithm / 1e9:.3g}", f"{bus / 1e9:.3g}",
            "right",
        )  # fmt: skip
    console.print(table)
    console.print(
        "busbw is nccl-tests': algbw times 2 (p-1)/p for all_reduce, (p-1)/p for reduce_scatter "
        "and all_gather, 1 for broadcast."
    )
    for row in measured:
        if row.wrong:
            of = f"{row.collective} of {row.nbytes:,} bytes over {row.ranks} ranks"
            console.print(f"WRONG VALUES in {of}: {row.wrong}", style="bold red")


def show_fits(found: Sequence[Fit], console: Console) -> None:
    if not found:
        console.print("No alpha and beta: too few sizes of all_reduce over 2 or more ranks.")
        return
    best = found[0]
    alpha = format_estimate(best.alpha, best.alpha_error)
    beta = format_estimate(best.beta, best.beta_error)
    console.print(
        f"As {best.algorithm}, all_reduce took alpha = {alpha} seconds a message and beta = {beta} "
        "seconds a byte "
        "(adding up included), with standard errors. Spread of the times around each algorithm's "
        "model: "
        + ", ".join(f"{fit.algorithm} {fit.spread:.0%}" for fit in found)
        + ". (One rank count tells no algorithms apart.)"
    )
    for doubt in best.doubts:
        console.print(f"The fit is poor: {doubt}.", style="bold")


def format_estimate(value: float, error: float) -> str:
    return f"{value:.3g} ± {error:.2g}"


def show_projection(projected: dict[str, Any], algorithms: Sequence[str], console: Console) -> None:
    cluster: Cluster = projected["cluster"]
    out, inside = cluster.shared_out, cluster.inside
    console.print(
        f"\nPROJECTION, not a measurement: all-reduce over nodes of {cluster.ranks_per_node} ranks "
        f"each, reduced in the node first. Between nodes {out.alpha:.3g} s a message and "
        f"{out.beta:.3g} s a byte for each rank, inside {inside.alpha:.3g} and {inside.beta:.3g}."
    )
    table = Table(title="milliseconds, * the fastest", title_justify="left")
    for name in ("bytes", "nodes", *algorithms):
        table.add_column(name, justify="right", overflow="fold")
    for row in projected["rows"]:
        cells = [
            f"{1e3 * row.seconds[name]:,.3f}{'*' if name == row.fastest else ' '}"
            if name in row.seconds
            else "falls back "
            for name in algorithms
        ]
        table.add_row(binary(row.nbytes), f"{row.nodes:,}", *cells)
    console.print(table)
    console.print(f"The model's choice for {projected['nodes']:,} nodes, as oneCCL's environment:")
    for name, value in projected["settings"].items():
        console.print(f'  export {name}="{value}"', soft_wrap=True, highlight=False)
    console.print(
        "A proposal. Sizes are of a rank's share of the message, which oneCCL's topo sends between "
        "nodes (inferred: CCL_LOG_LEVEL=info prints the table that it made). Before it is used: "
        "measure it against `direct`, which is the MPI library's own and has no formula, and let "
        "`largebatch bench collectives` check every value under it; Rabenseifner's was reported to "
        "fail in oneCCL in 2025. A power-of-two number of nodes spares it two whole vectors."
    )


def keep(folder: Path | None, parts: dict[str, Any]) -> None:
    """Tables as CSV, pictures as PNG, all of it as JSON with what it was measured with."""
    if folder is None:
        return
    projected = parts.get("projection")
    if "measured" in parts:
        keep_measured(folder, parts["measured"], parts["fits"])
    if projected is not None:
        keep_projection(folder, projected)
    print(f"largebatch: tables and pictures are in {folder}")


def keep_measured(folder: Path, measured: Sequence[Measurement], found: Sequence[Fit]) -> None:
    from largebatch.benchmarks.collectives.picture import measured_figure
    from largebatch.common.figures import DPI, paper_style

    right = [row for row in measured if row.seconds]
    with (folder / "collectives.csv").open("x", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow([*COLUMNS])
        for row in measured:
            begin = (
                row.collective, row.backend, row.device, row.ranks, row.local_ranks, row.nbytes,
            )  # fmt: skip
            if not row.seconds:
                table.writerow([*begin, *[""] * 7, f"wrong: {row.wrong}"])
                continue
            algorithm, bus = bandwidths(row)
            table.writerow(
                [*begin, median(row.seconds), min(row.seconds), max(row.seconds), len(row.seconds),
                 algorithm, FACTORS[row.collective](row.ranks), bus, "right"]
            )  # fmt: skip
    ranks = Ranks(size=max(row.ranks for row in measured))
    record = {
        "provenance": provenance(ranks, torch.device(measured[0].device)),
        "busbw": "nccl-tests",
        "measured": [asdict(row) for row in measured],
        "fits": [asdict(fit) for fit in found],
    }
    text = json.dumps(record, indent=1)
    (folder / "collectives.json").write_text(text + "\n", encoding="utf-8")
    if right:
        rows = [(row.collective, row.ranks, row.nbytes, median(row.seconds)) for row in right]
        title = f"Measured: {measured[0].backend} on {measured[0].device}"
        with paper_style():
            measured_figure(rows, title).savefig(folder / "collectives.png", dpi=DPI)


def keep_projection(folder: Path, projected: dict[str, Any]) -> None:
    from largebatch.benchmarks.collectives.picture import projection_figure
    from largebatch.common.figures import DPI, paper_style

    rows, cluster = projected["rows"], projected["cluster"]
    names = list(dict.fromkeys(name for row in rows for name in row.seconds))
    with (folder / "projection.csv").open("x", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["nodes", "bytes", *(f"{name}_projected_seconds" for name in names)])
        for row in rows:
            cells = [row.seconds.get(name, "") for name in names]
            table.writerow([row.nodes, row.nbytes, *cells])
    lines = [f'export {name}="{value}"' for name, value in projected["settings"].items()]
    head = f"# PROJECTED by a cost model for {projected['nodes']} nodes; check values before use\n"
    (folder / "oneccl.env").write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    nodes = sorted({row.nodes for row in rows})
    sizes = sorted({row.nbytes for row in rows})
    with paper_style():
        figure = projection_figure(cluster, nodes, sizes, names)
        figure.savefig(folder / "projection.png", dpi=DPI)
