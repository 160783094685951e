"""`largebatch bench collectives`: collectives measured and checked, alpha and beta, and advice."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from rich.console import Console

from largebatch.benchmarks.collectives.fit import Fit, Timing, fits
from largebatch.benchmarks.collectives.models import (
    ALL_REDUCE,
    AURORA_ADAPTERS,
    AURORA_NODES,
    AURORA_RANKS_PER_NODE,
    Cluster,
    Link,
    binary,
    oneccl_settings,
    project,
    ranges,
)
from largebatch.benchmarks.collectives.steps import (
    CollectiveJob,
    Measurement,
    measure,
    measure_in_processes,
)
from largebatch.benchmarks.collectives.tables import (
    FACTORS,
    TABLES,
    keep,
    show_fits,
    show_measured,
    show_projection,
)
from largebatch.benchmarks.harness import check, device_named
from largebatch.common.console import output_console
from largebatch.distributed.ranks import Ranks, find_ranks

NODES: Final = (2, 8, 32, 128, 512, 1000, 1024, 2048, 4096, 8192, AURORA_NODES)
PROJECTED_BYTES: Final = (2**10, 2**20, 2**26, 2**30)
XE_LINK_BETA: Final = 1 / 15e9  # seconds a byte between two GPUs of a node, as ALCF measured them


def main(arguments: Sequence[str]) -> int:
    """Measure unless --alpha and --beta are given; returns 1 where a value came out wrong."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        ranks = find_ranks()
        refuse(options, ranks)
        if options.out is not None and ranks.is_first:
            options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    if options.alpha is not None:
        if ranks.is_first:
            projected = projection(options, cluster_of(options, given_link(options)))
            show_projection(projected, options.algorithms, output_console())
            keep(options.out, {"projection": projected})
        return 0
    try:
        measured = measure_all(options, ranks)
    except ValueError as error:  # a device that is not there
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    if ranks.is_first:
        report(measured, options, output_console())
    return 1 if any(row.wrong for row in measured) else 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "largebatch bench collectives",
        description="Time all-reduce, reduce-scatter, all-gather and broadcast, every value "
        "checked; fit alpha and beta; project to many nodes. Inside torchrun or mpiexec it "
        "measures the ranks that are there, else it starts --processes of its own.",
        epilog="exit codes: 0 measured; 1 a value came out wrong; 2 refused",
    )
    add = parser.add_argument
    add("--processes", metavar="LIST", help="rank counts to start here, as 1,2,4 (default: 2)")
    add("--collectives", default=",".join(FACTORS), metavar="LIST", help="default: %(default)s")
    add(
        "--sizes", default="8,64,512,4K,32K,256K,2M,16M", metavar="LIST",
        help="bytes, K, M and G in powers of 1024 (default: %(default)s)",
    )  # fmt: skip
    add("--seconds", type=float, default=10.0, help="for each rank count (default: %(default)g)")
    add("--device", help="cpu, or the accelerator's type (default: it, if any)")
    add("--out", type=Path, metavar="FOLDER", help="keep tables and pictures there")
    of_model = parser.add_argument_group("projection")
    add = of_model.add_argument
    add("--alpha", type=float, help="seconds a message between nodes: project, measure nothing")
    add("--beta", type=float, help="seconds a byte through one network interface, unshared")
    add("--gamma", type=float, default=0.0, help="seconds a byte added up (default: 0)")
    add("--inside-alpha", type=float, help="within a node (default: --alpha)")
    add(
        "--inside-beta", type=float, default=XE_LINK_BETA,
        help="within a node (default: %(default).3g, 15 GB/s as between two GPUs over Xe-Link)",
    )  # fmt: skip
    add("--ranks-per-node", type=int, default=AURORA_RANKS_PER_NODE, help="default: %(default)s")
    add(
        "--adapters", type=int, default=AURORA_ADAPTERS,
        help="network interfaces that a node's ranks share (default: %(default)s)",
    )  # fmt: skip
    add("--nodes", metavar="LIST", help=f"default: {','.join(map(str, NODES))}")
    add("--without", default="", metavar="LIST", help="algorithms to leave out of the advice")
    return parser


def refuse(options: argparse.Namespace, ranks: Ranks) -> None:
    """Turn the lists into values, in place; raises ValueError for one that cannot be."""
    options.collectives = options.collectives.split(",")
    for name in options.collectives:
        check(name in FACTORS, "--collectives", f"of {', '.join(FACTORS)}", name)
    options.sizes = sorted({whole_bytes(word) for word in options.sizes.split(",")})
    check(options.sizes[0] >= 1, "--sizes", "1 byte or more", options.sizes[0])
    options.nodes = counts("--nodes", options.nodes) if options.nodes else list(NODES)
    left_out = [name for name in options.without.split(",") if name]
    for name in left_out:
        check(name in ALL_REDUCE, "--without", f"of {', '.join(ALL_REDUCE)}", name)
    options.algorithms = [name for name in ALL_REDUCE if name not in left_out]
    # Rabenseifner alone would leave the smallest messages without any.
    some = set(options.algorithms) - {"rabenseifner"}
    check(bool(some), "--without", "fewer than all algorithms but rabenseifner", options.without)
    check(0 < options.seconds < 86400, "--seconds", "> 0 and less than a day", options.seconds)
    both = (options.alpha is None) == (options.beta is None)
    check(both, "--alpha and --beta", "given together", f"{options.alpha} and {options.beta}")
    given = options.processes is not None
    alone = ranks.size == 1
    check(alone or not given, "--processes", f"left out in a launch of {ranks.size} ranks",
          options.processes)  # fmt: skip
    options.processes = counts("--processes", options.processes) if given else [2]
    check(
        options.alpha is None or not given, "--processes",
        "left out with --alpha and --beta, which measure nothing", options.processes,
    )  # fmt: skip
    if options.alpha is not None:
        cluster_of(options, given_link(options))
    if options.out is not None:  # looked at by all ranks: one alone would leave the others waiting
        there = [name for name in TABLES if (options.out / name).exists()]
        check(not there, "--out", "a folder that holds no measurement yet", options.out)


def whole_bytes(word: str) -> int:
    """256K as 262144."""
    factors = {"K": 2**10, "M": 2**20, "G": 2**30}
    number, factor = (word[:-1], factors[word[-1]]) if word[-1:] in factors else (word, 1)
    check(number.isdecimal(), "--sizes", "whole numbers, also as 4K, 2M, 1G", repr(word))
    return int(number) * factor


def counts(option: str, words: str) -> list[int]:
    parts = words.split(",")
    right = all(part.isdecimal() and int(part) >= 1 for part in parts)
    check(right, option, "whole numbers from 1, as 1,2,4", words)
    return sorted({int(part) for part in parts})


def cluster_of(options: argparse.Namespace, between: Link) -> Cluster:
    """Nodes as the options have them, with this link between two that nobody shares."""
    alpha = between.alpha if options.inside_alpha is None else options.inside_alpha
    inside = Link(alpha, options.inside_beta, options.gamma)
    return Cluster(options.ranks_per_node, options.adapters, inside, between)


def given_link(options: argparse.Namespace) -> Link:
    return Link(options.alpha, options.beta, options.gamma)


def cluster_measured(
    options: argparse.Namespace, measured: Sequence[Measurement], link: Link
) -> tuple[Cluster, str]:
    """What a fitted link says of many nodes, and how far that can be trusted."""
    if all(row.local_ranks == 1 for row in measured if row.ranks > 1):
        return cluster_of(options, link), "One rank a node was measured: its link is the network's."
    # What a rank got while all others were at it: nothing is left to share.
    cluster = Cluster(options.ranks_per_node, options.ranks_per_node, link, link)
    if all(row.local_ranks == row.ranks for row in measured):
        return cluster, "All ranks measured are of one node: its link stands for the network's."
    return cluster, (
        "Ranks that share nodes were measured: one link stands for the node's inside and the "
        "network. Measure with one rank a node (--ppn 1) to tell them apart."
    )


def measure_all(options: argparse.Namespace, ranks: Ranks) -> list[Measurement]:
    device = device_named(options.device)
    if device.type == "cpu":
        check_memory(options, ranks)
    job = CollectiveJob(options.collectives, options.sizes, options.seconds, device.type)
    if ranks.size > 1:
        return measure(ranks, job)
    if device.type != "cpu":
        most, wanted = torch.accelerator.device_count(), max(options.processes)
        check(wanted <= most, "--processes", f"up to {most}, a device each", wanted)
    return [row for size in options.processes for row in measure_in_processes(size, job)]


def check_memory(options: argparse.Namespace, ranks: Ranks) -> None:
    """Raises ValueError where the buffers of this node's ranks do not fit into its memory."""
    local = ranks.local_size if ranks.size > 1 else max(options.processes)
    # What goes in and what comes out, of all calls; of one, what is wanted and its indices.
    each = 2 * len(options.collectives) * sum(options.sizes) + 6 * max(options.sizes)
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    check(
        local * each < has, "--sizes",
        f"such that {local} ranks fit into the {has / 2**30:.0f} GiB of this node",
        f"{binary(max(options.sizes))}, which needs {local * each / 2**30:.0f} GiB",
    )  # fmt: skip


def report(measured: Sequence[Measurement], options: argparse.Namespace, console: Console) -> None:
    """Tables and sentences to the console, files to --out."""
    show_measured(measured, console)
    found = fitted(measured)
    show_fits(found, console)
    parts: dict[str, Any] = {"measured": list(measured), "fits": found}
    if found and found[0].alpha > 0 and found[0].beta > 0:
        cluster, trust = cluster_measured(options, measured, found[0].link)
        poor = " The fit behind it is poor." if found[0].doubts else ""
        console.print(f"\n{trust}{poor}")
        parts["projection"] = projected = projection(options, cluster)
        show_projection(projected, options.algorithms, console)
    keep(options.out, parts)


def fitted(measured: Sequence[Measurement]) -> list[Fit]:
    """Of the all-reduce, one an algorithm, the best first; none where there is too little."""
    timings = [
        Timing(row.ranks, row.nbytes, median(row.seconds))
        for row in measured
        if row.collective == "all_reduce" and row.seconds
    ]
    try:
        return fits(timings)
    except ValueError:
        return []


def projection(options: argparse.Namespace, cluster: Cluster) -> dict[str, Any]:
    """Seconds by nodes and size, and what the model would have oneCCL do at the most nodes."""
    algorithms, most = options.algorithms, max(options.nodes)
    found = ranges(cluster, most, algorithms)
    return {
        "cluster": cluster,
        "rows": [
            project(cluster, nodes, nbytes, algorithms)
            for nbytes in PROJECTED_BYTES
            for nodes in options.nodes
        ],
        "nodes": most,
        "ranges": found,
        "settings": oneccl_settings(found),
    }
