"""An archive of an environment: a compressed tar, and its manifest of every file's size and hash.

The tar is read and written as a stream: never all of it in memory or on disk twice. gzip is
Python's own; zstd is the `zstd` program, which clusters have and Python gets with 3.14.
"""

import gzip
import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Final, cast

from largebatch.common.text import shown

SUFFIXES: Final = (".tar.gz", ".tgz", ".tar.zst")
_LEVEL: Final = 1
"""Of gzip: packages are mostly machine code, on which higher levels take long and gain little."""
NAME: Final = ".largebatch-env.json"
"""The manifest's name, in the archive (its first member) and in the folder that came of it."""
_FORMAT: Final = 1


class EnvError(ValueError):
    """`largebatch env` cannot do what it is asked for; the message is one sentence for the user."""


@dataclass(frozen=True)
class ManifestEntry:
    """One file, link or folder; `path` is below the environment's top, with forward slashes."""

    path: str
    kind: str
    """file, link or folder."""
    mode: int = 0o755
    size: int = 0
    sha256: str = ""
    target: str = ""
    """Of a link."""


@dataclass
class Manifest:
    name: str
    python: str
    home: str
    """Where the base Python's executable is: it has to be there on every node."""
    versions: dict[str, str]
    """Of the distributions inside the archive, by name."""
    entries: list[ManifestEntry] = field(default_factory=list)

    @property
    def total(self) -> str:
        """One hash of everything: equal for equal environments, whenever they were packed."""
        rows = [
            json.dumps(asdict(entry), sort_keys=True)
            for entry in sorted(self.entries, key=lambda entry: entry.path)
        ]
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()

    @property
    def num_bytes(self) -> int:
        return sum(entry.size for entry in self.entries)

    def to_bytes(self) -> bytes:
        row: dict[str, Any] = {"format": _FORMAT, "total": self.total, **asdict(self)}
        return json.dumps(row, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, text: bytes, where: object) -> "Manifest":
        """Read it again; EnvError where it is none, or does not agree with its own hash."""
        try:
            row = json.loads(text)
            if row.pop("format") != _FORMAT:
                raise EnvError(f"{where} was packed by another version of largebatch: pack it anew")
            total = row.pop("total")
            entries = [ManifestEntry(**entry) for entry in row.pop("entries")]
            manifest = cls(**row, entries=entries)
            _check_types(manifest)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, EnvError):
                raise
            raise EnvError(f"{where} is not an archive of `largebatch env pack`") from error
        if manifest.total != total:
            raise EnvError(f"the manifest of {where} is damaged: pack the environment anew")
        return manifest


def _check_types(manifest: Manifest) -> None:
    """Refuse what is no manifest, or would lead out of the environment's folder."""
    texts = [manifest.name, manifest.python, manifest.home]
    for entry in manifest.entries:
        texts += [entry.path, entry.kind, entry.sha256, entry.target]
        if type(entry.mode) is not int or type(entry.size) is not int or entry.size < 0:
            raise TypeError(f"{entry.path}: mode and size must be whole numbers")
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("names must be text")
    for name in (manifest.name, *(entry.path for entry in manifest.entries)):
        parts = name.split("/")
        if not name.isprintable() or {"", ".", "..", NAME} & set(parts):
            raise EnvError(f"{shown(name)} is no name of a file in an environment")
    if "/" in manifest.name:
        raise EnvError(f"{shown(manifest.name)} is no name of an environment")


def same_sizes(folder: Path, entries: Iterable[ManifestEntry]) -> bool:
    """Whether every file is there with its size; reads no contents."""
    for entry in entries:
        path = folder / entry.path
        if entry.kind == "file" and (not path.is_file() or path.stat().st_size != entry.size):
            return False
    return True


def is_zstd(path: Path) -> bool:
    """Whether the name says zstd; EnvError for another suffix, or zstd without the program."""
    if not path.name.endswith(SUFFIXES):
        raise EnvError(f"an archive's name must end in {', '.join(SUFFIXES)}, got {path.name!r}")
    if path.name.endswith(".zst"):
        if shutil.which("zstd") is None:
            raise EnvError(
                f"{path.name} needs the zstd program, which is not on PATH: use a name in .tar.gz"
            )
        return True
    return False


@contextmanager
def compressing(path: Path, zstd: bool) -> Iterator[IO[bytes]]:
    """A file-like into which a tar is written."""
    if not zstd:
        with gzip.GzipFile(path, "wb", compresslevel=_LEVEL, mtime=0) as file:
            yield cast(IO[bytes], file)
        return
    command = ["zstd", "-q", "-f", "-T0", "-o", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        yield process.stdin
        process.stdin.close()
        if process.wait() != 0:
            raise OSError(f"zstd failed with exit code {process.returncode}")


@contextmanager
def expanding(source: Any, zstd: bool, whole: bool = True) -> Iterator[IO[bytes]]:
    """A file-like from which a tar is read, of an open file or the reading end of a pipe; OSError
    where the archive is damaged. `whole`: it is read to its end, and the program must not fail.
    """
    if not zstd:
        with gzip.GzipFile(fileobj=source, mode="rb") as file:
            yield cast(IO[bytes], file)
        return
    command = ["zstd", "-q", "-d", "-c"]
    process = subprocess.Popen(
        command, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        yield process.stdout
        if whole and process.wait() != 0:
            raise OSError(f"zstd: {process.stderr.read().decode(errors='replace').strip()}")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()
