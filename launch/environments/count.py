"""`largebatch env count`: what an import asks of the file system, and what all ranks ask together.

Counted by strace where it is there and may trace; else from inside: Python's audit events for opens
and listings, the interpreter's own calls of stat, and the libraries that the loader has mapped.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from largebatch.launch.environments.errors import EnvError

_CALLS: Final = (
    "open,openat,stat,lstat,newfstatat,statx,access,faccessat,faccessat2,readlink,readlinkat,"
    "getdents64,chdir,execve"
)
TALK: Final = (30_000, 38_400, 900e6)
"""Files, ranks and metadata operations of "Experiences with Scaling AI Workloads on Aurora"."""

# Before the modules are imported, so that their own calls are counted; os is there from the start.
_INSIDE: Final = r"""
import os, posix, sys
files, operations = set(), [0]
def audit(event, arguments):
    if event == "open":
        operations[0] += 1
        if isinstance(arguments[0], str):
            files.add(arguments[0])
    elif event in ("os.listdir", "os.scandir"):
        operations[0] += 1
def counted(call):
    def calls(*given, **named):
        operations[0] += 1
        return call(*given, **named)
    return calls
for name in ("stat", "lstat", "readlink", "access"):
    call = counted(getattr(posix, name))
    setattr(posix, name, call)  # what the import system calls
    setattr(os, name, call)
sys.addaudithook(audit)
for name in sys.argv[1:]:
    __import__(name)
opened, done = set(files), operations[0]
with open("/proc/self/maps") as maps:
    mapped = {line[line.find("/"):].strip() for line in maps if ".so" in line}
libraries = mapped - opened
print("largebatch-count", len(opened | libraries), done + len(libraries))
"""


@dataclass(frozen=True)
class Count:
    """Of one process. `files` are distinct ones opened; `operations` ask for a name's metadata."""

    modules: tuple[str, ...]
    files: int
    operations: int
    failed: int | None
    """Operations on names that are not there; None where that was not counted."""
    how: str


def count(modules: Sequence[str], strace: bool = True) -> Count:
    """Import `modules` in a fresh Python and count.

    Raises:
        EnvError: a name that is no module, or an import that fails.
    """
    for name in modules:
        if not re.fullmatch(r"[A-Za-z_][\w.]*", name):
            raise EnvError(f"a module's name is like torch.distributed, got {name!r}")
    if strace and shutil.which("strace"):
        counted = _by_strace(modules)
        if counted is not None:
            return counted
    return _from_inside(modules)


def _by_strace(modules: Sequence[str]) -> Count | None:
    """None where this process may not trace."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        tracing = ["strace", "-f", "-qq", "-e", f"trace={_CALLS}", "-o", str(log)]
        if subprocess.run([*tracing, "true"], capture_output=True).returncode != 0:
            return None
        _run([*tracing, sys.executable, "-c", _imports(modules)], modules)
        files, calls = read_strace(log.read_text(encoding="utf-8", errors="replace").splitlines())
    return Count(tuple(modules), len(files), calls["all"], calls["failed"], "counted by strace")


def read_strace(lines: Iterable[str]) -> tuple[set[str], Counter[str]]:
    """The files opened, and how many calls there were: "all", and "failed" ones among them."""
    files: set[str] = set()
    calls: Counter[str] = Counter()
    for line in lines:
        call = re.match(r"(?:\d+\s+)?(\w+)\(", line)
        if call is None or "AT_EMPTY_PATH" in line:
            continue  # the second half of a call, the end of a process; a file that is open
        calls["all"] += 1
        if re.search(r"= -1 E\w+", line):
            calls["failed"] += 1
        elif call[1] in ("open", "openat") and (name := re.search(r'"([^"]*)"', line)):
            files.add(name[1])
    return files, calls


def _from_inside(modules: Sequence[str]) -> Count:
    said = _run([sys.executable, "-c", _INSIDE, *modules], modules)
    found = re.search(r"largebatch-count (\d+) (\d+)", said)
    assert found is not None
    return Count(tuple(modules), int(found[1]), int(found[2]), None, "counted inside of Python")


def _imports(modules: Sequence[str]) -> str:
    return "; ".join(f"import {name}" for name in modules)


def _run(command: list[str], modules: Sequence[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    )
    if done.returncode != 0:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise EnvError(f"importing {', '.join(modules)} fails: {why}")
    return done.stdout


def table(counted: Count, ranks: Sequence[int]) -> str:
    """The count and what it comes to on many ranks.

    Raises:
        EnvError: a number of ranks below 1.
    """
    if min(ranks) < 1:
        raise EnvError(f"--ranks must be at least 1, got {min(ranks)}")
    of_which = "" if counted.failed is None else f" ({counted.failed:,} for names not there)"
    files, talk_ranks, operations = TALK
    lines = [
        f"import {', '.join(counted.modules)}: {counted.files:,} files opened, "
        f"{counted.operations:,} metadata operations{of_which}, {counted.how}",
        "",
        f"{'ranks':>10}  {'operations':>16}",
        *(f"{count:>10,}  {count * counted.operations:>16,}" for count in ranks),
        "",
        f"For scale: a talk on Aurora counted over {files:,} files and {operations / 1e6:,.0f} "
        f"million operations at {talk_ranks:,} ranks.",
        "A projection: every rank asks for all of it, nothing is cached on a node. What a file "
        "system makes of it is not in these numbers.",
    ]
    return "\n".join(lines)
