"""How a run ended, and what it says of that itself: summary, heartbeat, events of the guard."""

import signal
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from largebatch.common.text import shown
from largebatch.launch.diagnose.causes import Cause
from largebatch.launch.diagnose.nic.report import clock
from largebatch.launch.processes import is_stopped
from largebatch.launch.progress import is_gone, process_of
from largebatch.records import Fields, find_fields, last_fields
from largebatch.records.fields import moment, number_or_none, optional, positive, text, whole
from largebatch.records.heartbeat import Beat, find_beat
from largebatch.records.names import EVENTS, HEARTBEAT, METRICS, SUMMARY
from largebatch.records.reading import read_lines
from largebatch.records.summary import status

QUIET_SECONDS: Final = 120.0
QUIET_STEPS: Final = 20.0
"""A run without a summary is taken for alive for so long after its last heartbeat: seconds, or
times its seconds a step."""
LATE_SECONDS: Final = 10.0
"""A step that takes so long, and `QUIET_STEPS` times the usual, is late."""
MOST_KEPT: Final = 1000  # events of a kind that are kept as evidence


def ending(run: Path, now: float) -> str:
    """One sentence on where the run stands."""
    summary, beat = find_fields(run / SUMMARY, []), find_beat(run, [])
    if summary is not None:
        progress = [_or_unknown(summary.find(name, whole())) for name in ("steps", "samples")]
        seconds = _or_unknown(summary.find("seconds", number_or_none))
        state = summary.find("status", status) or "ended in a way that it does not say"
        return f"{run}: {state} after {progress[0]} steps, {progress[1]} samples, {seconds} s"
    if beat is None:
        return f"{run}: neither a summary nor a heartbeat"
    state = "running" if is_alive(run, beat, now) else "no summary, and no sign of life"
    phase = f", in {beat.phase}" if beat.phase else ""
    return f"{run}: {state}; at step {_or_unknown(beat.step)}{phase}, {_heard(beat, now)}"


def _or_unknown(value: float | None) -> str:
    return "unknown" if value is None else str(value)


def _heard(beat: Beat, now: float) -> str:
    """When a run was last heard of, and how long ago."""
    if beat.time is None:
        return "heard of at no known time"
    return f"heard of {clock(beat.time)}, {_duration(now - beat.time)} ago"


def is_alive(run: Path, beat: Beat, now: float) -> bool:
    """Whether it may run still: its last heartbeat is too young to say that it does not."""
    if is_gone(beat):
        return False
    if beat.time is None:
        return process_of(beat) is not None
    return now - beat.time < max(QUIET_SECONDS, QUIET_STEPS * (_seconds_a_step(run) or 0.0))


def _seconds_a_step(run: Path) -> float | None:
    """So far, all that is between steps included; None where no step is on record."""
    last = last_fields(run / METRICS, [])
    if last is None:
        return None
    seconds, step = last.find("seconds", positive), last.find("step", whole(1))
    return None if seconds is None or step is None else seconds / step


def read_run(run: Path, now: float, problems: list[str]) -> list[Cause]:
    """What summary, heartbeat and events tell."""
    summary, beat = find_fields(run / SUMMARY, problems), find_beat(run, problems)
    found: Iterable[Cause] = ()
    if summary is not None:
        found = _of_summary(run, summary)
    elif beat is not None:
        found = _of_life(run, beat, now) if is_alive(run, beat, now) else [_of_silence(beat, now)]
    return [*found, *_of_events(run, problems)]


def _of_summary(run: Path, summary: Fields) -> Iterator[Cause]:
    for name in ("samples", "seconds"):  # are shown by `ending`; what is wrong with them is noted
        summary.find(name, number_or_none)
    ended, step = summary.find("status", status), _or_unknown(summary.find("steps", whole()))
    if ended == "failed":
        error = summary.find("error", text)
        yield Cause(
            90,
            f"The run failed after step {step}: {error}",
            "see the traceback in the job's output; if it names a collective or a peer, another "
            "rank died first: look for the first of all messages",
            (f"{SUMMARY}: {error}",),
        )
    if ended == "diverged":
        yield _divergence(run, step, summary.find("reason", text))
    if ended == "interrupted":
        number = summary.find("signal", whole(1))
        why = summary.find("reason", optional(text))
        name = "a signal" if number is None else _signal_name(number)
        cause = f" by {name} after step {step}: by somebody, or by the end of the job's time."
        if number is None and why is not None:
            cause = f" after step {step}: {why}."
        yield Cause(
            30,
            f"The run was interrupted{cause}",
            "the same command with resume=auto resumes it, if checkpoint.every_samples was set",
            (f"{SUMMARY}: status interrupted",),
        )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # of another system, or none
        return f"signal {number}"


def _divergence(run: Path, step: str, reason: str | None) -> Cause:
    last: deque[tuple[int, Fields]] = deque(maxlen=4)
    norms = array("d")
    for number, line in read_lines(run / METRICS, []):
        last.append((number, line))
        norm = line.find("grad_norm", number_or_none)
        if norm is not None:
            norms.append(norm)
    evidence = [
        f"{METRICS}:{number}: "
        + ", ".join(
            f"{name} {shown(line.values.get(name))}" for name in ("step", "loss", "grad_norm", "lr")
        )
        for number, line in last
    ]
    grew = ""
    if len(norms) > 8:
        usual = sorted(norms[: -len(norms) // 8 or None])[len(norms) // 2]
        if usual > 0 and max(norms[-8:]) > 3 * usual:
            grew = (
                f"; the gradient's norm had grown to {max(norms[-8:]) / usual:.3g} times its median"
            )
    return Cause(
        90,
        f"The run diverged at step {step}: "
        f"{reason or 'a loss or gradient that is not finite'}{grew}.",
        "a lower learning rate or a longer warm-up (largebatch train mode=lr_find); guard.spike "
        "and guard.non_finite can skip such steps or go back; look for a broken batch in the data",
        tuple(evidence),
    )


def _of_life(run: Path, beat: Beat, now: float) -> Iterator[Cause]:
    """Of a run that may go on: a rank that is stopped, a step that does not come."""
    process, usual = process_of(beat), _seconds_a_step(run)
    if process is not None and is_stopped(process):
        yield Cause(
            80,
            f"Rank 0 is stopped (SIGSTOP, or Ctrl-Z), {_heard(beat, now)}: all wait for it.",
            f"kill -CONT {process.pid}",
            (f"process {process.pid} on {beat.host}",),
        )
        return
    late = 0.0 if beat.time is None else now - beat.time
    if beat.state != "stepping" or beat.phase or usual is None:
        return
    if late >= max(LATE_SECONDS, QUIET_STEPS * usual):
        yield Cause(
            45,
            f"No step for {_duration(late)} after step {_or_unknown(beat.step)}, where one takes "
            f"{usual:.3g} s: a rank is stopped, hangs, or waits for data.",
            "largebatch watch RUN --now asks every rank where it is",
            (f"{HEARTBEAT}: {_heard(beat, now)}",),
        )


def _of_silence(beat: Beat, now: float) -> Cause:
    heard, step = _heard(beat, now), _or_unknown(beat.step)
    evidence = (f"{HEARTBEAT}: {heard}",)
    if beat.state == "failed":
        what = f"Rank 0, on {beat.host}, ended by an exception at step {step}."
        return Cause(70, what, "see the traceback in the job's output", evidence)
    if beat.state == "starting":
        what = f"The run never made a step: started by {beat.host}, it stood still or was killed."
        do = "largebatch doctor --preflight on the same nodes checks every collective by value"
    else:
        phase = f", in {beat.phase}" if beat.phase else ""
        what = (
            f"The run stopped without a word at step {step}{phase}, {heard}: it "
            "was killed, its node died, or it hangs in a collective."
        )
        do = (
            "if its processes are there: largebatch watch RUN --now asks every rank where it is; "
            "else look at the job's output (--log) for the first message, and resume=auto"
        )
    return Cause(70, what, do, evidence)


@dataclass
class EventKind:
    """The events of one kind: how many, the steps of the first and the last, the last reason."""

    count: int = 0
    first: int | None = None
    last: int | None = None
    reason: str | None = None
    evidence: list[str] = field(default_factory=list)


def _of_events(run: Path, problems: list[str]) -> list[Cause]:
    by_kind: dict[str, EventKind] = {}
    for number, event in read_lines(run / EVENTS, problems):
        kind = by_kind.setdefault(event.find("kind", text) or "unknown", EventKind())
        step, kind.reason = event.find("step", whole()), event.find("reason", text)
        kind.first, kind.last = kind.first if kind.count else step, step
        kind.count += 1
        if kind.count <= MOST_KEPT:
            at = event.find("time", moment)
            when = "no time" if at is None else clock(at)
            kind.evidence.append(
                f"{EVENTS}:{number}: {when}, step {_or_unknown(step)}: {kind.reason}"
            )
    return [_of_kind(name, kind) for name, kind in by_kind.items()]


MEANINGS: Final = {
    "stop": (
        85, "The guard ended the run",
        "lower the learning rate, or see what the guard's bound was made from (guard.*)",
    ),
    "rollback": (
        50, "The guard took the run back to a checkpoint",
        "once is luck with a batch; again and again at growing steps is a learning rate too high",
    ),
    "skip": (
        25, "The guard skipped steps",
        "a few are harmless; many mean a learning rate too high or an overflow in low precision",
    ),
    "checkpoint_failed": (
        60, "A checkpoint could not be written",
        "look at the file system's quota and free space: the last whole checkpoint is older than "
        "you think",
    ),
    "hole": (
        30, "Lines of the record were lost before it was resumed",
        "curves and totals of this run have a hole: a copy of metrics.jsonl may hold it",
    ),
}  # fmt: skip


def _of_kind(name: str, kind: EventKind) -> Cause:
    weight, what, do = MEANINGS.get(name, (20, f"An event of kind {name}", "see its reason"))
    times = f"{kind.count} times, " if kind.count > 1 else ""
    steps = f"at step {_or_unknown(kind.first)}"
    if kind.count > 1:
        steps = f"from step {_or_unknown(kind.first)} to {_or_unknown(kind.last)}"
    more = [f"{EVENTS}: {kind.count - MOST_KEPT} more"] * (kind.count > MOST_KEPT)
    evidence = (*kind.evidence, *more)
    return Cause(weight, f"{what}, {times}{steps}: {kind.reason}.", do, evidence)


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 3 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0.0):.0f} s"  # clocks of two machines differ
