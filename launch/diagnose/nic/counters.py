"""The counters of a node's network interfaces (HPE Cassini), as its kernel shows them.

`/sys/class/cxi/cxi<n>/device/telemetry/<name>` holds `value@seconds.nanoseconds`, the time being
that of the reading; `/run/cxi/cxi<n>/<name>` are the retry handler's, plain numbers. Names come
from listing the folders: one release of the software has 1,426 of them, another 1,890. What they
mean: HPE's Cassini Performance Counters guide, and Open MPI's docs/features/hwpc-cxi.rst.
"""

import re
from pathlib import Path
from typing import Final

TELEMETRY: Final = ("sys/class/cxi", "device/telemetry")
RETRY_HANDLER: Final = "run/cxi"
LEFT_OUT: Final = "ALL-in-binary"

IMPORTANT: Final = re.compile(
    r"hni_[rt]x_paused_\d|hni_rx_paused_std|hni_pause_(recv|sent|xoff_sent)(_\d)?"
    r"|parbs_tarb_pi_(posted|non_posted)_(pkts|blocked_cnt)"
    r"|pct_(spt|sct|tct)_timeouts|pct_no_(tct|trs|mst)_nacks|pct_resource_busy"
    r"|pct_retry_(srb_requests|mst_get|trs_put)|pct_trs_(rsp_nack|replay_pend)_drops"
    r"|pct_rsp_dropped_timeout|pct_req_blocked_retry|pct_prf_trs_status_(max_)?trs_in_use"
    r"|hni_pcs_(good|corrected|uncorrected)_cw|hni_llr_[rt]x_replay_event|hni_tx_stall_llr"
    r"|hni_discard_cntr_\d|lpe_net_match_(priority|overflow)_\d|lpe_rndzv_puts(_offloaded)?_0"
    r"|atu_cache_(miss|evictions|hit)\w*"
    r"|handler/.*"
)
"""Those that say that a network waits, repeats or loses; everything of the retry handler."""


def list_counters(root: Path, wanted: re.Pattern[str] | None) -> dict[str, Path]:
    """Every counter of the node by its name, `cxi0/hni_tx_paused_0` or `cxi0/handler/sct_timeouts`.

    Args:
        root: above /sys and /run: another tree for tests.
        wanted: a pattern for the name behind the interface's; None: all.
    """
    found: dict[str, Path] = {}
    above, below = TELEMETRY
    for interface in _folders(root / above):
        for path in _files(interface / below):
            found[f"{interface.name}/{path.name}"] = path
    for interface in _folders(root / RETRY_HANDLER):
        for path in _files(interface):
            found[f"{interface.name}/handler/{path.name}"] = path
    return {
        name: path
        for name, path in found.items()
        if wanted is None or wanted.fullmatch(name.partition("/")[2])
    }


def _folders(above: Path) -> list[Path]:
    """The interfaces: links to folders, in /sys."""
    try:
        found = [path for path in above.iterdir() if re.fullmatch(r"cxi\d+", path.name)]
    except OSError:
        return []
    return sorted(found, key=lambda path: int(path.name[3:]))


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.name != LEFT_OUT)
    except OSError:
        return []


def parse(text: bytes) -> int:
    """A counter's value; raises ValueError where the text is no counter's."""
    return int(text.partition(b"@")[0])
