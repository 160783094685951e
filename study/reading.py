"""What a finished run says about itself: `summary.json`, read strictly and without torch.

A run folder holds `metrics.jsonl`, a line a step, written while the run lives, and `summary.json`,
written once when it ends. Only the summary is read here; a folder with the first and not the
second is an unfinished run, which is counted and named but never an error.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from largebatch.common.text import shown
from largebatch.records import RecordError, printable
from largebatch.records.names import METRICS, SUMMARY
from largebatch.records.summary import Summary, read_summary

RunSummary = Summary
MOST_TEXT = 200  # characters of a recorded value that a page shows


def read_runs(folder: Path | str) -> tuple[list[RunSummary], list[str]]:
    """All runs at any depth below `folder`, in order of path, and a sentence a problem.

    A summary that cannot be read, lacks a key or holds an impossible value is skipped and named;
    unknown keys are ignored. Raises `FileNotFoundError` where there is no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder: {root}")
    runs: list[RunSummary] = []
    problems: list[str] = []
    for path in sorted(root.rglob(SUMMARY)):
        try:
            runs.append(read_summary(path))
        except (OSError, RecordError) as error:
            problem = str(error).removeprefix(printable(f"{root}/"))
            problems.append(f"{problem}: this run is left out")
    unfinished = [
        path.parent.relative_to(root)
        for path in sorted(root.rglob(METRICS))
        if not path.with_name(SUMMARY).exists()
    ]
    if unfinished:
        first = printable(unfinished[0])
        problems.append(f"{len(unfinished)} unfinished run(s) without {SUMMARY}, first {first}")
    stopped = [run for run in runs if not run.conclusive]
    if stopped:
        kinds = Counter(run.status for run in stopped)
        listed = ", ".join(f"{count} {status}" for status, count in sorted(kinds.items()))
        first = printable(stopped[0].folder.relative_to(root))
        problems.append(f"{listed} run(s) decide nothing and were left out, first {first}")
    return runs, problems


def recorded(provenance: Sequence[Mapping[str, object]], key: str) -> list[str]:
    """The distinct values of one entry over the provenance of runs, as sorted text."""
    return sorted({_text(one[key]) for one in provenance if one.get(key) not in (None, "")})


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        shortened = ", ".join(f"{name} {entry}" for name, entry in value.items())
    elif isinstance(value, str | int | float):
        shortened = str(value)
    else:
        shortened = shown(value)
    return printable(shortened if len(shortened) <= MOST_TEXT else shortened[:MOST_TEXT] + "…")
