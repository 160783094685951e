"""What a check has found: a stable code, how bad it is, what it means and what to do about it."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

from largebatch.launch.hosts import places

Severity = Literal["error", "warning", "note"]
SEVERITIES: Final[tuple[Severity, ...]] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """`code` is stable: scripts may look for it. `docs/doctor.md` lists all codes."""

    code: str
    severity: Severity
    found: str
    """What was seen, with the value."""
    means: str
    """What happens if nothing is done."""
    do: str
    """The way out."""
    nodes: tuple[str, ...] = ()
    """Where, if it is not everywhere: these nodes can be left out."""


def error(code: str, found: str, means: str, do: str, nodes: tuple[str, ...] = ()) -> Finding:
    """What keeps a run from starting or from being right."""
    return Finding(code, "error", found, means, do, nodes)


def warning(code: str, found: str, means: str, do: str, nodes: tuple[str, ...] = ()) -> Finding:
    """What costs time, or may go wrong."""
    return Finding(code, "warning", found, means, do, nodes)


def found_from(row: dict[str, Any]) -> Finding:
    """A finding again, after it has travelled as JSON."""
    return Finding(**{**row, "nodes": tuple(row["nodes"])})


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """One finding for each that differs in more than its nodes; errors first.

    98,304 ranks that see the same thing have seen one thing.
    """
    together: dict[Finding, dict[str, None]] = {}
    for finding in findings:
        nodes = together.setdefault(replace(finding, nodes=()), {})
        nodes.update(dict.fromkeys(finding.nodes))
    whole = [replace(finding, nodes=tuple(nodes)) for finding, nodes in together.items()]
    return sorted(whole, key=lambda finding: SEVERITIES.index(finding.severity))


def exit_code(findings: Iterable[Finding]) -> int:
    """1 where there is an error, else 0."""
    return int(any(finding.severity == "error" for finding in findings))


def as_text(findings: Sequence[Finding]) -> str:
    """For people: two or three lines a finding."""
    lines = []
    for finding in findings:
        where = f" [{places(finding.nodes)}]" if finding.nodes else ""
        lines.append(f"{finding.severity}: {finding.code}{where}: {finding.found}")
        lines.append(f"    means: {finding.means}")
        lines.append(f"    do:    {finding.do}")
    return "\n".join(lines)


def as_json(findings: Sequence[Finding], about: dict[str, object]) -> str:
    """For programs: `about` (what was looked at) and the findings, one JSON object."""
    return json.dumps({**about, "findings": [asdict(finding) for finding in findings]}, indent=1)
