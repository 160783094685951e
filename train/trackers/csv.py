"""A table, for spreadsheets."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from largebatch.records.names import METRICS


class Csv:
    """`metrics.csv` in the run's folder, a row a line and a column a field, written when the run
    ends, from all lines of metrics.jsonl.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        del config
        self._folder = folder

    def log(self, line: Mapping[str, Any]) -> None:
        """It is in metrics.jsonl."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        del summary
        text = (self._folder / METRICS).read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        names = dict.fromkeys(key for line in lines for key in line)
        with (self._folder / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*names])
            writer.writeheader()
            writer.writerows(lines)
