"""A study read back from the tables that its report has written, where its runs are not kept.

`basin.csv` and `loss_basin.csv` have a row a run of the search, and say which of them a point is
made of; all else follows from these as it does in `largebatch report`.
"""

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from largebatch.records.target import Target
from largebatch.study.curves import Section, StudyCurve
from largebatch.study.decisions import Decision, Decisions
from largebatch.study.final_loss.section import LossSection, loss_sections
from largebatch.study.floor import ORACLE, read_floor
from largebatch.study.reading import RunSummary
from largebatch.study.section_study import SectionStudy, section_study

Row = Mapping[str, str]

STATUSES = {"reached": "reached", "diverged": "diverged"}
TUNED = ("momentum", "damping", "weight_decay")
"""Columns of what is tuned beside the rate, called as in a configuration below `optim`."""


def read_section(folder: Path) -> SectionStudy:
    """The section that `basin.csv` is of. What was aimed at no table says."""
    rows = rows_of(folder / "basin.csv")
    decisions = decided(rows)
    by_curve: dict[str, list[RunSummary]] = defaultdict(list)
    for row in rows:
        by_curve[row["optimizer"]].append(aimed(row))
    curves = [
        StudyCurve(name, runs[0].optimizer, decisions.tuned[runs[0].optimizer], runs)
        for name, runs in by_curve.items()
    ]
    section = Section(folder.name, Target("loss", 0.0), None, curves)
    floor = read_floor(folder / ORACLE) if (folder / ORACLE).exists() else None
    return replace(section_study(section, [(curve, decisions) for curve in curves]), floor=floor)


def read_losses(folder: Path) -> LossSection:
    """The final losses that `loss_basin.csv` is of."""
    rows = rows_of(folder / "loss_basin.csv")
    (section,) = loss_sections([(folder.name, [spent(row) for row in rows], decided(rows))])
    return section


def rows_of(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def decided(rows: Sequence[Row]) -> Decisions:
    """What the study decided: the settings that points are made of, and the seeds that made them.

    Whether a rate is at the edge is not told: no picture of these shows it.
    """
    searched = [name for name in rows[0] if name in TUNED]
    tuned: dict[str, tuple[str, ...]] = {}
    for optimizer in dict.fromkeys(map(optimizer_of, rows)):
        own = [row for row in rows if optimizer_of(row) == optimizer]
        tuned[optimizer] = tuple(name for name in searched if any(row[name] for row in own))
    chosen = [row for row in rows if row["chosen"] == "true"]
    points = [
        Decision(
            optimizer_of(row),
            int(row["batch_size"]),
            {name: float(row[name]) for name in ("lr", *tuned[optimizer_of(row)])}
            if row["chosen"] == "true"
            else None,
            dropped=(), open_below=False, open_above=False, trials=0,
            budget=int(row["budget"]) if "budget" in row else None,
        )
        for row in [*rows, *chosen]  # of the same point the last one counts
    ]  # fmt: skip
    seeds = sorted({int(row["seed"]) for row in chosen})
    return Decisions((), tuple(seeds), tuned, {point.place: point for point in points})


def optimizer_of(row: Row) -> str:
    """Without what tells curves of one optimizer apart."""
    return row["optimizer"].split()[0]


def aimed(row: Row) -> RunSummary:
    """A run to a target."""
    steps = int(row["num_steps"])
    return summary(
        row, STATUSES.get(row["outcome"], "exhausted"), steps,
        steps_to_target=steps if row["steps"] else None,
        steps_interpolated=float(row["steps"]) if row["steps"] else None,
        give_up_samples=steps * int(row["batch_size"]) if row["outcome"] == "cut" else None,
        target=Target("loss", 0.0),
    )  # fmt: skip


def spent(row: Row) -> RunSummary:
    """A run that has spent its budget."""
    budget = int(row["budget"])
    return summary(
        row, row["status"], -(-budget // int(row["batch_size"])),
        eval_loss=float(row["loss"]) if row["loss"] else None, budget_samples=budget,
    )  # fmt: skip


def summary(row: Row, status: str, steps: int, **known: Any) -> RunSummary:
    size = int(row["batch_size"])
    values: dict[str, Any] = dict.fromkeys(
        ("target", "steps_to_target", "samples_to_target", "steps_interpolated", "eval_loss",
         "seconds", "give_up_samples", "budget_samples", "data_hash", "base_batch")
    )  # fmt: skip
    values |= {
        "folder": Path(row["run"]),
        "status": status,
        "task": "",
        "optimizer": optimizer_of(row),
        "batch_size": size,
        "seed": int(row["seed"]),
        "lr": float(row["lr"]),
        "rule": "none",
        "steps": steps,
        "samples": steps * size,
        "metrics": {},
        "provenance": {},
        "config": {"optim": {name: float(row[name]) for name in TUNED if row.get(name)}},
    }
    return RunSummary(**values | known)
