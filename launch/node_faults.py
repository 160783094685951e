"""Which node a line of a job's output speaks against.

A launcher's daemons hand a request on down a tree, and a parent tells that its child does not
answer: in `ping failed on A: No reply from B` the node to leave out is B. The sentences of PALS are
those of ALCF's known issues, of reports to MPICH and of saforem2/ezpz; those of Slurm its own.
"""

import re
from typing import Final

from largebatch.launch.hosts import short

BEFORE_A_NODE: Final = (
    "on", "from", "to", "child", "of", "with", "contact", "reach", "node", "host",
)  # fmt: skip
_BEFORE: Final = "|".join(rf"(?<=\b{word} )" for word in BEFORE_A_NODE)
NODE: Final = (
    r"(?:(?<![\w.-])(?:x\d[a-z0-9]*|nid\d+)"
    rf"|(?:{_BEFORE})"
    r"(?!(?:rank|signal|port|task|step|epoch|cxi|hsn|gpu|xpu|tile|eth|mlx)\d)[a-z][a-z-]*\d[a-z0-9]*)"
    r"(?:\.[a-z0-9-]+)*(?![\w-])"
)
"""x4307c2s6b0n0 or nid001234 anywhere, any other name with a number in it where a node belongs;
with or without its network."""

_IDS: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|\([^()]*\)", re.I)
"""Of applications and requests, which have names like nodes in them."""

_PROGRAM: Final = re.compile(
    r"No VNIs|No such file|Permission denied|Exec format|client socket", re.I
)
"""Not the node's fault, though it is named."""

_LOST: Final = re.compile(
    r"\b(?:ping|launch|start|spawn|signal|rpc \w+) failed on\b|RPC timeout from"
    r"|\bno (?:reply|answer|response|heartbeats?)\b|couldn.t forward RPC"
    r"|\b(?:couldn.t|could not|cannot|can.t|unable to|failed to) "
    r"(?:reach|contact|connect to|ping|communicate with)\b"
    r"|\b(?:lost|missed|missing|stale) heartbeats?\b"
    r"|\bheartbeats? (?:\w+ )?(?:lost|missed|time|expired)"
    r"|\blost (?:contact|connection|communication|connectivity)\b|\bnode fail(?:ure|ed)\b"
    r"|\b(?:unreachable|(?:not|no longer) (?:reachable|responding|answering)|unresponsive)\b"
    r"|\b(?:is|are|went|gone|marked|state|state =) (?:down|offline|dead|lost)\b",
    re.I,
)
_SUBJECT: Final = re.compile(
    rf"({NODE})['\"]?:? (?:(?:is|was|has|been|went|gone|became|now|marked|seems|appears|to be|as|"
    r"no longer|not|state|=) )*(?:un)?(?:reachable|responding|responsive|answering|down|offline"
    r"|dead|lost(?! heartb| contact| conn| comm))\b",
    re.I,
)
_HARDWARE: Final = re.compile(
    r"hbm_controller_error|\buncorrect(?:able|ed)\b|\bmachine[ _-]?check\b|\bMCE\b|\bECC\b"
    r"|\bhardware error\b|\bGPU (?:hang|lost|fell|has fallen)|\bmemory controller error",
    re.I,
)
_FABRIC: Final = re.compile(
    r"(?=.*(?:cxi|libfabric|slingshot|\bCQ\b|\bOFI\b|\bNIC\b))"
    r"(?=.*(?:error|fail|undeliverable|unreachable|timed? ?out|retr|refused|disconnect))",
    re.I,
)
_OTHER_END: Final = re.compile(
    rf"(?:\bpeer|\bto|\bfrom|\btarget|\bremote|\bdest\w*|\bdst)(?: \w+)?[ :=]+[('\"]?({NODE})", re.I
)
DIED: Final = re.compile(
    rf"(?:(?P<node>{NODE}): )?rank (?P<rank>\d+) died from signal (?P<signal>\d+)"
    rf"|srun: error: (?P<node2>{NODE}): tasks? (?P<rank2>\d+)[\d, -]*: "
    r"(?P<why>Killed|Bus error|Segmentation fault|Aborted)",
    re.I,
)
SHEPHERD: Final = re.compile(
    rf"(?:(?P<node>{NODE}): )?shepherd(?: on (?P<node2>{NODE}))? died", re.I
)
ECHOES: Final = ("2", "15")
"""Signals of a launcher that ends the others after a death."""


def lost(line: str) -> str | None:
    """The node that no longer answers, by its short name; None where the line tells of none."""
    if not _LOST.search(line) or _PROGRAM.search(line):
        return None
    line = _IDS.sub("", line)
    if (subject := _SUBJECT.search(line)) is not None:
        return short(subject[1])
    named = nodes_in(line)  # the reporting node stands first, the faulty one last
    return named[-1] if named else None


def hardware(line: str) -> str | None:
    """The node whose memory, processor or device has failed."""
    named = nodes_in(line) if _HARDWARE.search(line) else []
    return named[0] if named else None


def peer(line: str) -> str | None:
    """The other end of a connection on which a network interface reports an error."""
    if not _FABRIC.search(line):
        return None
    ends = _OTHER_END.findall(_IDS.sub("", line))
    return short(ends[-1]) if ends else None


def shepherd(line: str) -> str | None:
    """The node whose daemon of the launcher has died, mostly with the node."""
    found = SHEPHERD.search(line)
    node = found and (found["node2"] or found["node"])
    return short(node) if node else None


def died(line: str) -> str | None:
    """The node of a rank that died without having been ended by a signal from outside."""
    found = DIED.search(line)
    node = found and (found["node"] or found["node2"])
    return short(node) if found and node and found["signal"] not in ECHOES else None


def nodes_in(line: str) -> list[str]:
    """Every node that is named, in their order."""
    return [short(node) for node in re.findall(NODE, _IDS.sub("", line), re.I)]
