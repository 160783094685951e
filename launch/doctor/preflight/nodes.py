"""Choosing the nodes of a job from an allocation with spares, and writing their hostfile."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from largebatch.launch.doctor.findings import Finding
from largebatch.launch.hosts import places, short


class TooFewNodes(ValueError):
    """Fewer good nodes than asked for; the message is for the user."""


@dataclass(frozen=True)
class Choice:
    """`lines` are those of the allocation's hostfile, as they stand there."""

    lines: tuple[str, ...]
    left_out: Mapping[str, str]
    """Node -> the codes that spoke against it, or "spare"."""
    spares: tuple[str, ...] = ()
    """Lines of good nodes that were left out, those without a warning first."""


def choose(lines: Sequence[str], findings: Iterable[Finding], num_nodes: int) -> Choice:
    """`num_nodes` good nodes: those without a finding first, then those with warnings only.
    TooFewNodes for an error that no choice of nodes takes away, or too few nodes without one.
    """
    findings = list(findings)
    everywhere = [f.code for f in findings if f.severity == "error" and not f.nodes]
    if everywhere:
        raise TooFewNodes(f"leaving nodes out does not help against {', '.join(everywhere)}")
    line_of = {short(line): line for line in lines}
    against: dict[str, list[str]] = {node: [] for node in line_of}
    bad = set()
    for finding in findings:
        for node in finding.nodes:
            if finding.severity != "note" and node in against:
                against[node].append(finding.code)
                if finding.severity == "error":
                    bad.add(node)
    good = [node for node in line_of if node not in bad]
    if len(good) < num_nodes:
        why = "; ".join(f"{node}: {', '.join(against[node])}" for node in sorted(bad))
        raise TooFewNodes(
            f"{num_nodes} nodes are wanted, and {len(good)} of the allocation's {len(line_of)} are "
            f"good ({why or 'the allocation is that small'}): ask PBS for more spares, or for "
            "fewer nodes here"
        )
    # Stable: where nothing speaks against them, nodes stay in the allocation's order.
    good = sorted(good, key=lambda node: len(against[node]))
    best = good[:num_nodes]
    chosen = [node for node in line_of if node in best]
    return Choice(
        tuple(line_of[node] for node in chosen),
        {
            node: ", ".join(dict.fromkeys(against[node])) or "spare"
            for node in line_of
            if node not in best
        },
        tuple(line_of[node] for node in good[num_nodes:]),
    )


def remembered(path: Path | None) -> list[Finding]:
    """A warning for each node that an earlier job has taken out: by now it may be mended.
    ValueError where the file cannot be read.
    """
    if path is None or not path.exists():
        return []
    try:
        rows = [line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--bad {path} cannot be read: {error}") from error
    why = {short(words[0]): words[-1].strip() for words in rows if words}
    return [
        Finding(
            "node-taken-out", "warning", f"in an earlier job: {reason}", "it may fail again",
            "it is used last", (node,),
        )
        for node, reason in why.items()
    ]  # fmt: skip


def format_choice(choice: Choice, path: Path) -> str:
    """What was chosen, for people."""
    rows = [f"{path}: {len(choice.lines)} nodes ({places([short(x) for x in choice.lines])})"]
    rows += [f"  left out {node}: {why}" for node, why in choice.left_out.items()]
    return "\n".join(rows)
