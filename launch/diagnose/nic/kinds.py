"""What network counters are read for: kinds of trouble, the counters that tell, their limits.

Pauses are cycles at 1 GHz (Open MPI's docs/features/hwpc-cxi.rst). No source says what is healthy
on a machine of many thousand nodes: `floor` and `always` are this project's, to be set anew from
what healthy runs of a machine show.
"""

import re
from dataclasses import dataclass
from typing import Final

PAUSE_CYCLES: Final = 1e9  # a second


@dataclass(frozen=True)
class Kind:
    """A reading of several counters of a node.

    Attributes:
        counters: those it is made of, by their names behind the interface's.
        over: those whose movement it is divided by; None: the time.
        worst: the greatest of the counters, else their sum.
        floor: what is above the usual by less than this is ordinary.
        always: what is too much even where it is usual; None: not known.
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
    Kind(
        "transmit pauses", "of the time", re.compile(r"hni_tx_paused_\d"), 0.05,
        "the node had to wait for the network: congestion on the way from it",
        "look for other traffic (checkpoints, other jobs); a smaller message at a time, another "
        "CCL_ALLREDUCE_SCALEOUT, or place=scatter:group=tier0 for up to 64 nodes",
        worst=True, scale=1 / PAUSE_CYCLES, always=0.25,
    ),
    Kind(
        "receive pauses", "of the time", re.compile(r"hni_rx_paused_(\d|std)"), 0.05,
        "the node took in less than the network brought: it, or its host, is slow",
        "look at the node: its clocks, its memory, a process that should not be there; leave it "
        "out if it stays so",
        worst=True, scale=1 / PAUSE_CYCLES, always=0.25,
    ),
    Kind(
        "time-outs", "a second",
        re.compile(r"pct_(spt|sct|tct)_timeouts|pct_rsp_dropped_timeout|handler/\w*timeouts\w*"),
        0.05, "packets to or from the node were not answered",
        "suspect the node or its link: leave it out of the next job",
    ),
    Kind(
        "nacks", "a second",
        re.compile(r"pct_no_(tct|trs|mst)_nacks|pct_resource_busy|pct_trs_rsp_nack_drops"
                   r"|handler/nack_\w+"),
        1.0, "a target had no room or no connection for what was sent to it",
        "fewer messages at once: FI_CXI_RX_MATCH_MODE=hybrid, greater FI_CXI_DEFAULT_CQ_SIZE and "
        "FI_CXI_OFLOW_BUF_SIZE",
    ),
    Kind(
        "retries", "a second",
        re.compile(r"pct_retry_\w+|pct_req_blocked_retry|pct_trs_replay_pend_drops"),
        1.0, "packets were sent again", "see time-outs and nacks of the same nodes and times",
    ),
    Kind(
        "cancelled", "a second", re.compile(r"handler/(connections|pkts)_cancelled\w*"), 0.01,
        "the retry handler gave connections up: what was sent on them never arrives",
        "the run cannot go on from here: leave the node out, and resume from the checkpoint",
    ),
    Kind(
        "link replays", "a second",
        re.compile(r"hni_llr_[rt]x_replay_event|hni_pcs_uncorrected_cw|hni_discard_cntr_\d"),
        0.1, "the cable or the port makes errors, which the link repairs at a cost",
        "report the node and its interface to the machine's operators, leave it out",
    ),
    Kind(
        "host back-pressure", "blocked a packet",
        re.compile(r"parbs_tarb_pi_(posted|non_posted)_blocked_cnt"), 4.0,
        "the interface waited for the host's PCIe", "look at the node's memory and its CPU binding",
        over=re.compile(r"parbs_tarb_pi_(posted|non_posted)_pkts"),
    ),
)  # fmt: skip


def quantity(value: float, kind: Kind) -> str:
    if kind.unit == "of the time":
        return f"{value:.1%} {kind.unit}"
    return f"{value:.3g} {kind.unit}"
