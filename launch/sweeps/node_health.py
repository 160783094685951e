"""Health of nodes: which nodes a sweep leaves out.

A trial fails because of itself or because of its node, and at first nobody can tell. It is begun
again on other nodes: if it succeeds there, its first nodes were at fault; if it fails there
too, it is the trial's own, and the nodes are forgiven. Until then a node with two such questions
open gets no new trial, so that a broken node does not eat the whole queue, nor a broken trial the
whole allocation. A node that is at fault twice is left out, for as long as the sweep's process
lasts: the next job's nodes are others, and what looks like a broken node may be a broken
environment.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

STRIKES: Final = 2


@dataclass
class NodeHealth:
    """Failures by trial and by node.

    Attributes:
        faults: times that a node was at fault.
        left_out: nodes that `newly_left_out` has returned.
        doubts: by trial that has failed and may still succeed, the nodes it failed on.
    """

    faults: Counter[str] = field(default_factory=Counter)
    left_out: set[str] = field(default_factory=set)
    doubts: dict[str, list[str]] = field(default_factory=dict)

    def record_failure(self, trial: str, nodes: Iterable[str]) -> None:
        """The trial failed on the nodes."""
        self.doubts.setdefault(trial, []).extend(nodes)

    def record_dead(self, node: str) -> None:
        """A node that does not even start a trivial command: a fault beside that of its trial."""
        self.faults[node] += STRIKES

    def record_success(self, trial: str, nodes: Iterable[str]) -> None:
        """The trial has ended well on the nodes: where it failed before, others were at fault."""
        good = set(nodes)
        self.faults.update(set(self.doubts.pop(trial, ())) - good)

    def forgive(self, trial: str) -> None:
        """The trial has failed too often."""
        self.doubts.pop(trial, None)

    def newly_left_out(self) -> set[str]:
        """Nodes to leave out that were not by now."""
        out = {node for node, faults in self.faults.items() if faults >= STRIKES}
        new = out - self.left_out
        self.left_out |= new
        return new

    @property
    def doubtful(self) -> set[str]:
        """Nodes that should wait for the answer."""
        open_questions = Counter(node for nodes in self.doubts.values() for node in set(nodes))
        return {
            node for node, doubts in open_questions.items() if doubts + self.faults[node] >= STRIKES
        }
