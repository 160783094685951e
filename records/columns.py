"""The lines of a .jsonl as columns of numbers: a million lines take megabytes, not gigabytes."""

import math
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from largebatch.records.fields import Check, Fields, number_or_none
from largebatch.records.reading import read_lines

MOST_CELLS: Final = 200_000_000  # 1.6 GB

Columns = dict[str, "array[float]"]
Wanted = Callable[[str], Check[Any] | None]


def read_columns(
    path: Path,
    wanted: Wanted,
    problems: list[str],
    lines: Callable[[Fields], bool] = lambda line: True,
) -> Columns:
    """Read fields of a .jsonl, line by line.

    Args:
        wanted: by what check the field of this name is taken; None: not at all.
        lines: which lines are read; the others are passed by.

    Returns:
        By name, a number for each line: NaN where that line has none, or
        one that its check does not take, which is noted.
    """
    columns: Columns = {}
    check_of: dict[str, Check[Any] | None] = {}
    read = (line for _, line in read_lines(path, problems) if lines(line))
    for rows, line in enumerate(read):
        for key in line.values:
            if key not in check_of:
                check_of[key] = wanted(key)
                if check_of[key] is not None:
                    columns[key] = array("d", [math.nan]) * rows
        if rows * len(columns) > MOST_CELLS:
            problems.append(f"{line.where}: over {MOST_CELLS:,} numbers: the rest was not read")
            break
        for key, column in columns.items():
            value = line.values.get(key)
            if value is not None:
                value = line.find(key, check_of[key] or number_or_none)
            column.append(math.nan if value is None else value)
    return columns
