"""A whole study in a tracker: one run beside its runs, in their group, with the report's tables and
pictures.

A logger takes it that has a static method `log_study(folder, group, pictures, tables, **keys)`.
What that raises costs no study.
"""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.utils import get_class

from largebatch.common.text import one_line, say


def log_study(
    node: Mapping[str, Any], folder: Path, pictures: Mapping[str, Path], tables: Mapping[str, Path]
) -> None:
    """Hand a study's report to the logger that its runs have, where it takes one.

    Args:
        node: the logger's configuration.
        folder: the study's; its name is the group of its runs.
        pictures: by name, as PNG.
        tables: by name, as CSV.
    """
    if node.get("_target_") is None:
        return
    keys = {key: value for key, value in node.items() if key not in ("_target_", "group")}
    try:
        take = getattr(get_class(str(node["_target_"])), "log_study", None)
        if take is not None:
            take(folder, node.get("group") or folder.name, pictures, tables, **keys)
    except Exception as error:  # a guest's may be of any class
        say(f"the logger has not taken the study ({type(error).__name__}: {one_line(error)})")


def rows_of(table: Path) -> tuple[list[str], list[list[str]]]:
    """The columns of a table, and its rows."""
    with table.open(newline="", encoding="utf-8") as file:
        columns, *rows = csv.reader(file)
    return columns, rows
