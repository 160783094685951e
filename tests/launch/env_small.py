"""A small virtual environment with a package, a console script and a path file, made by hand."""

import hashlib
import stat
import venv
from pathlib import Path

LARGE = 3_000_000
"""Bytes of the largest file: several chunks of what a node takes at a time."""


def make(prefix: Path) -> Path:
    """An environment at `prefix`; returns its site-packages."""
    venv.create(prefix, symlinks=True)
    site = next((prefix / "lib").glob("python3*/site-packages"))
    package = site / "pebble"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import sys\n\n\ndef main() -> None:\n    print(__file__, sys.prefix)\n", encoding="utf-8"
    )
    (package / "weights.bin").write_bytes(noise(LARGE))
    (package / "same.bin").symlink_to(package / "weights.bin")  # an absolute link inside
    (site / "more").mkdir()
    (site / "more" / "gravel.py").write_text("NAME = 'gravel'\n", encoding="utf-8")
    (site / "gravel.pth").write_text(f"# a comment\n{site / 'more'}\n", encoding="utf-8")
    distribution = site / "pebble-1.5.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: pebble\nVersion: 1.5\n", encoding="utf-8"
    )
    script(prefix / "bin" / "pebble", f"#!{prefix / 'bin' / 'python'}\n")
    return site


def script(path: Path, first: str) -> None:
    path.write_text(first + "import pebble\npebble.main()\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def noise(size: int) -> bytes:
    """Bytes that do not compress: a chain of hashes."""
    blocks = [hashlib.sha256(f"{block}".encode()).digest() for block in range(size // 32 + 1)]
    return b"".join(blocks)[:size]


def listing(folder: Path) -> dict[str, tuple[str, int, str]]:
    """Every file, link and folder below `folder` by an independent walk: kind, mode, contents."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = ("link", 0, str(path.readlink()))
        elif path.is_dir():
            found[name] = ("folder", 0, "")
        else:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[name] = ("file", stat.S_IMODE(path.stat().st_mode), digest)
    return found
