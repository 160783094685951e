"""Ask the ranks of a run, through files in its folder; `distributed/rank_dump.py` answers."""

import time
from collections.abc import Callable
from pathlib import Path

from largebatch.common.files import write_whole
from largebatch.records import find_fields
from largebatch.records.fields import whole
from largebatch.records.names import MOST_RANKS, REQUEST, WATCH


def ask(run: Path, world_size: int | None, wait_seconds: float) -> Path:
    """Ask every rank where it stands; returns the folder of the answers, once all are there or the
    time is over. Where the world's size is not known, the first answer tells.
    """
    folder = _new_folder(run / WATCH)
    request = _request(run, f"answer {folder.name}")
    until = time.monotonic() + wait_seconds
    try:
        while time.monotonic() < until:
            names = [path.name for path in folder.iterdir() if path.name.startswith("rank-")]
            if names and world_size is None:
                answer = find_fields(folder / names[0], [])
                if answer is not None:
                    world_size = answer.find("size", whole(1, MOST_RANKS))
            if len(names) == world_size:
                break
            time.sleep(0.2 if len(names) < 1000 else 2.0)
    finally:
        request.unlink(missing_ok=True)
    return folder


def _new_folder(above: Path) -> Path:
    """A folder that was not there, named by the time."""
    name = time.strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(100):
        folder = above / (f"{name}-{attempt}" if attempt else name)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{above / name}")


def dismiss(run: Path, then: Callable[[], None]) -> None:
    """Tell every rank to leave, and do `then`, which lasts until they have."""
    try:
        _request(run, f"leave {time.time_ns()}")
    except OSError:  # a full disk, say: what follows is done without it
        then()
        return
    try:
        then()
    finally:
        (run / WATCH / REQUEST).unlink(missing_ok=True)


def _request(run: Path, words: str) -> Path:
    """Put it before the ranks; returns the file, to be taken away afterwards."""
    path = run / WATCH / REQUEST
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, words + "\n")
    return path
