"""The counters of a node's network interfaces (HPE Cassini), as its kernel shows them.

`/sys/class/cxi/cxi<n>/device/telemetry/<name>` holds `value@seconds.nanoseconds`, the time being
that of the reading; `/run/cxi/cxi<n>/<name>` are the retry handler's, plain numbers. Names come
from listing the folders: one release of the software has 1,426 of them, another 1,890. What they
mean: HPE's Cassini Performance Counters guide, and Open MPI's docs/features/hwpc-cxi.rst.

`KINDS` are the kinds of trouble, with the counters that show them and their limits. Pauses are
cycles at 1 GHz. No source says what is healthy on a machine of many thousand nodes: `floor` and
`always` are this project's, to be set anew from what healthy runs of a machine show.
"""

import re
from dataclasses import dataclass
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
    """Every counter of the node by its name, `cxi0/hni_tx_paused_0` or `cxi0/handler/sct_timeouts`,
    whose part behind the interface's matches `wanted` (None: all); `root` is above /sys and /run.
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


PAUSE_CYCLES: Final = 1e9  # a second


@dataclass(frozen=True)
class CounterKind:
    """A reading of several counters of a node, by their names behind the interface's: the greatest
    (`worst`) or their sum, divided by the movement of those of `over`; None: by the time. What is
    above the usual by less than `floor` is ordinary, what is above `always` too much even where it
    is usual; None: not known.
    """

    name: str
    unit: str
    counters: re.Pattern[str]
    floor: float
    means: str
    do: str
    over: re.Pattern[str] | None = None
    worst: bool = False
    scale: float = 1.0
    always: float | None = None


KINDS: Final = (
    CounterKind(
        "transmit pauses", "of the time", re.compile(r"hni_tx_paused_\d"), 0.05,
        "the node had to wait for the network: congestion on the way from it",
        "look for other traffic (checkpoints, other jobs); a smaller message at a time, another "
        "CCL_ALLREDUCE_SCALEOUT, or place=scatter:group=tier0 for up to 64 nodes",
        worst=True, scale=1 / PAUSE_CYCLES, always=0.25,
    ),
    CounterKind(
        "receive pauses", "of the time", re.compile(r"hni_rx_paused_(\d|std)"), 0.05,
        "the node took in less than the network brought: it, or its host, is slow",
        "look at the node: its clocks, its memory, a process that should not be there; leave it "
        "out if it stays so",
        worst=True, scale=1 / PAUSE_CYCLES, always=0.25,
    ),
    CounterKind(
        "time-outs", "a second",
        re.compile(r"pct_(spt|sct|tct)_timeouts|pct_rsp_dropped_timeout|handler/\w*timeouts\w*"),
        0.05, "packets to or from the node were not answered",
        "suspect the node or its link: leave it out of the next job",
    ),
    CounterKind(
        "nacks", "a second",
        re.compile(r"pct_no_(tct|trs|mst)_nacks|pct_resource_busy|pct_trs_rsp_nack_drops"
                   r"|handler/nack_\w+"),
        1.0, "a target had no room or no connection for what was sent to it",
        "fewer messages at once: FI_CXI_RX_MATCH_MODE=hybrid, greater FI_CXI_DEFAULT_CQ_SIZE and "
        "FI_CXI_OFLOW_BUF_SIZE",
    ),
    CounterKind(
        "retries", "a second",
        re.compile(r"pct_retry_\w+|pct_req_blocked_retry|pct_trs_replay_pend_drops"),
        1.0, "packets were sent again", "see time-outs and nacks of the same nodes and times",
    ),
    CounterKind(
        "cancelled", "a second", re.compile(r"handler/(connections|pkts)_cancelled\w*"), 0.01,
        "the retry handler gave connections up: what was sent on them never arrives",
        "the run cannot go on from here: leave the node out, and resume from the checkpoint",
    ),
    CounterKind(
        "link replays", "a second",
        re.compile(r"hni_llr_[rt]x_replay_event|hni_pcs_uncorrected_cw|hni_discard_cntr_\d"),
        0.1, "the cable or the port makes errors, which the link repairs at a cost",
        "report the node and its interface to the machine's operators, leave it out",
    ),
    CounterKind(
        "host back-pressure", "blocked a packet",
        re.compile(r"parbs_tarb_pi_(posted|non_posted)_blocked_cnt"), 4.0,
        "the interface waited for the host's PCIe", "look at the node's memory and its CPU binding",
        over=re.compile(r"parbs_tarb_pi_(posted|non_posted)_pkts"),
    ),
)  # fmt: skip


def quantity(value: float, kind: CounterKind) -> str:
    if kind.unit == "of the time":
        return f"{value:.1%} {kind.unit}"
    return f"{value:.3g} {kind.unit}"
