"""A checkpoint as files: it is complete or it is not there, and it says of itself whether it is
whole. Imports no torch.

    checkpoints/samples-N/
        …               what the engine wrote, in a few large files
        state.json      the loop's state, and by what and on how many ranks it was saved
        manifest.json   size and CRC-32 of every other file: written last

All of it is written under `.samples-N`, flushed to disk, and renamed. What another process may find
under `samples-N` is therefore complete; whether the disk has kept it is what `problem` finds out.
"""

import io
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple

CHECKPOINTS: Final = "checkpoints"
STATE: Final = "state.json"
MANIFEST: Final = "manifest.json"

UNIVERSAL: Final = "universal"
"""Folder in a checkpoint of DeepSpeed's, for what a world of any size reads."""

FORMAT: Final = 1
"""Of state.json and manifest.json. Checkpoints from before there was a manifest have none."""

AUTO_FULL_BYTES: Final = 8 << 30
"""Up to so many bytes, a few seconds of reading, `auto` is `full`."""

_BLOCK: Final = 16 << 20
_SMALL: Final = 1 << 20


class File(NamedTuple):
    """What the manifest knows of a file."""

    size: int
    crc32: int


Files = dict[str, File]
"""By path within the checkpoint."""


class Part(NamedTuple):
    """What one rank has written."""

    files: Files
    results: Any = None
    """For rank 0, which describes the whole; can be pickled."""


class CheckedFile(io.FileIO):
    """A file to write, which takes the CRC-32 of what passes, so that nothing is read again."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")
        self.written = File(0, 0)
        self.error: OSError | None = None
        """What the first write that failed said: who writes through C++ may not pass it on."""

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            count = super().write(view)
        except OSError as error:
            self.error = self.error or error
            raise
        size, crc32 = self.written
        self.written = File(size + count, zlib.crc32(view[:count], crc32))
        return count


def write_file(path: Path, data: bytes | memoryview) -> File:
    """Write a file and wait until it would survive a crash of the machine."""
    file = CheckedFile(path)
    with io.BufferedWriter(file, _SMALL) as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return file.written


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `state.json` holds.

    Raises:
        ValueError: a later version has written it.
    """
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    if state.get("format", 0) > FORMAT:
        raise ValueError(
            f"{checkpoint} has format {state['format']}, and this version of largebatch reads up "
            f"to {FORMAT}: install the version that wrote it, or a later one"
        )
    return state


def name_of(samples: int) -> str:
    return f"samples-{samples:015d}"


def samples_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("samples-"))


def draft_of(checkpoint: Path) -> Path:
    """Where a checkpoint is while it is being written."""
    return checkpoint.with_name(f".{checkpoint.name}")


def listed(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first; whether they are whole is another question.

    One listing of one folder, whatever the number of ranks; only rank 0 asks.
    """
    try:
        names = os.listdir(run / CHECKPOINTS)
    except FileNotFoundError:
        return []
    found = [
        run / CHECKPOINTS / name
        for name in names
        if name.startswith("samples-") and name.removeprefix("samples-").isdigit()
    ]
    return sorted(found, key=samples_of)


def publish(draft: Path, final: Path, files: Mapping[str, File], state: Mapping[str, Any]) -> None:
    """Give a draft whose tensors are on disk its state, its manifest and its name.

    Raises:
        OSError: it could not be written, and nothing has its name.
    """
    known = dict(files)
    if state:
        known[STATE] = write_file(draft / STATE, json.dumps(state).encode())
    rows = {name: list(file) for name, file in sorted(known.items())}
    manifest = json.dumps({"format": FORMAT, "files": rows})
    write_file(draft / MANIFEST, manifest.encode())
    for folder in {draft, *((draft / name).parent for name in known)}:
        flush_to_disk(folder)
    if final.exists():  # one that could not be read, or the run would not come by here again
        set_aside(final, "replaced")
    draft.rename(final)
    flush_to_disk(final.parent)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, would survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_aside(checkpoint: Path, why: str) -> Path:
    """Give a checkpoint a name under which nothing looks for it; returns the name."""
    number = 0
    while (aside := checkpoint.with_name(f"{why}-{checkpoint.name}-{number}")).exists():
        number += 1
    return checkpoint.rename(aside)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint, never half of it under its own name."""
    gone = checkpoint.rename(draft_of(checkpoint)) if checkpoint.name[0] != "." else checkpoint
    shutil.rmtree(gone)


def clear_drafts(run: Path) -> None:
    """Delete what jobs that were killed have left half written, or half deleted."""
    for name in os.listdir(run / CHECKPOINTS):
        if name.startswith(".samples-"):
            shutil.rmtree(run / CHECKPOINTS / name)


def retire(run: Path, keep: int, keep_every: int | None) -> None:
    """Delete all but the last `keep` and the milestones, each the first of `keep_every` samples."""
    checkpoints = listed(run)
    milestones = set()
    if keep_every is not None:
        first_of: dict[int, Path] = {}
        for checkpoint in checkpoints:
            first_of.setdefault(samples_of(checkpoint) // keep_every, checkpoint)
        milestones = {path for number, path in first_of.items() if number > 0}
    for old in checkpoints[:-keep]:
        if old not in milestones:
            remove(old)


def manifest_of(checkpoint: Path) -> Files | None:
    """The manifest's rows; None where there is no manifest.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        text = (checkpoint / MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        return {name: File(*row) for name, row in json.loads(text)["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} cannot be read: {error}") from error


def size_of(checkpoint: Path) -> int:
    """Bytes, by the manifest where there is one."""
    files = manifest_of(checkpoint)
    if files is not None:
        return sum(file.size for file in files.values())
    return sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())


def problem(checkpoint: Path, verify: str = "auto") -> str | None:
    """What is wrong with a complete checkpoint; None: nothing that can be seen.

    Args:
        verify: `full` reads every byte, `size` asks for the files' sizes, and in either case the
            small files are read; `auto` is full up to `AUTO_FULL_BYTES`.
    """
    try:
        files = manifest_of(checkpoint)
        if files is None:
            read_state(checkpoint)
            return None  # from before there were manifests
        total = sum(file.size for file in files.values())
        full = verify == "full" or (verify == "auto" and total <= AUTO_FULL_BYTES)
        read = {name: file for name, file in files.items() if full or file.size <= _SMALL}
        what = _of_sizes(checkpoint, files) or _of_contents(checkpoint, read)
        return what or _of_state(checkpoint)
    except (OSError, ValueError) as error:
        return str(error)


def _of_sizes(checkpoint: Path, files: Files) -> str | None:
    for name, file in files.items():
        try:
            size = (checkpoint / name).stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        if size != file.size:
            return f"{name} has {size} bytes of {file.size}"
    return None


def _of_contents(checkpoint: Path, files: Files) -> str | None:
    """Reads several files at a time: the CRC is taken outside of Python's lock."""
    paths = [checkpoint / name for name in files]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for (name, file), crc32 in zip(files.items(), pool.map(crc32_of, paths), strict=True):
            if crc32 != file.crc32:
                return f"{name} is not what was written (CRC {crc32:08x}, not {file.crc32:08x})"
    return None


def _of_state(checkpoint: Path) -> str | None:
    if (checkpoint / STATE).exists():
        read_state(checkpoint)
    return None


def crc32_of(path: Path) -> int:
    """The CRC-32 of a file's bytes."""
    crc32 = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            crc32 = zlib.crc32(block, crc32)
    return crc32


def add_up(parts: Iterable[Mapping[str, File]]) -> Files:
    """What all ranks have written."""
    files: Files = {}
    for part in parts:
        files |= part
    return files
