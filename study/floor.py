"""The steps of a method that no optimizer of a study is: a line below the curves, from a file.

`largebatch bench gauss_newton study=… --out FOLDER` writes `oracle.csv`, a row a run of its search.
Where one lies in a study's folder, its line is drawn with the study's curves; it takes part in
nothing else.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from largebatch.records import printable
from largebatch.records.target import Target
from largebatch.study.statistics.intervals import PointEstimate, intervals
from largebatch.study.statistics.table import SeedSteps

ORACLE: Final = "oracle.csv"
COLUMNS: Final = (
    "method,batch_size,lr,damping,seed,steps,chosen,task,target,most_steps,loss,identity"
)
_MOST_BYTES: Final = 10_000_000


@dataclass(frozen=True)
class Floor:
    """A line of steps against batch size.

    Attributes:
        name: of the method.
        task, target: of its runs; the target in words.
        points: where all its report seeds reached the target, with their intervals.
    """

    name: str
    task: str
    target: str
    points: tuple[PointEstimate, ...]


def find_floor(folder: Path, task: str, target: Target, problems: list[str]) -> Floor | None:
    """The floor of a study's folder; None where there is none, or one of another task or target,
    or a damaged one: these are noted.
    """
    path = folder / ORACLE
    if not path.is_file():
        return None
    try:
        floor = read_floor(path)
    except (OSError, ValueError) as error:
        problems.append(f"{printable(error)}: its line is left out")
        return None
    if (floor.task, floor.target) != (task, str(target)):
        problems.append(
            f"{ORACLE} is of {printable(floor.task)} to {printable(floor.target)} and the study of "
            f"{printable(task)} to {target}: its line is left out"
        )
        return None
    return floor


def read_floor(path: Path) -> Floor:
    """What a file of `bench gauss_newton` says.

    Raises:
        ValueError: it is none.
    """
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path} is larger than {_MOST_BYTES:,} bytes")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            chosen = [row for row in csv.DictReader(file) if row["chosen"] == "true"]
        rows = [_steps_of(row) for row in chosen]
        (name,) = {row["method"] for row in chosen}
        (task,) = {row["task"] for row in chosen}
        (target,) = {row["target"] for row in chosen}
        points = intervals(rows)[name].points
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(
            f"{path} is not what `largebatch bench gauss_newton` writes: {error!r:.200}"
        ) from None
    return Floor(name, task, target, tuple(one for one in points if one.steps is not None))


def _steps_of(row: Mapping[str, str]) -> SeedSteps:
    steps = float(row["steps"]) if row["steps"] else None
    size, seed = int(row["batch_size"]), int(row["seed"])
    return SeedSteps(row["method"], size, seed, steps, float(row["lr"]))
