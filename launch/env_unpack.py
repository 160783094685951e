"""Unpacking an archive as it arrives, on one node, every file checked while it is written."""

import gzip
import hashlib
import os
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import Any, Final

from largebatch.launch.env import EnvError
from largebatch.launch.env_archive import expanding
from largebatch.launch.env_manifest import NAME, Entry, Manifest, same_sizes

_AT_ONCE: Final = 1 << 20


class Damaged(Exception):
    """What arrived is not what was packed."""


def manifest_of(archive: Path, zstd: bool) -> Manifest:
    """The manifest of an archive: its first member; no more than that is read.

    Raises:
        EnvError: there is no such file, or it is no archive of `env pack`.
    """
    try:
        with (
            archive.open("rb") as source,
            expanding(source, zstd, whole=False) as file,
            tarfile.open(fileobj=file, mode="r|") as tar,
        ):
            first = tar.next()
            if first is None or first.name != NAME:
                raise EnvError(f"{archive} is not an archive of `largebatch env pack`")
            return Manifest.from_bytes(_contents(tar, first), archive)
    except EnvError:
        raise
    except FileNotFoundError as error:
        raise EnvError(f"{archive} is not there: largebatch env pack makes one") from error
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise EnvError(f"{archive} cannot be read as an archive ({error})") from error


def is_there(target: Path, total: str) -> bool:
    """Whether `target` already holds the environment of this hash, all files with their sizes.

    Raises:
        FileExistsError: something else is there.
    """
    if not target.exists():
        return False
    try:
        manifest = Manifest.from_bytes((target / NAME).read_bytes(), target)
    except (OSError, EnvError):
        manifest = None
    if manifest is None or manifest.total != total or not same_sizes(target, manifest.entries):
        raise FileExistsError(
            f"{target} is there and is not this environment: remove it, or name another with --to"
        )
    return True


def unpack(source: Any, zstd: bool, target: Path) -> None:
    """Unpack to a temporary name beside `target`, and rename when every file is right.

    Args:
        source: an open file or the reading end of a pipe.

    Raises:
        Damaged: a file that is missing, cut off, changed or not in the manifest.
        OSError: among them a full disk. Nothing is left behind.
    """
    own = target.with_name(f".{target.name}.{os.getpid()}")
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_left_over(target)
    own.mkdir()
    try:
        try:
            with (
                expanding(source, zstd) as file,
                tarfile.open(fileobj=file, mode="r|", bufsize=_AT_ONCE) as tar,
            ):
                _all(tar, own)
                # To the end of the stream, whose own checksum is there.
                while file.read(_AT_ONCE):
                    pass
        except (
            tarfile.TarError,
            EOFError,
            ValueError,
            zlib.error,
            gzip.BadGzipFile,
        ) as error:
            raise Damaged(f"the archive is damaged: {error}") from error
        own.rename(target)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _clear_left_over(target: Path) -> None:
    """Remove what unpackings into `target` have left whose process was killed."""
    for left in target.parent.glob(f".{target.name}.*"):
        process = left.name.rpartition(".")[2]
        if process.isdigit() and not Path("/proc", process).exists():
            shutil.rmtree(left, ignore_errors=True)


def _all(tar: tarfile.TarFile, folder: Path) -> None:
    first = tar.next()
    if first is None or first.name != NAME:
        raise Damaged("the archive does not begin with its manifest")
    text = _contents(tar, first)
    try:
        manifest = Manifest.from_bytes(text, "the archive")
    except EnvError as error:
        raise Damaged(str(error)) from error
    expected = {entry.path: entry for entry in manifest.entries}
    while (member := tar.next()) is not None:
        entry = expected.pop(member.name, None)
        if entry is None:
            raise Damaged(f"{member.name} is not in the manifest")
        _one(tar, member, entry, folder)
    if expected:
        raise Damaged(f"{len(expected):,} files are missing, {next(iter(expected))} among them")
    (folder / NAME).write_bytes(text)


def _one(tar: tarfile.TarFile, member: tarfile.TarInfo, entry: Entry, folder: Path) -> None:
    path = folder / entry.path
    if ".." in Path(entry.path).parts or Path(entry.path).is_absolute():
        raise Damaged(f"{entry.path} would be written outside of the environment")
    path.parent.mkdir(parents=True, exist_ok=True)
    if entry.kind == "folder":
        path.mkdir(exist_ok=True)
    elif entry.kind == "link":
        if member.linkname != entry.target:
            raise Damaged(f"the link {entry.path} points to {member.linkname}")
        path.symlink_to(entry.target)
    else:
        digest = hashlib.sha256()
        contents = tar.extractfile(member)
        if contents is None:
            raise Damaged(f"{entry.path} is no file")
        with path.open("wb") as file:
            while part := contents.read(_AT_ONCE):
                digest.update(part)
                file.write(part)
        if digest.hexdigest() != entry.sha256:
            raise Damaged(f"{entry.path} has arrived with another hash than it was packed with")
        path.chmod(entry.mode)
        os.utime(path, (member.mtime, member.mtime))


def _contents(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return b"" if file is None else file.read()
