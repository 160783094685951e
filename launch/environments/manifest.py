"""What is in an archive: every file with its size and hash, and one hash over all of it."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from largebatch.common.text import shown

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
