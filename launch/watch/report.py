"""Where the ranks of a run stand: their answers compared, and said in words."""

import json
import linecache
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from largebatch.common.files import write_whole
from largebatch.launch.watch.flight_recorder import Comparison, compare, named
from largebatch.launch.watch.flight_records import FlightRecord, record_of
from largebatch.records import RecordError, printable, read_fields
from largebatch.records.fields import listing, must_be, optional, text, whole
from largebatch.records.heartbeat import Beat
from largebatch.records.names import MOST_RANKS

_MOST_PLACES: Final = 6
_LINES: Final = 3


@dataclass(frozen=True)
class Answer:
    """What of a rank's answer is kept, as those of 98,304 ranks are held together: `place` are the
    innermost lines of its main thread, `trouble` is why it has no record.
    """

    rank: int
    size: int
    record: FlightRecord
    place: tuple[str, ...]
    trouble: str | None


Answers = dict[int, Answer]
Place = tuple[str, int, str]
"""File, line and function."""


def answers_in(folder: Path, problems: list[str]) -> Answers:
    """The ranks' answers by rank; what is none is noted. Many are read at a time: a shared file
    system is slow at one.
    """
    with ThreadPoolExecutor(16) as pool:
        read = [*pool.map(_read, sorted(folder.glob("rank-*.json")))]
    found = [answer for answer in read if isinstance(answer, Answer)]
    problems += [problem for problem in read if isinstance(problem, str)]
    return {answer.rank: answer for answer in sorted(found, key=lambda answer: answer.rank)}


def _read(path: Path) -> Answer | str:
    try:
        said = read_fields(path)
        rank = said.take("rank", whole(0, MOST_RANKS - 1))
        threads = [*said.each("threads")]
        main = [_place(call) for call in threads[0].take("calls", listing)] if threads else []
        return Answer(
            rank,
            said.take("size", whole(1, MOST_RANKS)),
            record_of(said.values, rank, said.where),
            _own_lines(main),
            said.take("trouble", optional(text)),
        )
    except (OSError, RecordError) as error:
        return str(error)
    except ValueError as error:
        return f"{path}: a call {error}"


def _place(call: Any) -> Place:
    kinds = [type(part) for part in call] if isinstance(call, list) else []
    if kinds not in ([str, int, str], [str, type(None), str]):
        raise must_be("a file, a line and a function", call)
    file, line, function = call
    return file, line or 0, function


def report(folder: Path, reason: str, beat: Beat | None) -> str:
    """Summarize the answers in a folder as text, below `reason`, why they were asked for; write
    `report.txt` and `report.json` there, with `beat`, the run's heartbeat then.
    """
    problems: list[str] = []
    answers = answers_in(folder, problems)
    size = max([(beat and beat.world_size) or 0, *(answer.size for answer in answers.values())])
    silent = [rank for rank in range(size) if rank not in answers]
    comparison = compare({rank: answer.record for rank, answer in answers.items()})
    places = _places(answers, comparison.culprits)
    words = [reason, *problems, *_words(answers, silent, comparison)]
    for ranks, lines in places[:_MOST_PLACES]:
        words += [f"{named(ranks)} at"] + [f"    {line}" for line in lines]
    report_text = "\n".join(map(printable, words))
    write_whole(folder / "report.txt", report_text + "\n")
    found = {
        "reason": reason,
        "heartbeat": beat and asdict(beat),
        "culprits": comparison.culprits,
        "silent": silent,
        "findings": [asdict(finding) for finding in comparison.findings],
        "places": [{"ranks": ranks, "lines": lines} for ranks, lines in places],
    }
    write_whole(folder / "report.json", json.dumps(found, indent=1) + "\n")
    return report_text


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


def _own_lines(calls: list[Place]) -> tuple[str, ...]:
    """The innermost lines of the user's or of this project, the innermost first; where there are
    none, the innermost of all.
    """
    own = [call for call in calls if _is_own(call[0])] or calls[-1:]
    return tuple(
        f"{file}:{line} in {function}: {_source(file, line)}".removesuffix(": ")
        for file, line, function in own[: -_LINES - 1 : -1]
    )


def _source(file: str, line: int) -> str:
    """A line of Python; nothing of what is no such file, as an answer may name any."""
    try:
        if Path(file).suffix == ".py" and Path(file).is_file():
            return linecache.getline(file, line).strip()
    except ValueError:  # a name that no file can have
        pass
    return ""


def _is_own(file: str) -> bool:
    """Whether a source file is the user's or of this project, and not of Python or of a package."""
    *_, below = re.split(r"/(?:site|dist)-packages/", file)
    if below != file:  # an environment may lie in a checkout that is itself called largebatch
        return below.startswith("largebatch/")
    return not re.search(r"^<|/lib(64)?/python3\.", file)
