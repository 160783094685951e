"""Unpacking an archive as it arrives, on one node, every file checked while it is written."""

import gzip
import hashlib
import os
import shutil
import stat
import tarfile
import zlib
from pathlib import Path
from typing import IO, Any, Final

from largebatch.launch.environments.archive import (
    NAME,
    EnvError,
    Manifest,
    ManifestEntry,
    expanding,
    same_sizes,
)

_AT_ONCE: Final = 1 << 20
_MOST_MANIFEST: Final = 1 << 30  # bytes: of ten million files
_OVERFLOW: Final = Path("/proc/sys/kernel/overflowuid")


class Damaged(Exception):
    """What arrived is not what was packed."""


def manifest_of(archive: Path, zstd: bool) -> Manifest:
    """The manifest of an archive, its first member; no more than that is read. EnvError where there
    is no such file, or it is no archive of `env pack`.
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
    FileExistsError where something else is there, PermissionError where another user could have
    put it there, or could change it.
    """
    check_ours(target)
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


def check_ours(target: Path, user: int | None = None) -> None:
    """Refuse, by a PermissionError, a folder that another than root and `user` (None: of this
    process) could fill or exchange.
    """
    user = os.getuid() if user is None else user
    trusted = {user, 0}
    if _OVERFLOW.exists():  # root, seen from a container of the user's
        trusted.add(int(_OVERFLOW.read_text(encoding="ascii")))
    real = Path(os.path.realpath(target.parent)) / target.name
    for path in (real, *real.parents):
        try:
            about = path.lstat()
        except FileNotFoundError:
            continue
        what = None
        if about.st_uid not in trusted or (path == real and about.st_uid != user):
            what = f"belongs to another user (id {about.st_uid})"
        elif path == real and not stat.S_ISDIR(about.st_mode):
            what = "is no folder"
        # Where all may write, as in /tmp, the sticky bit keeps them from what is not theirs.
        elif about.st_mode & (0o022 if path == real else 0o002) and (
            path == real or not about.st_mode & stat.S_ISVTX
        ):
            what = "may be written to by others"
        if what is not None:
            raise PermissionError(
                f"{path} {what}, who could change the environment: remove it, or name a folder of "
                "your own with --to"
            )


def unpack(source: Any, zstd: bool, target: Path) -> None:
    """Unpack `source`, an open file or the reading end of a pipe, to a temporary name beside
    `target`, and rename when every file is right. Damaged for a file that is missing, cut off,
    changed or not in the manifest, OSError for a full disk, say: nothing is left behind.
    """
    own = target.with_name(f".{target.name}.{os.getpid()}")
    target.parent.mkdir(parents=True, exist_ok=True)
    check_ours(target)
    _clear_left_over(target)
    own.mkdir(mode=0o755)
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
    with _new_file(folder / NAME) as file:
        file.write(text)


def _new_file(path: Path) -> IO[bytes]:
    """A file that was not there; nothing is written through a link."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    return os.fdopen(os.open(path, flags, 0o644), "wb")


def _make_folder(path: Path, top: Path) -> None:
    """The folder and those above it up to `top`, none of them a link."""
    if path == top or (path.is_dir() and not path.is_symlink()):
        return
    _make_folder(path.parent, top)
    path.mkdir(mode=0o755)


def _one(tar: tarfile.TarFile, member: tarfile.TarInfo, entry: ManifestEntry, folder: Path) -> None:
    path = folder / entry.path  # the manifest holds no name that leads out of it
    for above in Path(entry.path).parents:
        if (folder / above).is_symlink():
            raise Damaged(f"{entry.path} would be written through the link {above}")
    _make_folder(path.parent, folder)
    if entry.kind == "folder" and member.isdir():
        _make_folder(path, folder)
    elif entry.kind == "link" and member.issym():
        if member.linkname != entry.target:
            raise Damaged(f"the link {entry.path} points to {member.linkname}")
        path.symlink_to(entry.target)
    elif entry.kind != "file" or not member.isreg() or member.size != entry.size:
        raise Damaged(f"{entry.path} is not what the manifest says")
    else:
        digest = hashlib.sha256()
        contents = tar.extractfile(member)
        if contents is None:
            raise Damaged(f"{entry.path} is no file")
        with _new_file(path) as file:
            while part := contents.read(_AT_ONCE):
                digest.update(part)
                file.write(part)
        if digest.hexdigest() != entry.sha256:
            raise Damaged(f"{entry.path} has arrived with another hash than it was packed with")
        path.chmod(entry.mode & 0o777)
        os.utime(path, (member.mtime, member.mtime))


def _contents(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member) if member.isreg() and member.size <= _MOST_MANIFEST else None
    return b"" if file is None else file.read()
