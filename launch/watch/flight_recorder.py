"""Which rank is missing from which collective: what ranks have recorded, compared.

Every rank counts the collectives that it enters, for each process group. So ranks that hang can be
distinguished by their numbers alone: the rank that is behind is the one that the others wait for.
States are used where they say something; with gloo every entry is "scheduled" for ever, and with
some versions of XCCL nothing ever says that one is done. (torch's own analyser, `torchfrtrace`,
reads NCCL's records; gloo's stop it with a KeyError, in torch 2.13.)

    python -m largebatch.launch.watch.flight_recorder FILE …
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from largebatch.common.text import int_ranges
from largebatch.launch.watch.flight_records import Call, Calls, FlightRecord, Group, read

_MOST_NAMED: Final = 16


@dataclass(frozen=True)
class Divergence:
    """One collective that ranks do not complete together. Its kind is "missing" where ranks that
    others wait for have not entered it, "mismatch" where ranks have entered different ones, or with
    different sizes, "inside" where all have entered it, and it does not end. `calls` are what was
    entered, each with its ranks, first that of most.
    """

    kind: str
    group: Group
    number: int
    calls: list[tuple[Call, list[int]]]
    missing: list[int]

    @property
    def waiting(self) -> list[int]:
        return sorted(rank for _, ranks in self.calls for rank in ranks)

    @property
    def apart(self) -> list[int]:
        """Of a mismatch, the ranks in other collectives than most, where there is a most."""
        if self.kind != "mismatch" or len(self.calls[0][1]) == len(self.calls[1][1]):
            return []
        return sorted(rank for _, ranks in self.calls[1:] for rank in ranks)

    def __str__(self) -> str:
        call, ranks = self.calls[0]
        where = f"collective {self.number} of {self.group}"
        if self.kind == "missing":
            return f"{named(self.missing)} missing from {where}, {call}: {named(ranks)} in it"
        if self.kind == "inside":
            return f"{where}, {call}: all of {named(ranks)} in it, and it does not end"
        entered = "; ".join(f"{named(ranks)} in {call}" for call, ranks in self.calls)
        return f"{where} is not the same on all ranks: {entered}"


@dataclass(frozen=True)
class Comparison:
    """What records say together; `culprits` are the ranks to look at first, those that others wait
    for and that wait for nobody.
    """

    findings: list[Divergence]
    culprits: list[int]
    words: list[str]


def compare(records: Mapping[int, FlightRecord]) -> Comparison:
    """Find the collectives that the ranks of `records` do not complete together.

    A group's member that is not in `records` counts as one that others wait for, where they wait.
    """
    calls_of: dict[Group, dict[int, Calls]] = {}
    members_of: dict[str, set[int]] = {}
    for rank, record in sorted(records.items()):
        for group, calls in record.calls.items():
            calls_of.setdefault(group, {})[rank] = calls
        for name, said in record.members.items():
            if name not in members_of:  # all of them say the same
                members_of[name] = set(said)
    # A backend that never says "done" says nothing by it.
    tells = {
        group.backend
        for group, ranks in calls_of.items()
        if any(call.done for calls in ranks.values() for call in calls.values())
    }
    findings = []
    for group, ranks in sorted(calls_of.items()):
        members = members_of.get(group.name, set())
        last = _last_numbers(ranks, members, records, group.backend in tells)
        finding = _mismatch(group, ranks) or _gap(group, ranks, last, group.backend in tells)
        findings += [] if finding is None else [finding]
    culprits = _culprits(findings)
    findings.sort(key=lambda finding: not {*finding.missing, *finding.apart} & {*culprits})
    return Comparison(findings, culprits, _format_divergences(findings, culprits, records))


def _last_numbers(
    calls: Mapping[int, Calls],
    members: set[int],
    records: Mapping[int, FlightRecord],
    tells_done: bool,
) -> dict[int, int]:
    """The number of the collective that each member of a group has entered last.

    A rank that remembers none of it has entered none, if it remembers everything. Else, and of one
    without a record, it is taken to have entered all but what the others still wait in.
    """
    waited = [n for of in calls.values() for n, call in of.items() if tells_done and not call.done]
    last = {rank: max(numbered) for rank, numbered in calls.items()}
    for rank in members - last.keys():
        if rank in records and records[rank].is_whole:
            last[rank] = 0
        elif waited:
            last[rank] = min(waited) - 1
    return last


def _gap(
    group: Group, calls: Mapping[int, Calls], last: Mapping[int, int], tells_done: bool
) -> Divergence | None:
    """The first collective that not all have entered; else the last, where it does not end."""
    behind = min(last.values())
    if behind == max(last.values()):
        entered = _entered(calls, behind)
        waits = any(not call.done for call, _ in entered)
        return Divergence("inside", group, behind, entered, []) if waits and tells_done else None
    number = behind + 1
    entered = _entered(calls, number)
    # A broadcast's source may be long gone: nobody waits in what is done.
    if not entered or (tells_done and all(call.done for call, _ in entered)):
        return None
    return Divergence(
        "missing", group, number, entered, sorted(r for r in last if last[r] == behind)
    )


def _entered(calls: Mapping[int, Calls], number: int) -> list[tuple[Call, list[int]]]:
    """The different calls of that number with their ranks, the most frequent first."""
    ranks_of: dict[Call, list[int]] = {}
    for rank, numbered in calls.items():
        if number in numbered:
            ranks_of.setdefault(numbered[number], []).append(rank)
    return sorted(ranks_of.items(), key=lambda item: -len(item[1]))


# Elsewhere ranks may rightly differ: the root of a gather, the parts of an all-to-all.
_SAME_SIZES: Final = re.compile(r"all_?reduce|_?reduce|broadcast|_?all_?gather")


def _mismatch(group: Group, calls: Mapping[int, Calls]) -> Divergence | None:
    """The first collective that is another one on some rank."""
    frontier = min(max(numbered) for numbered in calls.values())
    for number in sorted({number for numbered in calls.values() for number in numbered}):
        entered = _entered(calls, number)
        is_open = number >= frontier and any(not call.done for call, _ in entered)
        alike: dict[Any, list[tuple[Call, list[int]]]] = {}
        for call, ranks in entered:
            # Sizes of what was passed were right: NCCL gathers uneven ones by broadcasts.
            compared = is_open and _SAME_SIZES.match(call.op)
            size = sum(map(prod, call.sizes)) if compared else None
            alike.setdefault((call.op, size), []).append((call, ranks))
        if len(alike) > 1:
            merged = [
                (same[0][0], sorted(rank for _, ranks in same for rank in ranks))
                for same in alike.values()
            ]
            merged.sort(key=lambda item: -len(item[1]))
            return Divergence("mismatch", group, number, merged, [])
    return None


def _culprits(findings: Sequence[Divergence]) -> list[int]:
    """Of a mismatch the ranks apart from most; else those that wait for nobody."""
    apart = {rank for finding in findings for rank in finding.apart}
    missing = {rank for finding in findings for rank in finding.missing}
    # Not those of "inside": a call that is not yet waited for may stand there, too.
    waiting = {
        rank for finding in findings if finding.kind == "missing" for rank in finding.waiting
    }
    return sorted(apart or missing - waiting)


def _format_divergences(
    findings: Sequence[Divergence], culprits: Sequence[int], records: Mapping[int, FlightRecord]
) -> list[str]:
    words = [f"{named(culprits)} the first to look at"] if culprits else []
    words += [str(finding) for finding in findings[:_MOST_NAMED]]
    if len(findings) > _MOST_NAMED:
        words.append(f"and {len(findings) - _MOST_NAMED} more such collectives")
    missing = {rank for finding in findings for rank in finding.missing}
    if missing and not culprits:
        words.append(
            f"{named(sorted(missing))} waiting for one another: they enter their collectives in "
            "different orders"
        )
    waits = [
        f"rank {rank} waits in {call}"
        for rank, record in sorted(records.items())
        for call in record.waits_p2p
    ]
    words += waits[:_MOST_NAMED]
    if not words:
        words.append("no rank waits in a collective for another")
    return words


def named(ranks: Sequence[int]) -> str:
    """`rank 1 is`, `ranks 0, 2-5 are`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]} is"
    spans = int_ranges(ranks)
    shown = ", ".join(spans[:_MOST_NAMED])
    rest = f", … ({len(ranks)} in all)" if len(spans) > _MOST_NAMED else ""
    return f"ranks {shown}{rest} are"


def main(arguments: list[str]) -> int:
    """Compare the files named; returns 0."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m largebatch.launch.watch.flight_recorder FILE …", file=sys.stderr)
        return 2
    try:
        records = {record.rank: record for record in map(read, map(Path, arguments))}
    except (OSError, ValueError) as error:
        print(f"largebatch: {error}", file=sys.stderr)
        return 2
    print("\n".join(compare(records).words))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
