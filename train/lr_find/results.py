"""What a sweep of the learning rate leaves: a row beside those of other runs, and a picture.

`lr_find.csv` is in the folder that holds the run's folder. Rows are only ever appended to it, so
what was found at another batch size, world or seed stays. Imports matplotlib to draw, and no torch.
"""

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from largebatch.common.errors import ConfigError
from largebatch.common.files import lock_or_warn
from largebatch.records.summary import SummaryRecord
from largebatch.train.lr_find.search import FRACTION, LRFinder

TABLE: Final = "lr_find.csv"
PICTURE: Final = "lr_find.png"

# What a learning rate was found for, then what was found.
OF_THE_RUN: Final = (
    "task", "model", "optimizer", "batch_size", "data_parallel_size", "micro_batch_size", "seed",
)  # fmt: skip
OF_THE_SWEEP: Final = (
    "lr_suggested", "lr_at_minimum", "lr_at_blow_up", "loss_at_minimum", "low", "high", "points",
    "blow_up",
)  # fmt: skip
COLUMNS: Final = (*OF_THE_RUN, "scaling", *OF_THE_SWEEP, "run")


def publish(folder: Path, summary: SummaryRecord, finder: LRFinder) -> None:
    """Draw the sweep, and add what it has found to the table; an interrupted one leaves neither."""
    if summary["status"] == "interrupted":
        return
    from largebatch.common.figures import DPI
    from largebatch.train.lr_find.picture import draw

    draw(finder, summary).savefig(folder / PICTURE, dpi=DPI)
    if "lr_find" in summary:
        append(folder.parent / TABLE, row(folder, summary))


def row(folder: Path, summary: SummaryRecord) -> dict[str, Any]:
    """A run's row, from its summary."""
    of_the_run = {name: summary[name] for name in OF_THE_RUN}
    rule = summary["scaling"]["function"] or summary["scaling"]["rule"]
    of_the_sweep = {name: summary["lr_find"][name] for name in OF_THE_SWEEP}
    return of_the_run | {"scaling": rule} | of_the_sweep | {"run": folder.name}


def check_table(folder: Path) -> None:
    """Refuse a sweep in `folder` beside a table that has no place for it."""
    path = folder.parent / TABLE
    try:
        with path.open(encoding="utf-8") as lines:
            header = lines.readline().rstrip("\r\n")
    except FileNotFoundError:
        return
    if header and header != ",".join(COLUMNS):
        raise ConfigError(
            f"{path} has other columns than this version writes: move it away, or choose another "
            "hydra.run.dir"
        )


def append(path: Path, found: Mapping[str, Any]) -> None:
    """Add one row, whole; the columns' names first where the file is new."""
    with path.open("ab") as table:
        lock_or_warn(table.fileno(), path, wait=True)  # closing the file lets go
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        if os.fstat(table.fileno()).st_size == 0:
            writer.writeheader()
        writer.writerow(found)
        table.write(text.getvalue().encode())


def format_outcome(summary: SummaryRecord, folder: Path) -> str:
    """What a sweep has found, as lines for people."""
    found = summary["lr_find"]
    run, batch = f"{summary['optimizer']} on {summary['model']}", f"{summary['batch_size']:,}"
    return "\n".join(
        [
            f"{run}, batch {batch}, {summary['data_parallel_size']} rank(s)",
            f"  least loss   {found['lr_at_minimum']:<10.4g} loss {found['loss_at_minimum']:.4g}",
            f"  blow-up      {found['lr_at_blow_up']:<10.4g} over {found['blow_up']:g} times that",
            f"  suggestion   {found['lr_suggested']:<10.4g} the blow-up's / {FRACTION:g}",
            f"picture: {folder / PICTURE}, table: {folder.parent / TABLE}",
        ]
    )
