"""`largebatch env pack`: a virtual environment as one archive that runs wherever it is unpacked."""

import hashlib
import io
import os
import stat
import subprocess
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import IO

from largebatch.launch.environments import relocate
from largebatch.launch.environments.archive import (
    NAME,
    EnvError,
    Manifest,
    ManifestEntry,
    compressing,
    is_zstd,
)

_SKIPPED = ("pip-selfcheck.json", NAME)


@dataclass(frozen=True)
class Source:
    """Where an entry's contents come from: rewritten bytes, or a file as it is."""

    entry: ManifestEntry
    path: Path
    contents: bytes | None = None


def pack(prefix: Path, output: Path, *, with_site: bool = False) -> str:
    """Write the archive of the virtual environment at `prefix`; returns what was done, in words.
    EnvError where there is none, it cannot be moved, or the archive's name is bad. `with_site`:
    also the packages of its base Python (a site's module) that it sees.
    """
    zstd = is_zstd(output)
    prefix = prefix.absolute()
    venv = relocate.settings(prefix)
    site = site_packages(prefix)
    relocate.refuse_editable(site)
    if output.absolute().is_relative_to(prefix):
        raise EnvError(
            f"{output} is inside of the environment that it would hold: put it elsewhere"
        )
    if not output.absolute().parent.is_dir():
        raise EnvError(f"{output.absolute().parent} is no folder: make it first")
    started = time.perf_counter()
    sources = list(_of_prefix(prefix, with_site))
    if with_site:
        taken = {source.entry.path for source in sources}
        base = _of_site(prefix, site)
        sources += [source for source in base if source.entry.path not in taken]
    manifest = Manifest(
        prefix.name,
        venv.get("version", venv.get("version_info", "unknown")),
        venv.get("home", ""),
        {_name(found): found.version for found in distributions(path=[str(site)])},
        [source.entry for source in sources],
    )
    own = output.with_name(f".{os.getpid()}.{output.name}")
    try:
        with compressing(own, zstd) as file:
            _write(file, manifest, sources)
        own.replace(output)
    finally:
        own.unlink(missing_ok=True)
    return _summary(manifest, output, time.perf_counter() - started, venv, with_site)


def site_packages(prefix: Path) -> Path:
    """Where an environment's packages are; EnvError unless that is exactly one folder."""
    found = sorted((prefix / "lib").glob("python3*/site-packages"))
    if len(found) != 1:
        raise EnvError(f"{prefix}/lib holds {len(found)} python3.*/site-packages: expected one")
    return found[0]


def _of_prefix(prefix: Path, with_site: bool) -> Iterator[Source]:
    for folder, folders, files in os.walk(prefix):
        top = Path(folder)
        for name in sorted(folders):
            path = top / name
            if not path.is_symlink():
                yield Source(ManifestEntry(path.relative_to(prefix).as_posix(), "folder"), path)
            elif (target := relocate.link_target(path, prefix)) is not None:
                yield Source(_link(path, prefix, target), path)
            else:
                raise EnvError(
                    f"{path} is a link to a folder outside of the environment: put the folder "
                    "itself there, or remove the link"
                )
        for name in sorted(files):
            path = top / name
            if name in _SKIPPED or (top == prefix / "bin" and name in relocate.LEFT_OUT):
                continue
            target = relocate.link_target(path, prefix) if path.is_symlink() else None
            if target is not None:
                yield Source(_link(path, prefix, target), path)
            elif path.is_file():
                contents = relocate.moved(path, prefix, with_site)
                yield _file(path, path.relative_to(prefix).as_posix(), contents)
            else:
                raise EnvError(f"{path} is no file, folder or link that leads to one: remove it")


def _of_site(prefix: Path, site: Path) -> Iterator[Source]:
    """The files of every distribution that the base shows and the environment has not itself."""
    own = {_name(found) for found in distributions(path=[str(site)])}
    inside = site.relative_to(prefix).as_posix()
    seen: set[str] = set()
    for base in _base_sites(prefix):
        relocate.refuse_editable(base)
        for found in distributions(path=[str(base)]):
            if _name(found) in own:
                continue
            own.add(_name(found))
            for file in found.files or []:
                path, place = Path(str(found.locate_file(file))), f"{inside}/{file.as_posix()}"
                # Scripts are in ../../../bin, and stay with the base.
                if ".." not in file.parts and path.is_file() and place not in seen:
                    seen.add(place)
                    yield _file(path, place, None)


def _base_sites(prefix: Path) -> list[Path]:
    """The folders of packages that the environment's Python sees beyond its own."""
    code = "import site, sys; print(*site.getsitepackages(), sep=chr(10))"
    python = prefix / "bin" / "python"
    done = subprocess.run([str(python), "-I", "-c", code], capture_output=True, text=True)
    if done.returncode != 0:
        raise EnvError(f"{python} does not run: {done.stderr.strip().splitlines()[-1:]}")
    found = [Path(line) for line in done.stdout.splitlines()]
    return [path for path in found if path.is_dir() and not path.is_relative_to(prefix)]


def _name(found: Distribution) -> str:
    return found.metadata["Name"].lower().replace("_", "-")


def _link(path: Path, prefix: Path, target: str) -> ManifestEntry:
    return ManifestEntry(path.relative_to(prefix).as_posix(), "link", target=target)


def _file(path: Path, place: str, contents: bytes | None) -> Source:
    mode = stat.S_IMODE(path.stat().st_mode)
    if contents is not None:
        digest, size = hashlib.sha256(contents).hexdigest(), len(contents)
    else:
        with path.open("rb") as file:
            digest, size = hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size
    return Source(ManifestEntry(place, "file", mode, size, digest), path, contents)


def _write(file: IO[bytes], manifest: Manifest, sources: list[Source]) -> None:
    text = manifest.to_bytes()
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        first = tarfile.TarInfo(NAME)
        first.size = len(text)
        tar.addfile(first, io.BytesIO(text))
        for source in sources:
            entry = source.entry
            info = tarfile.TarInfo(entry.path)
            info.mode = entry.mode
            if entry.kind == "folder":
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            elif entry.kind == "link":
                info.type, info.linkname = tarfile.SYMTYPE, entry.target
                tar.addfile(info)
            else:
                info.size = entry.size
                # Compiled modules are taken for old where their source's time differs.
                info.mtime = int(source.path.stat().st_mtime)
                inside = source.contents
                with source.path.open("rb") if inside is None else io.BytesIO(inside) as contents:
                    tar.addfile(info, contents)


def _summary(
    manifest: Manifest, output: Path, seconds: float, venv: dict[str, str], with_site: bool
) -> str:
    packed, whole = output.stat().st_size, manifest.num_bytes
    files = sum(entry.kind == "file" for entry in manifest.entries)
    versions = manifest.versions
    lines = [
        f"{output}: {files:,} files, {whole / 2**20:,.1f} MiB packed to {packed / 2**20:,.1f} MiB "
        f"in {seconds:.1f} s ({whole / 2**20 / seconds:,.0f} MiB/s)",
        f"Python {manifest.python} at {manifest.home}, which has to be on every node; inside: "
        f"largebatch {versions.get('largebatch', 'not')}, torch {versions.get('torch', 'not')}, "
        f"{len(versions)} distributions in all",
        f"hash {manifest.total}",
    ]
    if venv.get("include-system-site-packages") == "true" and not with_site:
        lines.append(
            "packages of the base Python or module are not inside: the nodes read them from where "
            "they are (--with-site packs them too)"
        )
    return "\n".join(lines)
