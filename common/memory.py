"""How much memory this node has, what asks for more than that, and errors that say so. No torch."""

import os
import re
from pathlib import Path
from typing import Final

_LIMITS: Final = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)

RANK_BYTES: Final = 1 << 27
"""The least that a rank takes: Python and torch."""


_RAN_OUT: Final = re.compile(
    r"out of memory|allocate memory|std::bad_alloc|OUT_OF_(?:DEVICE_|HOST_)?MEMORY"
    r"|OUT_OF_RESOURCES|(?:UR|ZE|PI)_(?:RESULT_)?ERROR_DEVICE_LOST"
)
"""What torch, CUDA and the layers below XPU (Unified Runtime, Level Zero, the older plug-ins) say.
XPU's driver also loses its device over it (pytorch issue 177714, torch-xpu-ops issue 3155)."""


def ran_out(error: BaseException) -> bool:
    """Whether memory, of the host or of a device, has run out: on XPU that is often a plain
    RuntimeError, known by its message alone.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and _RAN_OUT.search(str(error)) is not None


def host_memory() -> int:
    """Bytes that processes here may have together: the machine's, or their group's share."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in _LIMITS:
        try:
            physical = min(physical, int(limit.read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return physical


def check_memory(num_bytes: int, what: str, way_out: str) -> None:
    """Refuse what this node cannot hold."""
    here = host_memory()
    if num_bytes > here:
        raise ValueError(
            f"{what} takes at least {num_bytes / 2**30:,.0f} GiB on this node, which has "
            f"{here / 2**30:,.0f}: {way_out}"
        )
