"""How much memory this node has, and what asks for more than that. No torch."""

import os
from pathlib import Path
from typing import Final

_LIMITS: Final = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)

RANK_BYTES: Final = 1 << 27
"""The least that a rank takes: Python and torch."""


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
    """Refuse what this node cannot hold.

    Raises:
        ValueError: with both sizes.
    """
    here = host_memory()
    if num_bytes > here:
        raise ValueError(
            f"{what} takes at least {num_bytes / 2**30:,.0f} GiB on this node, which has "
            f"{here / 2**30:,.0f}: {way_out}"
        )
