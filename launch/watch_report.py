"""Where the ranks of a run stand: their answers compared, and said in words."""

import json
import linecache
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from largebatch.launch.flight_recorder import Comparison, compare, named
from largebatch.launch.flight_records import Record, record_of
from largebatch.train.record import write_whole

_MOST_PLACES: Final = 6
_LINES: Final = 3


@dataclass(frozen=True)
class Answer:
    """What of a rank's answer is kept: those of 98,304 ranks are held together.

    Attributes:
        place: the innermost lines of its main thread.
        trouble: why it has no record.
    """

    rank: int
    size: int
    record: Record
    place: tuple[str, ...]
    trouble: str | None


Answers = Mapping[int, Answer]


def answers_in(folder: Path) -> Answers:
    """The ranks' answers by rank. Many are read at a time: a shared file system is slow at one."""
    with ThreadPoolExecutor(16) as pool:
        found = [*pool.map(_read, folder.glob("rank-*.json"))]
    return {answer.rank: answer for answer in sorted(found, key=lambda answer: answer.rank)}


def _read(path: Path) -> Answer:
    said = json.loads(path.read_text(encoding="utf-8"))
    main = said["threads"][0]["calls"] if said["threads"] else []
    record = record_of(said, said["rank"])
    return Answer(said["rank"], said["size"], record, _own_lines(main), said["trouble"])


def report(folder: Path, reason: str, beat: Mapping[str, Any] | None) -> str:
    """What the answers in a folder come to, in words; writes `report.txt` and `report.json` there.

    Args:
        reason: why they were asked for, the first line.
        beat: the run's heartbeat then.
    """
    answers = answers_in(folder)
    sizes = [answer.size for answer in answers.values()]
    silent = [
        rank
        for rank in range(max([*sizes, beat["world_size"] if beat else 0]))
        if rank not in answers
    ]
    comparison = compare({rank: answer.record for rank, answer in answers.items()})
    places = _places(answers, comparison.culprits)
    words = [reason, *_words(answers, silent, comparison)]
    for ranks, lines in places[:_MOST_PLACES]:
        words += [f"{named(ranks)} at"] + [f"    {line}" for line in lines]
    write_whole(folder / "report.txt", "\n".join(words) + "\n")
    found = {
        "reason": reason,
        "heartbeat": beat,
        "culprits": comparison.culprits,
        "silent": silent,
        "findings": [asdict(finding) for finding in comparison.findings],
        "places": [{"ranks": ranks, "lines": lines} for ranks, lines in places],
    }
    write_whole(folder / "report.json", json.dumps(found, indent=1) + "\n")
    return "\n".join(words)


def _words(answers: Answers, silent: list[int], comparison: Comparison) -> list[str]:
    if not answers:
        return ["no rank has answered: its processes are gone, stopped, or have not begun the run"]
    words = []
    if silent:
        words.append(
            f"{named(silent)} silent: gone, stopped, or in C code that keeps Python's lock "
            "(kill -USR1 prints the stacks there)"
        )
    troubles = {answer.trouble for answer in answers.values() if answer.trouble}
    if any(answer.record.calls for answer in answers.values()) or not troubles:
        words += comparison.words
    return words + sorted(troubles)


def _places(answers: Answers, first: list[int]) -> list[tuple[list[int], tuple[str, ...]]]:
    """Where the main threads stand, with the ranks that stand there: `first` ones first, then the
    places with the fewest ranks, which are those out of the way.
    """
    ranks_at: dict[tuple[str, ...], list[int]] = {}
    for rank, answer in answers.items():
        ranks_at.setdefault(answer.place, []).append(rank)
    places = [(ranks, lines) for lines, ranks in ranks_at.items()]
    return sorted(places, key=lambda place: (not {*place[0]} & {*first}, len(place[0])))


def _own_lines(calls: list[list[Any]]) -> tuple[str, ...]:
    """The innermost lines of the user's or of this project, the innermost first; where there are
    none, the innermost of all.
    """
    own = [call for call in calls if _is_own(call[0])] or calls[-1:]
    return tuple(
        f"{file}:{line} in {function}: {linecache.getline(file, line).strip()}".removesuffix(": ")
        for file, line, function in own[: -_LINES - 1 : -1]
    )


def _is_own(file: str) -> bool:
    """Whether a source file is the user's or of this project, and not of Python or of a package."""
    *_, below = re.split(r"/(?:site|dist)-packages/", file)
    if below != file:  # an environment may lie in a checkout that is itself called largebatch
        return below.startswith("largebatch/")
    return not re.search(r"^<|/lib(64)?/python3\.", file)
