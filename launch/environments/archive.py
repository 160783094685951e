"""Reading and writing a compressed tar as a stream: never all of it in memory or on disk twice.

gzip is Python's own; zstd is the `zstd` program, which clusters have and Python gets with 3.14.
"""

import gzip
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final, cast

from largebatch.launch.environments.manifest import EnvError

SUFFIXES: Final = (".tar.gz", ".tgz", ".tar.zst")
_LEVEL: Final = 1
"""Of gzip: packages are mostly machine code, on which higher levels take long and gain little."""


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
