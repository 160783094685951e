"""Which rank held the others up: from what `largebatch watch` heard when a run stood still."""

from pathlib import Path
from typing import Any, Final

from largebatch.launch.explain_causes import Cause
from largebatch.launch.run_times import read_json, read_json_lines
from largebatch.train.record import METRICS

WATCH: Final = "watch"
STANDS_STILL: Final = "stands still"
MOST_NAMED: Final = 8


def read_reports(run: Path) -> list[Cause]:
    """The last time that the run stood still; one that was asked where it stands did not."""
    reports = [(path, read_json(path)) for path in sorted((run / WATCH).glob("*/report.json"))]
    still = [(path, held) for path, held in reports if STANDS_STILL in str(held.get("reason"))]
    if not still:
        return []
    path, held = still[-1]
    lines = read_json_lines(run / METRICS)
    last = lines[-1][1].get("step", 0) if lines else 0
    then = (held.get("heartbeat") or {}).get("step", 0)
    went_on = last > then
    name = str(path.relative_to(run))
    suspects = [*held.get("culprits", [])] or [*held.get("silent", [])]
    hosts = _hosts(path.parent, suspects)
    evidence = [f"{name}: {held.get('reason')}"]
    evidence += [f"{name}: {_in_words(finding)}" for finding in held.get("findings", [])]
    evidence += [
        f"{name}: {_ranks(place['ranks'])} at {place['lines'][0]}"
        for place in held.get("places", [])
        if place.get("lines") and (set(place["ranks"]) & set(suspects) or not suspects)
    ]
    after = " It has gone on since." if went_on else ""
    nodes = tuple(dict.fromkeys(hosts.values()))
    return [
        Cause(
            60 if went_on else 100,
            f"{_who(held, suspects, hosts)}{after}",
            "look at the place in the code that these ranks stand at: if only they go that way, a "
            "collective is missing there; if their node stands out below, leave it out of the next "
            "job; resume=auto goes on from the last checkpoint",
            tuple(evidence),
            nodes,
        )
    ]


def _who(held: dict[str, Any], suspects: list[int], hosts: dict[int, str]) -> str:
    where = f" (on {', '.join(dict.fromkeys(hosts.values()))})" if hosts else ""
    missing = [f for f in held.get("findings", []) if f.get("kind") == "missing"]
    mismatch = [f for f in held.get("findings", []) if f.get("kind") == "mismatch"]
    inside = [f for f in held.get("findings", []) if f.get("kind") == "inside"]
    if held.get("culprits") and missing:
        finding = missing[0]
        waiting = [rank for _, ranks in finding["calls"] for rank in ranks]
        return (
            f"The run stood still: {_ranks(suspects)}{where} never entered collective "
            f"{finding['number']}, {_call(finding)}; {_ranks(waiting)} waited in it."
        )
    if mismatch:
        return (
            f"The run stood still: ranks entered different collectives as number "
            f"{mismatch[0]['number']}; {_ranks(suspects)}{where} apart from the others."
        )
    if held.get("silent"):
        return f"The run stood still: {_ranks(held['silent'])}{where} gave no answer when asked."
    if inside:
        return (
            f"The run stood still inside collective {inside[0]['number']}, {_call(inside[0])}, "
            "which every rank had entered: the network or its library did not end it."
        )
    return "The run stood still, and no rank waited for another in a collective."


def _call(finding: dict[str, Any]) -> str:
    """`allreduce [[10]]` of the first call; written as a list of its fields."""
    call = finding["calls"][0][0]
    op, sizes = (call["op"], call["sizes"]) if isinstance(call, dict) else call[:2]
    return f"{op} {' '.join(str(size) for size in sizes)}".strip()


def _in_words(finding: dict[str, Any]) -> str:
    entered = "; ".join(f"{_ranks(ranks)} in it" for _, ranks in finding["calls"])
    missing = f"; {_ranks(finding['missing'])} missing" if finding.get("missing") else ""
    return f"collective {finding['number']}, {_call(finding)}: {entered}{missing}"


def _hosts(folder: Path, ranks: list[int]) -> dict[int, str]:
    """Nodes of the ranks that answered, by their short names."""
    answers = {rank: read_json(folder / f"rank-{rank}.json") for rank in ranks}
    return {
        rank: str(answer["host"]).partition(".")[0]
        for rank, answer in answers.items()
        if "host" in answer
    }


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:MOST_NAMED]))
    more = f" and {len(ranks) - MOST_NAMED} more" if len(ranks) > MOST_NAMED else ""
    return f"rank{'s' * (len(ranks) != 1)} {shown}{more}"
