"""What a number was measured with."""

import platform
import socket
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from largebatch.distributed.ranks import Ranks


def provenance(ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """Versions, device, launcher, host and code of this run."""
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": version("numpy"),
            "largebatch": _own_version(),
        },
        "git_commit": git_commit(),
        "device": device_name(device),
        "num_threads": torch.get_num_threads(),
        "host": socket.gethostname(),
        "launcher": ranks.launcher,
        "world_size": ranks.size,
        "command": " ".join(sys.argv[1:]),
    }


@cache
def _own_version() -> str | None:
    try:
        return version("largebatch")
    except PackageNotFoundError:
        return None  # a checkout on the path, never installed


@cache
def git_commit() -> str | None:
    """Return the checkout's commit, `+changes` where it has any; None for an installed wheel."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    # `describe --dirty` would lock the index, and a full disk would leave the lock there.
    words = ("status", "--porcelain=v2", "--branch", "--untracked-files=no")
    try:
        said = subprocess.run(
            ["git", "-C", str(here), "--no-optional-locks", *words],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    lines = said.stdout.splitlines()
    commits = [
        line.removeprefix("# branch.oid ") for line in lines if line.startswith("# branch.oid")
    ]
    changes = any(not line.startswith("#") for line in lines)
    return "".join(commits) + "+changes" * changes


@cache
def device_name(device: torch.device) -> str:
    """What torch calls an accelerator, or the processor's own name."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        name: str = module.get_device_name(device)
        return name
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()
