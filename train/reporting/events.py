"""`events.jsonl` in a run's folder: what was done to the run and why, a line each.

It is a history: appended to, never cut, not even where a resumed run makes steps again.
"""

import json
import time
from pathlib import Path
from typing import Any

from largebatch.common.text import say
from largebatch.records.names import EVENTS
from largebatch.records.record import finite


class Events:
    """Appends to the file, which is made with the first event. One process writes: rank 0."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / EVENTS

    def write(self, kind: str, *, step: int, samples: int, reason: str, **more: Any) -> None:
        """One event, out of this process's hands when this returns; one that the disk does not take
        is reported on stderr.

        Args:
            kind: "skip", "rollback", "stop", …
            more: numbers (null where they are not finite) and lists of names.
        """
        event = {"time": time.time(), "step": step, "samples": samples, "kind": kind}
        event |= {"reason": reason} | more
        text = json.dumps({name: finite(value) for name, value in event.items()}) + "\n"
        try:
            with self._path.open("ab+", buffering=0) as file:
                if file.tell() > 0:  # a writer killed half-way leaves half a line
                    file.seek(-1, 2)
                    text = text if file.read(1) == b"\n" else "\n" + text
                data = text.encode()
                while data:  # a disk may take a part before it takes nothing
                    data = data[file.write(data) :]
        except OSError as error:
            say(f"{self._path} could not be written ({error}): {text.strip()}")
