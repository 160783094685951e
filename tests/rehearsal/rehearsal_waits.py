"""What runs on the rehearsal's device have waited for, step by step."""

from collections.abc import Container, Iterable

import pytest
import rehearsal_cells as cells
from rehearsal_device import RIGHT_TORCH, WHY_NOT
from rehearsal_runs import Outcome, Step

# A process makes many runs; on a machine that is busy with others it may take minutes.
MARKS = [pytest.mark.skipif(not RIGHT_TORCH, reason=WHY_NOT), pytest.mark.timeout(600)]


def each(argument: str, names: Iterable[str], here: Container[str]) -> pytest.MarkDecorator:
    """Names as a parameter, those not `here` in the matrix only."""
    marked = [(name, () if name in here else pytest.mark.matrix) for name in names]
    params = [pytest.param(name, marks=marks) for name, marks in marked]
    return pytest.mark.parametrize(argument, params)


METRICS, REFRESH = "train/reporting/async_metrics.py", "optim/math/decompositions.py"
# What reads whether a decomposition on the device has succeeded, and how it went.
ROOTS = ("optim/math/matrix_roots.py", "optim/kronecker/damping.py")
# One transfer to the host for all factors of a kind of number, whatever number of them.
PER_REFRESH = dict.fromkeys(cells.SECOND_ORDER, 1)


def ended(found: dict[str, Outcome], name: str, code: int = 0) -> Outcome:
    outcome = found[name]
    assert "error" not in outcome, outcome["error"]
    assert outcome["code"] == code, outcome.get("summary")
    return outcome


def steady(outcome: Outcome) -> list[Step]:
    """All steps but the first, and but those before which a line was read at once: for an
    evaluation or a save, at which the run stands still in any case."""
    steps: list[Step] = outcome["steps"][1:]
    return [step for step in steps if not any(at(line, METRICS) for _, line in step.waits)]


def at(line: str, files: str | tuple[str, ...]) -> bool:
    return line.startswith(files)


def refreshes(step: Step) -> int:
    """Waits for what is decomposed, on the host or, with CUDA's names, on the device."""
    return sum(count for (_, line), count in step.waits.items() if at(line, (REFRESH, *ROOTS)))


def largest_difference(one: Outcome, other: Outcome) -> float:
    pairs = zip(one["weights"], other["weights"], strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def table(title: str, outcomes: dict[str, Outcome]) -> str:
    """Waits of each, as the tests print them at their end."""
    head = ("", "steady step", "step with a refresh", "events a step", "first step")
    rows = [head]
    for name, outcome in outcomes.items():
        waits: dict[bool, list[int]] = {False: [], True: []}
        for step in steady(outcome):
            waits[bool(refreshes(step))].append(step.waits.total())
        events = max(step.events.total() for step in steady(outcome))
        first = outcome["steps"][0]
        uploads = sum(n for (kind, _), n in first.uploads.items() if kind == "waiting upload")
        words = [str(max(waits[due])) if waits[due] else "-" for due in (False, True)]
        rows.append((name, *words, str(events), f"{first.waits.total()}, {uploads} uploads"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(f"{t:<{w}}" for t, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([f"host waits on the rehearsal accelerator, {title}:", *lines])
