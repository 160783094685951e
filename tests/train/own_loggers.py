"""A logger of the user's own, which fails where it is told to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Failing:
    def __init__(self, folder: Path, config: Mapping[str, Any], group: str | None, at: str) -> None:
        del folder, config, group
        self.at = at
        self.fail("start")

    def fail(self, place: str) -> None:
        if self.at == place:
            raise ConnectionError(f"no server at the {place}")

    def log(self, line: Mapping[str, Any]) -> None:
        if line["step"] == 2:
            self.fail("second line")

    def finish(self, summary: Mapping[str, Any]) -> None:
        del summary
        self.fail("end")
