"""How a run ended, and what it says of that itself: summary, heartbeat, events of the guard."""

import signal
from pathlib import Path
from typing import Any, Final

from largebatch.launch.explain_causes import Cause
from largebatch.launch.nic_report import clock
from largebatch.launch.run_times import HEARTBEAT, read_json, read_json_lines
from largebatch.launch.watch_progress import is_gone
from largebatch.train.record import METRICS, SUMMARY

EVENTS: Final = "events.jsonl"
QUIET_SECONDS: Final = 120.0
QUIET_STEPS: Final = 20.0
"""A run without a summary is taken for alive for so long after its last heartbeat: seconds, or
times its seconds a step."""


def ending(run: Path, now: float) -> str:
    """One sentence on where the run stands."""
    summary, beat = read_json(run / SUMMARY), read_json(run / HEARTBEAT)
    if summary:
        return (
            f"{run}: {summary.get('status')} after {summary.get('steps')} steps, "
            f"{summary.get('samples')} samples, {summary.get('seconds')} s"
        )
    if not beat:
        return f"{run}: neither a summary nor a heartbeat"
    state = "running" if is_alive(run, beat, now) else "no summary, and no sign of life"
    return f"{run}: {state}; at step {beat.get('step')} {clock(beat.get('time', 0.0))}"


def is_alive(run: Path, beat: dict[str, Any], now: float) -> bool:
    """Whether it may run still: its last heartbeat is too young to say that it does not."""
    if is_gone(beat):
        return False
    lines = [line for _, line in read_json_lines(run / METRICS)]
    each = lines[-1]["seconds"] / lines[-1]["step"] if lines and lines[-1].get("step") else 0.0
    return bool(now - beat.get("time", 0.0) < max(QUIET_SECONDS, QUIET_STEPS * each))


def read_run(run: Path, now: float) -> list[Cause]:
    """What summary, heartbeat and events tell."""
    summary, beat = read_json(run / SUMMARY), read_json(run / HEARTBEAT)
    found = _of_summary(run, summary) if summary else _of_heartbeat(run, beat, now)
    return found + _of_events(run)


def _of_summary(run: Path, summary: dict[str, Any]) -> list[Cause]:
    status, step = summary.get("status"), summary.get("steps")
    if status == "failed":
        return [
            Cause(
                90,
                f"The run failed after step {step}: {summary.get('error')}",
                "see the traceback in the job's output; if it names a collective or a peer, "
                "another rank died first: look for the first of all messages",
                (f"{SUMMARY}: {summary.get('error')}",),
            )
        ]
    if status == "diverged":
        return [_divergence(run, step, summary.get("reason"))]
    if status == "interrupted":
        number = summary.get("signal")
        name = "a signal" if number is None else signal.Signals(number).name
        return [
            Cause(
                30,
                f"The run was interrupted by {name} after step {step}: by somebody, or by the end "
                "of the job's time.",
                "the same command with resume=auto goes on, where checkpoint.every_samples was set",
                (f"{SUMMARY}: status interrupted",),
            )
        ]
    return []


def _divergence(run: Path, step: Any, reason: str | None) -> Cause:
    lines = read_json_lines(run / METRICS)
    evidence = [
        f"{METRICS}:{number}: step {line.get('step')}, loss {line.get('loss')}, grad_norm "
        f"{line.get('grad_norm')}, lr {line.get('lr')}"
        for number, line in lines[-4:]
    ]
    norms = [line["grad_norm"] for _, line in lines if line.get("grad_norm") is not None]
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


def _of_heartbeat(run: Path, beat: dict[str, Any], now: float) -> list[Cause]:
    if not beat or is_alive(run, beat, now):
        return []
    at, host = beat.get("time", 0.0), beat.get("host")
    evidence = (f"{HEARTBEAT}: {clock(at)}, {_duration(now - at)} before now",)
    if beat.get("state") == "failed":
        return [
            Cause(
                70, f"Rank 0, on {host}, ended by an exception at step {beat.get('step')}.",
                "see the traceback in the job's output", evidence,
            )
        ]  # fmt: skip
    if beat.get("state") == "starting":
        what = f"The run never made a step: started by {host}, it stood still or was killed."
        do = "largebatch doctor --preflight on the same nodes checks every collective by value"
    else:
        phase = f", in {beat['phase']}" if beat.get("phase") else ""
        what = (
            f"The run stopped without a word at step {beat.get('step')}{phase}, {clock(at)}: it "
            "was killed, its node died, or it stands still in a collective."
        )
        do = (
            "if its processes are there: largebatch watch RUN --now asks every rank where it is; "
            "else look at the job's output (--log) for the first message, and resume=auto"
        )
    return [Cause(70, what, do, evidence)]


def _of_events(run: Path) -> list[Cause]:
    by_kind: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for number, event in read_json_lines(run / EVENTS):
        by_kind.setdefault(str(event.get("kind")), []).append((number, event))
    return [_of_kind(kind, events) for kind, events in by_kind.items()]


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
}  # fmt: skip


def _of_kind(kind: str, events: list[tuple[int, dict[str, Any]]]) -> Cause:
    weight, what, do = MEANINGS.get(kind, (20, f"An event of kind {kind}", "see its reason"))
    first, last = events[0][1], events[-1][1]
    times = f"{len(events)} times, " if len(events) > 1 else ""
    steps = f"at step {first.get('step')}"
    if len(events) > 1:
        steps = f"from step {first.get('step')} to {last.get('step')}"
    evidence = tuple(
        f"{EVENTS}:{number}: {_when(event)}, step {event.get('step')}: {event.get('reason')}"
        for number, event in events
    )
    return Cause(weight, f"{what}, {times}{steps}: {last.get('reason')}.", do, evidence)


def _when(event: dict[str, Any]) -> str:
    return clock(event["time"]) if isinstance(event.get("time"), (int, float)) else "no time"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 3 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
