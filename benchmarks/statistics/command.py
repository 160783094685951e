"""`largebatch bench statistics`: how often a study's intervals cover, and how wide they are.

Studies are made up by the thousand on a surrogate of `task=bytes`, with a smooth basin of learning
rates and with a cliff beyond the best one, and go through a study's protocol: two seeds choose the
rates, others report at these. The truth is the mean of log steps at the rates chosen, and its fit.
With --recorded, report seeds are drawn from steps that were recorded instead. Then the fit of what
others have published.
"""

import argparse
import csv
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.random import Generator
from rich.console import Console
from rich.table import Table

from largebatch.benchmarks.harness import check, make_table, say
from largebatch.benchmarks.statistics.coverage import (
    Coverage,
    Measured,
    curve_coverage,
    pair_coverage,
    rate_coverage,
    resampled,
)
from largebatch.benchmarks.statistics.surrogate import (
    ADAMW_LIKE,
    BATCH_SIZES,
    LAMB_LIKE,
    RATE_EXPONENT,
    Landscape,
    draw_luck,
    simulate,
)
from largebatch.common.console import output_console
from largebatch.study.fit import FEWEST_POINTS, fit_curve
from largebatch.study.statistics.published import (
    MLPERF,
    ZHANG_BATCH_SIZES,
    ZHANG_CBS20,
    ZHANG_OPTIMAL,
    ZHANG_STEPS,
)
from largebatch.study.statistics.solver import Array
from largebatch.study.statistics.table import table_of

SEEDS: Final = (3, 5, 8)
FEWEST: Final = FEWEST_POINTS + 1  # batch sizes, for n free
CELLS: Final[tuple[tuple[Landscape, int, float], ...]] = (
    *((ADAMW_LIKE, count, 1.0) for count in SEEDS),
    (ADAMW_LIKE, 5, 1.4),
    *((LAMB_LIKE, count, 1.0) for count in SEEDS),
)
"""Landscapes, report seeds, and the shape n of the true curve."""
TIMES: Final = "\N{MULTIPLICATION SIGN}"
FACTORS: Final = {"S_min", "E_min", "B_crit", "n", "cbs20", "b_80", "b_50"}
TABLES: Final = {
    "one optimizer": {"B_crit": "B_crit", "point": "point", "band": "band of all", "n": "n"},
    "one optimizer, further": {
        "S_min": "S_min",
        "E_min": "E_min",
        "b_80": "B_80",
        "b_50": "B_50",
        "rate": "rate",
    },
}
"""The heads of what a row has, by key."""


def main(arguments: Sequence[str]) -> int:
    """`largebatch bench statistics`; 0, or 2 where an option or a file cannot be."""
    parser = argparse.ArgumentParser(prog="largebatch bench statistics", description=__doc__)
    parser.add_argument("--studies", type=int, default=500, help="a row (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="of the simulation (default: 0)")
    parser.add_argument(
        "--recorded", type=Path, metavar="FILE",
        help="a CSV of recorded runs, with the columns optimizer, batch_size, seed and steps",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    try:
        check(options.studies >= 1, "--studies", "1 or more", options.studies)
        check(options.seed >= 0, "--seed", "0 or more", options.seed)
        folder = Path() if options.json is None else options.json.parent
        check(folder.is_dir(), "--json", "a file in a folder that exists", options.json)
        generator = np.random.default_rng(options.seed)
        found = (
            measure(options.studies, generator)
            if options.recorded is None
            else measure_recorded(options.recorded, options.studies, generator)
        )
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    record = found | {
        "benchmark": "statistics",
        "studies": options.studies,
        "seed": options.seed,
        "numpy": np.__version__,
        "published": published(),
        "seconds": time.perf_counter() - began,
    }
    show(record, output_console())
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(num_studies: int, generator: Generator) -> dict[str, Any]:
    """The coverage of every cell, and that of LAMB-like against AdamW-like for each S."""
    measured = {}
    lucks: dict[tuple[int, float], Array] = {}
    rows = []
    for landscape, num_seeds, shape in CELLS:
        # The same seeds for all optimizers.
        luck = draw_luck(num_studies, num_seeds, generator, lucks.get((num_seeds, shape)))
        lucks[num_seeds, shape] = luck
        studies = simulate(landscape, luck, generator, shape)
        cell = Measured.of(BATCH_SIZES, studies.log_steps, studies.truth)
        measured[landscape.name, num_seeds, shape] = cell
        covers = curve_coverage(cell)
        covers["rate"] = rate_coverage(studies.log_rates[:500], RATE_EXPONENT)  # one at a time
        name = landscape.name + (f", n = {shape:g}" if shape != 1 else "")
        rows.append(_row(name, num_seeds, covers) | {"trials": studies.trials})
    pairs = []
    for num_seeds in SEEDS:
        one, other = (measured[each.name, num_seeds, 1.0] for each in (ADAMW_LIKE, LAMB_LIKE))
        pairs.append({"seeds": num_seeds} | asdict(pair_coverage(one, other)))
    return {"curves": rows, "pairs": pairs}


def read_recorded(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV, as `table_of` takes them; an empty cell is a miss."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        names = ("optimizer", "batch_size", "seed", "steps")
        missing = [name for name in names if name not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(f"{path} lacks the column {missing[0]}: it needs {', '.join(names)}")
        return [
            {
                "optimizer": row["optimizer"],
                "batch_size": row["batch_size"],
                "seed": row["seed"],
                "steps": float(row["steps"]) if row["steps"] else None,
            }
            for row in reader
        ]


def measure_recorded(path: Path, num_studies: int, generator: Generator) -> dict[str, Any]:
    """The coverage for each optimizer and S, of its batch sizes where every seed reached.

    Raises:
        OSError: the CSV cannot be read.
        ValueError: it lacks a column, or an optimizer has too few such batch sizes.
    """
    table = table_of(read_recorded(path))
    found = []
    for name, points in zip(table.optimizers, table.points, strict=True):
        full = ~np.isnan(points).any(axis=1)
        if full.sum() < FEWEST:
            raise ValueError(
                f"{path}: all seeds of {name} reached at {full.sum()} batch sizes, of {FEWEST} "
                "or more that are needed"
            )
        for num_seeds in SEEDS:
            population = table.batch_sizes[full], points[full]
            studies = resampled(*population, num_seeds, num_studies, generator)
            found.append(_row(name, num_seeds, curve_coverage(studies)))
    return {"curves": found, "pairs": []}


def published() -> list[dict[str, Any]]:
    """Our fits of others' tables."""
    found = []
    for name, steps in MLPERF.items():
        for shape in (1.0, None):
            fit = fit_curve(list(steps), list(steps.values()), shape=shape)
            assert fit is not None
            found.append({"table": name, "b_crit": fit.b_crit, "n": fit.shape, "rms": fit.rms})
    for name, counts in ZHANG_STEPS.items():
        fit = fit_curve(ZHANG_BATCH_SIZES, counts)
        assert fit is not None
        cbs20 = 0.2 * fit.b_crit + 1.2 * ZHANG_OPTIMAL
        found.append(
            {"table": f"Zhang et al., {name}", "b_crit": fit.b_crit, "n": 1.0, "rms": fit.rms}
            | {"cbs20": cbs20, "published_cbs20": ZHANG_CBS20[name]}
        )
    return found


def show(record: Mapping[str, Any], console: Console) -> None:
    say(
        console,
        f"{record['studies']} studies a row, seed {record['seed']}, numpy {record['numpy']}: "
        f"{record['seconds']:.1f} s",
        "covers: the share of 95 % intervals that hold the truth, and their median half-width",
        "band of all: the share of studies whose bands hold at every batch size at once",
    )
    trials = [f"{row['trials']:.1f}" for row in record["curves"] if "trials" in row]
    if trials:
        say(console, f"trials a point, row by row: {', '.join(trials)}")
    for title, keys in TABLES.items():
        console.print(_curves_table(title, keys, record["curves"]))
    if record["pairs"]:
        console.print(_pairs_table(record["pairs"]))
    fits = make_table("published tables", "", ("B_crit", "n", "rms", "CBS20", "as published"))
    for row in record["published"]:
        cbs20 = [f"{row[key]:,.0f}" if key in row else "" for key in ("cbs20", "published_cbs20")]
        fits.add_row(
            row["table"], f"{row['b_crit']:,.0f}", f"{row['n']:.2f}", f"{row['rms']:.3f}", *cbs20
        )
    console.print(fits)


def _curves_table(title: str, heads: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> Table:
    keys = [key for key in heads if key in rows[0]["covers"]]
    shown = make_table(title, "", [heads[key] for key in keys])
    for row in rows:
        cells = [_cell(key, row["covers"][key]) for key in keys]
        shown.add_row(f"{row['name']}, S = {row['seeds']}", *cells)
    return shown


def _pairs_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    effects = [f"finds {factor - 1:.0%}" for factor in rows[0]["found"]]
    heads = ("ratio", "band of all", "B_crit", "false alarms", *effects)
    shown = make_table("LAMB-like over AdamW-like, seed by seed", "", heads)
    for row in rows:
        cells = [
            _cell("ratio", row["ratio"]),
            _cell("band", row["band"]),
            _cell("B_crit", row["b_crit"]),
        ]
        found = [f"{share:.1%}" for share in row["found"].values()]
        shown.add_row(f"S = {row['seeds']}", *cells, f"{row['false_alarms']:.1%}", *found)
    return shown


def _row(name: str, num_seeds: int, covers: Mapping[str, Coverage]) -> dict[str, Any]:
    found = {key: asdict(each) for key, each in covers.items()}
    return {"name": name, "seeds": num_seeds, "covers": found}


def _cell(key: str, coverage: Mapping[str, float]) -> str:
    """The share that covers, and the half-width: as a factor, in per cent, or as it is."""
    width = coverage["half_width"]
    if key in FACTORS:
        shown = f"{TIMES}/÷{np.exp(width):.2f}"
    else:
        shown = f"±{width:.2f}" if key == "rate" else f"±{np.expm1(width):.1%}"
    return f"{coverage['share']:.1%} {shown}"
