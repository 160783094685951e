"""A cause of a run's trouble: what was seen where, and what to do."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from largebatch.records import printable

MOST_EVIDENCE: Final = 8


@dataclass(frozen=True)
class Cause:
    """What happened, with names and numbers, the way out, and the nodes, as far as they are known.
    `weight` is how much it explains: 100 names the rank or node that stopped the run, 10 had no
    effect that was seen. `evidence` is where it is written, FILE:LINE or FILE and time, and what is
    written there.
    """

    weight: int
    what: str
    do: str
    evidence: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = [*self.evidence[:MOST_EVIDENCE]]
        if len(self.evidence) > MOST_EVIDENCE:
            shown.append(f"… {len(self.evidence) - MOST_EVIDENCE} more")
        lines = [self.what, *(f"   seen: {line}" for line in shown), f"   do:   {self.do}"]
        return "\n".join(map(printable, lines))


def in_order(causes: Iterable[Cause]) -> list[Cause]:
    """The weightiest first. A node that several causes name weighs more in each of them."""
    causes = list(causes)
    counts = Counter(node for cause in causes for node in set(cause.nodes))

    def weight(cause: Cause) -> int:
        return cause.weight + 2 * max((counts[node] - 1 for node in cause.nodes), default=0)

    return sorted(causes, key=weight, reverse=True)
