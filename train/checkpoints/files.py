"""A checkpoint as files: it is complete or it is not there, and it says of itself whether it is
whole. Imports no torch.

    checkpoints/samples-N/       (or, with checkpoint.folder, below that; checkpoints is a link)
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
import stat
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from operator import index
from pathlib import Path
from typing import Any, Final, NamedTuple

from largebatch.common.errors import ConfigError
from largebatch.common.files import read_json
from largebatch.records.checkpoints import listed, samples_of
from largebatch.records.names import CHECKPOINTS
from largebatch.train.checkpoints.description import DESCRIPTION, problem_of

STATE: Final = "state.json"
MANIFEST: Final = "manifest.json"

UNIVERSAL: Final = "universal"
"""Folder in a checkpoint of DeepSpeed's, for what a world of any size reads."""

FORMAT: Final = 1
"""Of state.json and manifest.json."""

_DATA: Final = (DESCRIPTION, ".distcp", ".pt")
"""Endings of the files that engines read."""

AUTO_FULL_BYTES: Final = 8 << 30
"""Up to this many bytes, a few seconds of reading, `auto` is `full`."""

_BLOCK: Final = 16 << 20
_SMALL: Final = 1 << 20


class File(NamedTuple):
    """What the manifest knows of a file."""

    size: int
    crc32: int


Files = dict[str, File]
"""By path within the checkpoint."""


class RankFiles(NamedTuple):
    """What one rank has written."""

    files: Files
    results: Any = None
    """For rank 0, which describes the whole: values of JSON."""


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
        ValueError: a later version has written it, or it does not say where the run stands.
    """
    path = checkpoint / STATE
    try:
        state: dict[str, Any] = read_json(path)
        written, progress = state.get("format", 0), state["progress"]
        known = [int(written), int(progress["samples"]), int(progress["steps"])]
    except (
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
        RecursionError,
        OverflowError,
    ) as error:
        raise ValueError(f"{path} cannot be read: {error!r}") from error
    if written > FORMAT:
        raise ValueError(
            f"{checkpoint} has format {written}, and this version of largebatch reads up "
            f"to {FORMAT}: install the version that wrote it, or a later one"
        )
    if known != [written, progress["samples"], progress["steps"]]:
        raise ValueError(f"{path} cannot be read: its counts are no whole numbers")
    return state


def name_of(samples: int) -> str:
    return f"samples-{samples:015d}"


def draft_of(checkpoint: Path) -> Path:
    """Name a checkpoint that is being written or deleted, as nothing in the folder is named."""
    return _free(checkpoint, f".{checkpoint.name}")


def _free(checkpoint: Path, name: str) -> Path:
    """The first of `name`, `name`-1, `name`-2, … beside a checkpoint that nothing has."""
    number, found = 0, checkpoint.with_name(name)
    while os.path.lexists(found):
        number += 1
        found = checkpoint.with_name(f"{name}-{number}")
    return found


def elsewhere(run: Path, folder: str) -> Path:
    """Where below `folder` the checkpoints of a run are: under the run's own path, so that no two
    runs share any.
    """
    return Path(folder, *Path(os.path.abspath(run)).parts[1:])


def check_elsewhere(run: Path, folder: str) -> None:
    """Refuse a folder that the run's checkpoints could not go to."""
    link, meant = run / CHECKPOINTS, elsewhere(run, folder)
    if os.path.lexists(link):
        if os.path.realpath(link) != os.path.realpath(meant):
            raise ConfigError(
                f"checkpoint.folder={folder} is not where this run's checkpoints are "
                f"({os.path.realpath(link)}): go on there, without it"
            )
    elif meant.is_dir() and os.listdir(meant):
        raise ConfigError(
            f"{meant} holds checkpoints of a run whose record is gone: delete or move them, or "
            "choose another checkpoint.folder"
        )


def make_folder(run: Path, folder: str | None) -> None:
    """Make the folder of a run's checkpoints, here or elsewhere, where it has none."""
    if folder is not None and not os.path.lexists(run / CHECKPOINTS):
        meant = elsewhere(run, folder)
        meant.mkdir(parents=True, exist_ok=True)
        (run / CHECKPOINTS).symlink_to(meant)
    (run / CHECKPOINTS).mkdir(exist_ok=True)


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
    return checkpoint.rename(_free(checkpoint, f"{why}-{checkpoint.name}-0"))


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint, never half of it under its own name. Of a link to elsewhere, the link.

    Raises:
        OSError: it, or a part of it, is still there.
    """
    is_draft = checkpoint.name.startswith(".")
    gone = checkpoint if is_draft else checkpoint.rename(draft_of(checkpoint))
    if gone.is_symlink() or not gone.is_dir():
        gone.unlink()
    else:
        shutil.rmtree(gone)


def clear_drafts(run: Path) -> dict[str, str]:
    """Delete what jobs that were killed have left half written, or half deleted.

    Returns:
        What could not be deleted, by name, and why: it stays, and is in nobody's way.
    """
    names = os.listdir(run / CHECKPOINTS)
    return _removed(run / CHECKPOINTS / name for name in names if name.startswith(".samples-"))


def _removed(checkpoints: Iterable[Path]) -> dict[str, str]:
    stuck = {}
    for checkpoint in checkpoints:
        try:
            remove(checkpoint)
        except OSError as error:
            stuck[checkpoint.name.lstrip(".")] = str(error)
    return stuck


def retire(run: Path, keep: int, keep_every: int | None) -> dict[str, str]:
    """Delete all but the last `keep` and the milestones, each the first of `keep_every` samples.

    Returns:
        What could not be deleted, by name, and why.
    """
    checkpoints = listed(run)
    milestones = set()
    if keep_every is not None:
        first_of: dict[int, Path] = {}
        for checkpoint in checkpoints:
            first_of.setdefault(samples_of(checkpoint) // keep_every, checkpoint)
        milestones = {path for number, path in first_of.items() if number > 0}
    return _removed(old for old in checkpoints[:-keep] if old not in milestones)


def manifest_of(checkpoint: Path) -> Files:
    """The manifest's rows.

    Raises:
        ValueError: there are none, or they cannot be read.
    """
    try:
        rows = read_json(checkpoint / MANIFEST)["files"]
        files = {str(name): File(*map(index, row)) for name, row in rows.items()}
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} cannot be read: {error}") from error
    if not files:
        raise ValueError(f"{MANIFEST} lists no files")
    return files


def size_of(checkpoint: Path) -> int:
    """Bytes, by the manifest."""
    return sum(file.size for file in manifest_of(checkpoint).values())


def problem(checkpoint: Path, verify: str = "auto") -> str | None:
    """What is wrong with a complete checkpoint; None: nothing that can be seen.

    Args:
        verify: `full` reads every byte, `size` asks for the files' sizes, and in either case the
            small files are read; `auto` is full up to `AUTO_FULL_BYTES`, and above reads what
            describes the tensors besides.
    """
    try:
        files = manifest_of(checkpoint)
        total = sum(file.size for file in files.values())
        full = verify == "full" or (verify == "auto" and total <= AUTO_FULL_BYTES)
        whole = {DESCRIPTION} if verify == "auto" else set()  # as it is read in any case
        read = {
            name: file
            for name, file in files.items()
            if full or file.size <= _SMALL or name in whole
        }
        what = _of_listing(checkpoint, files) or _of_sizes(checkpoint, files)
        what = what or _of_contents(checkpoint, read)
        if what is None and checkpoint.name != UNIVERSAL:
            saved = read_state(checkpoint).get("saved_by")
            by = saved.get("kind", "dcp") if isinstance(saved, dict) else "dcp"
            what = _of_description(checkpoint, files, read) if by == "dcp" else None
        return what
    except (OSError, ValueError) as error:
        return str(error)


def _of_listing(checkpoint: Path, files: Files) -> str | None:
    """What is read must be what is compared."""
    if checkpoint.name != UNIVERSAL and STATE not in files:
        return f"{MANIFEST} does not list {STATE}"
    for path in sorted(checkpoint.rglob("*")):
        name = str(path.relative_to(checkpoint))
        of_another = checkpoint.name != UNIVERSAL and name.startswith(f"{UNIVERSAL}/")
        if name.endswith(_DATA) and name not in files and not of_another:
            return f"{MANIFEST} does not list {name}"
    return None


def _of_sizes(checkpoint: Path, files: Files) -> str | None:
    for name, file in files.items():
        try:
            about = (checkpoint / name).stat()
        except FileNotFoundError:
            return f"{name} is missing"
        if not stat.S_ISREG(about.st_mode):  # a pipe would be waited for
            return f"{name} is no file"
        if about.st_size != file.size:
            return f"{name} has {about.st_size} bytes of {file.size}"
    return None


def _of_contents(checkpoint: Path, files: Files) -> str | None:
    """Reads several files at a time: the CRC is taken outside of Python's lock."""
    paths = [checkpoint / name for name in files]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for (name, file), crc32 in zip(files.items(), pool.map(crc32_of, paths), strict=True):
            if crc32 != file.crc32:
                return f"{name} is not what was written (CRC {crc32:08x}, not {file.crc32:08x})"
    return None


def _of_description(checkpoint: Path, files: Files, read: Files) -> str | None:
    if DESCRIPTION not in files:
        return f"{MANIFEST} does not list {DESCRIPTION}"
    if DESCRIPTION not in read:
        return None
    return problem_of((checkpoint / DESCRIPTION).read_bytes(), files)


def crc32_of(path: Path) -> int:
    """The CRC-32 of a file's bytes."""
    crc32 = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            crc32 = zlib.crc32(block, crc32)
    return crc32
