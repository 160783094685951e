"""Which rank held the others up: from what `largebatch watch` heard when a run stood still."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from largebatch.common.text import and_more
from largebatch.launch.diagnose.causes import Cause
from largebatch.records import Fields, RecordError, find_fields, last_fields, printable
from largebatch.records.fields import RANKS, list_of, listing, must_be, text, whole
from largebatch.records.names import METRICS, WATCH

HANGS: Final = ("hangs: ", "stands still: ")
"""In a report of `watch`, today's and an earlier one's."""
MOST_NAMED: Final = 8


@dataclass(frozen=True)
class ReportedDivergence:
    """A collective that ranks did not complete together, as a report has it: the call of most, in
    words, and the ranks that entered each different one.
    """

    kind: str
    number: int
    call: str
    entered: list[list[int]]
    missing: list[int]


def read_reports(run: Path, problems: list[str]) -> list[Cause]:
    """The last time that the run stood still; one that was asked where it stands did not."""
    paths = sorted((run / WATCH).glob("*/report.json"))
    still = [
        (path, held)
        for path in paths
        if (held := find_fields(path, problems)) is not None
        and any(word in (held.find("reason", text) or "") for word in HANGS)
    ]
    if not still:
        return []
    path, held = still[-1]
    line = last_fields(run / METRICS, [])
    last = 0 if line is None else line.find("step", whole()) or 0
    went_on = last > (held.find_inside("heartbeat").find("step", whole()) or 0)
    name, reason = str(path.relative_to(run)), held.find("reason", text)
    culprits, silent = held.find("culprits", RANKS) or [], held.find("silent", RANKS) or []
    findings = [found for entry in held.each("findings") if (found := _finding(entry)) is not None]
    suspects = culprits or silent
    hosts = _hosts(path.parent, suspects, problems)
    evidence = [f"{name}: {reason}"]
    evidence += [f"{name}: {_format_divergence(finding)}" for finding in findings]
    for place in held.each("places"):
        ranks, lines = place.find("ranks", RANKS) or [], place.find("lines", list_of(text))
        if lines and (set(ranks) & set(suspects) or not suspects):
            evidence.append(f"{name}: {_ranks(ranks)} at {lines[0]}")
    after = " It has gone on since." if went_on else ""
    return [
        Cause(
            60 if went_on else 100,
            f"{_who(findings, culprits, silent, hosts)}{after}",
            "look at the place in the code that these ranks stand at: if only they go that way, a "
            "collective is missing there; if their node stands out below, leave it out of the next "
            "job; resume=auto starts from the last checkpoint",
            tuple(evidence),
            tuple(dict.fromkeys(hosts.values())),
        )
    ]


def _finding(held: Fields) -> ReportedDivergence | None:
    """None where it is noted as damaged."""
    try:
        calls = held.take("calls", _calls)
        return ReportedDivergence(
            held.take("kind", text),
            held.take("number", whole()),
            calls[0][0],
            [ranks for _, ranks in calls],
            held.find("missing", RANKS) or [],
        )
    except RecordError as error:
        held.problems.append(str(error))
        return None


def _calls(value: Any) -> list[tuple[str, list[int]]]:
    """`allreduce [10]` of each call and its ranks; a call is written as a list of its fields."""
    found = []
    for row in listing(value) or [None]:
        call, ranks = row if isinstance(row, list) and len(row) == 2 else (None, None)
        if not isinstance(call, list) or len(call) < 2 or not isinstance(call[1], list):
            raise must_be("calls with their ranks", value)
        words = printable(" ".join(map(str, (call[0], *call[1])))).strip()
        found.append((words, RANKS(ranks)))
    return found


def _who(
    findings: Sequence[ReportedDivergence],
    culprits: list[int],
    silent: list[int],
    hosts: dict[int, str],
) -> str:
    where = f" (on {', '.join(dict.fromkeys(hosts.values()))})" if hosts else ""
    first = {finding.kind: finding for finding in reversed(findings)}
    if culprits and (missing := first.get("missing")) is not None:
        waiting = [rank for ranks in missing.entered for rank in ranks]
        return (
            f"The run stood still: {_ranks(culprits)}{where} never entered collective "
            f"{missing.number}, {missing.call}; {_ranks(waiting)} waited in it."
        )
    if (mismatch := first.get("mismatch")) is not None:
        return (
            f"The run stood still: ranks entered different collectives as number "
            f"{mismatch.number}; {_ranks(culprits or silent)}{where} apart from the others."
        )
    if silent:
        return f"The run stood still: {_ranks(silent)}{where} gave no answer when asked."
    if (inside := first.get("inside")) is not None:
        return (
            f"The run stood still inside collective {inside.number}, {inside.call}, "
            "which every rank had entered: the network or its library did not end it."
        )
    return "The run stood still, and no rank waited for another in a collective."


def _format_divergence(finding: ReportedDivergence) -> str:
    entered = "; ".join(f"{_ranks(ranks)} in it" for ranks in finding.entered)
    missing = f"; {_ranks(finding.missing)} missing" if finding.missing else ""
    return f"collective {finding.number}, {finding.call}: {entered}{missing}"


def _hosts(folder: Path, ranks: list[int], problems: list[str]) -> dict[int, str]:
    """Nodes of the ranks that answered, by their short names."""
    hosts = {}
    for rank in ranks:
        answer = find_fields(folder / f"rank-{rank}.json", problems)
        host = None if answer is None else answer.find("host", text)
        if host is not None:
            hosts[rank] = host.partition(".")[0]
    return hosts


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) != 1)} {and_more(ranks, MOST_NAMED)}"
