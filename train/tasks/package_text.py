"""Text that is there wherever this trains: Python sources of packages that training needs anyway.

`constraints.txt` pins them, and what a build writes or a Python version decides is left out, so the
text is the same under every Python. Other versions are other text: the record names them, and its
hash is another, under which `largebatch report` mixes no runs.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from largebatch.common.errors import ConfigError

PACKAGES: Final = {
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "scikit-learn": "sklearn",
    "scipy": "scipy",
}
"""The distributions, and the folder of each."""

_LONGEST: Final = 65_536
"""Bytes of a file that are read: no file is a large part of the held-out text."""

_HELD_OUT: Final = 32
"""One file in 32, by a hash of its name, is held out whole."""

# numpy has its distutils up to Python 3.11 only; externals are copies of what scipy has too.
_SKIPPED_FOLDERS: Final = {"__pycache__", "distutils", "externals", "tests"}
_SKIPPED_FILES: Final = {"__config__.py", "_distributor_init.py", "_version.py", "version.py"}


@dataclass(frozen=True)
class PackageText:
    """Training text and held-out text, of files that are in one of the two alone."""

    train: bytes
    held_out: bytes

    @cached_property
    def hash(self) -> str:
        digest = hashlib.sha256(self.train)
        digest.update(self.held_out)
        return digest.hexdigest()


@lru_cache(maxsize=2)
def package_text(num_bytes: int) -> PackageText:
    """The first `num_bytes` of the training text, and all that is held out, whatever `num_bytes`.

    Files come in the order of the hashes of their names, so that the beginning of the text is a
    sample of all packages.

    Raises:
        ConfigError: a package is not installed.
        ValueError: there is less text.
    """
    held_out, parts, length = [], [], 0
    for digest, path in sorted(_files()):
        if digest[0] < 256 // _HELD_OUT:  # the first files in this order
            held_out.append(_beginning(path))
            continue
        parts.append(_beginning(path))
        length += len(parts[-1])
        if length >= num_bytes:
            return PackageText(b"".join(parts)[:num_bytes], b"".join(held_out))
    raise ValueError(
        f"task.num_bytes must be at most {length}, the training text of the installed "
        f"{package_versions()}, got {num_bytes}"
    )


def _files() -> Iterator[tuple[bytes, Path]]:
    """The SHA-256 of the name of each source file, and its path."""
    for distribution, module in PACKAGES.items():
        found = find_spec(module)
        if found is None or found.origin is None:
            raise ConfigError(
                f"task: its text is the source of {', '.join(PACKAGES)}, and {distribution} is not "
                "installed: pip install 'largebatch[train]'"
            )
        root = Path(found.origin).parent
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = set(subfolders) - _SKIPPED_FOLDERS
            for path in (Path(folder, name) for name in names):
                if path.suffix == ".py" and path.name not in _SKIPPED_FILES:
                    name = path.relative_to(root.parent).as_posix()
                    yield hashlib.sha256(name.encode()).digest(), path


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_LONGEST)


@cache
def package_versions() -> str:
    """The packages with the versions that are installed."""
    return ", ".join(f"{name} {_version(name)}" for name in PACKAGES)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "(version unknown)"
