"""What a study's runs took: training, evaluation, records, and how long workers had none of them.

Kept in the folder's `study.json`, added up over the times that the study was begun.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from largebatch.common.files import write_whole
from largebatch.common.text import duration
from largebatch.records import RecordError, read_fields
from largebatch.records.fields import number, optional, whole
from largebatch.records.names import SUMMARY
from largebatch.study.decisions import STUDY

_COST: Final = "cost"


@dataclass
class StudyCost:
    """Seconds of `runs` runs, together: all of them, and those for evaluations and record lines.

    `worker_seconds` are those that workers were there for; None: not known.
    """

    runs: int = 0
    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    record_seconds: float = 0.0
    worker_seconds: float | None = None

    def take(self, run: Path) -> None:
        """Add a run that has ended."""
        summary = read_fields(run / SUMMARY)
        self.runs += 1
        self.seconds += summary.find("seconds", number) or 0.0
        self.evaluation_seconds += summary.find("evaluation_seconds", number) or 0.0
        self.record_seconds += summary.find("record_seconds", number) or 0.0

    def __add__(self, other: "StudyCost") -> "StudyCost":
        workers = self.worker_seconds, other.worker_seconds
        return StudyCost(
            self.runs + other.runs,
            self.seconds + other.seconds,
            self.evaluation_seconds + other.evaluation_seconds,
            self.record_seconds + other.record_seconds,
            None if workers[0] is None or workers[1] is None else workers[0] + workers[1],
        )

    def in_words(self) -> str:
        """The shares of it all, a line; empty where no time is known.

        >>> StudyCost(40, 80.0, 20.0, 4.0, 100.0).in_words()
        '40 runs in 100 seconds of workers: 56% training, 20% evaluation, 4% records, 20% waiting'
        """
        whole = self.seconds if self.worker_seconds is None else self.worker_seconds
        if whole <= 0:
            return ""
        training = self.seconds - self.evaluation_seconds - self.record_seconds
        parts = {
            "training": training, "evaluation": self.evaluation_seconds,
            "records": self.record_seconds,
        }  # fmt: skip
        if self.worker_seconds is not None:
            parts["waiting"] = max(0.0, self.worker_seconds - self.seconds)
        shares = ", ".join(f"{part / whole:.0%} {name}" for name, part in parts.items())
        return f"{self.runs} runs in {duration(whole)} of workers: {shares}"


def read_cost(folder: Path) -> StudyCost | None:
    """What the study of a folder has cost; None where it does not say, or is damaged."""
    try:
        record = read_fields(folder / STUDY)
        if _COST not in record:
            return None
        cost = record.inside(_COST)
        return StudyCost(
            cost.take("runs", whole()),
            cost.take("seconds", number),
            cost.take("evaluation_seconds", number),
            cost.take("record_seconds", number),
            cost.take("worker_seconds", optional(number)),
        )
    except (FileNotFoundError, RecordError):
        return None


def add_cost(folder: Path, cost: StudyCost) -> None:
    """Add what has been spent to what the folder's `study.json` says."""
    path = folder / STUDY
    before = read_cost(folder)
    total = cost if before is None else before + cost
    known = read_fields(path).values
    write_whole(path, json.dumps({**known, _COST: asdict(total)}, indent=1) + "\n")
