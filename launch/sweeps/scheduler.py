"""Conducts a sweep: begins trials where there is room, retries what failed, stops in time.

Who runs a trial is a `Backend` (a device, a slice of nodes, a job of its own); everything that is
decided is decided here, and is in the sweep's record before it happens.
"""

import math
import signal
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from largebatch.common.progress import BarOrLines, time_left
from largebatch.common.signals import on_stop_signal
from largebatch.common.text import LineField, common_words
from largebatch.launch.sweeps.backend import Attempt, Backend, Ended
from largebatch.launch.sweeps.record import (
    SweepRecord,
    Trial,
    is_busy,
    samples_of,
    summary_of,
)
from largebatch.launch.sweeps.settings import SweepSettings
from largebatch.records.outcomes import ExitCode
from largebatch.records.summary import line_of_sweep

STRIKES: Final = 2


@dataclass
class Outcome:
    """What a trial came to: a summary, or why it has none."""

    status: str
    summary: dict[str, Any] | None = None
    why: str = ""


class SweepProgress(BarOrLines):
    """A bar on a terminal, else a line every tenth of the way. Silent within a study, which has its
    own; what has to be said is said in any case.
    """

    def __init__(self, num_trials: int, silent: bool, console: Console | None = None) -> None:
        console = console or Console(stderr=True, soft_wrap=True)
        super().__init__(console, math.inf if silent else 0.0)
        self._num_trials, self._silent = num_trials, silent
        self._begin = time.monotonic()
        self._found: int | None = None

    def show(self, *, done: int, running: int, failed: int, nodes_out: int) -> None:
        """Bring the display up to date."""
        if self._found is None:  # what was there before says nothing of the pace
            self._found = done
        parts = [
            LineField(f"{done} of {self._num_trials} trials done", 4),
            LineField(f"{running} running", 0),
            LineField(f"{failed} failed", 2),
        ]
        parts += [LineField(f"{nodes_out} nodes left out", 1)] if nodes_out else []
        made, left = done - self._found, self._num_trials - done
        if made > 0 and left > 0:
            parts.append(LineField(time_left(time.monotonic() - self._begin, made, left), 3))
        self.update(done / self._num_trials, parts)

    def result(
        self, done: int, words: Sequence[str], summary: dict[str, Any], folder: Path
    ) -> None:
        """Say how a trial has ended, above the bar."""
        if not self._silent:
            width = self.console.width if self.console.is_terminal else None
            self.tell(line_of_sweep(done, self._num_trials, words, summary, folder, width))

    def tell(self, sentence: str) -> None:
        """Say something above the bar."""
        self.console.print(sentence, highlight=False, markup=False)


@dataclass
class NodeHealth:
    """Failures by trial and by node, and so the nodes that a sweep leaves out.

    A trial fails because of itself or because of its node, and at first nobody can tell. It is
    begun again on other nodes: if it succeeds there, its first nodes were at fault; if it fails
    there too, it is the trial's own, and the nodes are forgiven. Until then a node with two such
    questions open gets no new trial, so that a broken node does not eat the whole queue, nor a
    broken trial the whole allocation. A node that is at fault twice is left out, for as long as the
    sweep's process lasts: the next job's nodes are others, and what looks like a broken node may be
    a broken environment.
    """

    faults: Counter[str] = field(default_factory=Counter)
    left_out: set[str] = field(default_factory=set)
    doubts: dict[str, list[str]] = field(default_factory=dict)
    """By trial that has failed and may still succeed, the nodes it failed on."""

    def record_failure(self, trial: str, nodes: Iterable[str]) -> None:
        """The trial failed on the nodes."""
        self.doubts.setdefault(trial, []).extend(nodes)

    def record_dead(self, node: str) -> None:
        """A node that does not even start a trivial command: a fault beside that of its trial."""
        self.faults[node] += STRIKES

    def record_success(self, trial: str, nodes: Iterable[str]) -> None:
        """The trial has ended well on the nodes: where it failed before, others were at fault."""
        good = set(nodes)
        self.faults.update(set(self.doubts.pop(trial, ())) - good)

    def forgive(self, trial: str) -> None:
        """The trial has failed too often."""
        self.doubts.pop(trial, None)

    def newly_left_out(self) -> set[str]:
        """Nodes to leave out that were not by now."""
        out = {node for node, faults in self.faults.items() if faults >= STRIKES}
        new = out - self.left_out
        self.left_out |= new
        return new

    @property
    def doubtful(self) -> set[str]:
        """Nodes that should wait for the answer."""
        open_questions = Counter(node for nodes in self.doubts.values() for node in set(nodes))
        return {
            node for node, doubts in open_questions.items() if doubts + self.faults[node] >= STRIKES
        }


@dataclass
class TrialScheduler:
    """One batch of trials; `end` is this job's, in seconds since the epoch."""

    trials: Sequence[Trial]
    backend: Backend
    record: SweepRecord
    health: NodeHealth
    settings: SweepSettings
    end: float | None
    progress: SweepProgress

    def __post_init__(self) -> None:
        self.outcomes: dict[str, Outcome] = {}
        common = common_words([trial.words for trial in self.trials])
        self._own_words = {
            trial.name: [word for word in trial.words if word not in common]
            for trial in self.trials
        }
        self._waiting: deque[Trial] = deque()
        self._running: dict[str, Attempt] = {}
        self._failures: dict[str, int] = {}
        self._reached: dict[str, int] = {}
        self._told: set[str] = set()
        self._avoid: dict[str, set[str]] = {}
        self._begin = time.time()
        self._signal: int | None = None
        self._stopping: str | None = None

    def run(self) -> dict[str, Outcome]:
        """Every trial's outcome; of those that were stopped there is none."""
        for trial in self.trials:
            self._pass_by_or_queue(trial)
        with on_stop_signal(self._note), self.progress:
            while self._waiting or self._running:
                for ended in self.backend.ended():
                    self._take(ended)
                self._stop_if_it_is_time()
                if self._stopping is None:
                    self._begin_what_can()
                elif self.backend.outlives or not self._running:
                    break
                self._show()
                if self._waiting or self._running:
                    time.sleep(self.settings.poll_seconds)
            self._show()
        if self._stopping is not None and len(self.outcomes) < len(self.trials):
            self._tell(
                f"stopped, {self._stopping}: {len(self.outcomes)} of {len(self.trials)} trials "
                "have ended; the same command resumes the sweep"
            )
        return self.outcomes

    def _pass_by_or_queue(self, trial: Trial) -> None:
        self.record.check_same(trial)
        if self._has_ended(trial):
            return
        job = self.record.jobs.get(trial.name)
        if job is not None:
            attempt = Attempt(trial, self.record.attempts[trial.name])
            if self.backend.adopt(attempt, job):
                self._running[trial.name] = attempt
                return
        self._waiting.append(trial)

    def _has_ended(self, trial: Trial) -> bool:
        """Whether the trial's folder says so, whoever made it."""
        summary = summary_of(trial.folder)
        if summary is not None:
            self.outcomes[trial.name] = Outcome(str(summary["status"]), summary)
        return summary is not None

    def _begin_what_can(self) -> None:
        if self.backend.is_spent():
            self._give_up()
            return
        busy: list[Trial] = []
        while self._waiting:
            trial = self._waiting.popleft()
            if is_busy(trial.folder):  # of a sweep that was killed, and about to end
                self._tell_once(f"trial {trial.name} waits: another process is at work on it")
                busy.append(trial)
            elif self._has_ended(trial):
                continue
            elif not (self._can_end() and self._begin_one(trial)):
                self._waiting.appendleft(trial)
                break
        self._waiting.extendleft(reversed(busy))
        if self._waiting and not self._can_end() and not self._running:
            self._stopping = "as no further trial would end in time"

    def _begin_one(self, trial: Trial) -> bool:
        # Other nodes, and none that is in doubt, as far as there are others.
        all_nodes = self.backend.nodes()
        avoid = self._avoid.get(trial.name, set()) & all_nodes
        for unwanted in (avoid | (self.health.doubtful & all_nodes), avoid):
            if unwanted < all_nodes or not unwanted:
                avoid = unwanted
                break
        else:
            avoid = set()
        nodes = self.backend.room(frozenset(avoid))
        if nodes is None:
            return False
        attempt = Attempt(trial, self.record.attempts.get(trial.name, 0) + 1, nodes)
        trial.folder.mkdir(parents=True, exist_ok=True)
        self.record.write(
            "begun", trial=trial.name, attempt=attempt.number, nodes=nodes, words=list(trial.words)
        )
        self.backend.begin(attempt)
        self._running[trial.name] = attempt
        return True

    def _take(self, ended: Ended) -> None:
        attempt, trial = ended.attempt, ended.attempt.trial
        del self._running[trial.name]
        outcome = self._outcome(ended)
        self.record.write(
            "ended", trial=trial.name, attempt=attempt.number, nodes=attempt.nodes,
            outcome=outcome.status, code=ended.code, resumed=attempt.number > 1,
            seconds=round(time.monotonic() - attempt.began, 3),
        )  # fmt: skip
        if outcome.status == "refused":
            self._tell(f"trial {trial.name} refused: {outcome.why}")
        if outcome.summary is not None or outcome.status == "refused":
            self.outcomes[trial.name] = outcome
            if outcome.summary is not None:
                self.health.record_success(trial.name, attempt.nodes)
                own = self._own_words[trial.name]
                self.progress.result(len(self.outcomes), own, outcome.summary, trial.folder)
        elif self._stopping is not None:
            self._waiting.append(trial)
        elif outcome.status == "interrupted" and self._got_further(trial):
            # Its job's walltime, or a node that others of its slice died with: not its failure.
            self._look_for_the_dead(attempt)
            self._waiting.appendleft(trial)
        else:
            self._failed(attempt, outcome)
        self._leave_out()

    def _outcome(self, ended: Ended) -> Outcome:
        summary = summary_of(ended.attempt.trial.folder)
        if summary is not None:
            return Outcome(str(summary["status"]), summary)
        log = ended.attempt.file("log")
        if ended.code == ExitCode.REFUSED:
            return Outcome("refused", why=_last_words(log))
        interrupted = samples_of(ended.attempt.trial.folder) is not None
        status = "interrupted" if interrupted or self._stopping is not None else "failed"
        return Outcome(status, why=f"exit code {ended.code}, see {log}")

    def _got_further(self, trial: Trial) -> bool:
        """Whether a trial that was interrupted has made progress since it was the last time."""
        before, now = self._reached.get(trial.name, -1), samples_of(trial.folder)
        self._reached[trial.name] = now or 0
        return now is not None and now > before

    def _look_for_the_dead(self, attempt: Attempt) -> set[str]:
        """Those of an attempt's nodes that start nothing any more."""
        dead = {node for node in attempt.nodes if self.backend.is_dead(node)}
        for node in dead:
            self.health.record_dead(node)
        return dead

    def _failed(self, attempt: Attempt, outcome: Outcome) -> None:
        trial = attempt.trial
        dead = self._look_for_the_dead(attempt)
        if not dead:
            self.health.record_failure(trial.name, attempt.nodes)
        self._failures[trial.name] = self._failures.get(trial.name, 0) + 1
        where = f" on {', '.join(attempt.nodes)}" if attempt.nodes else ""
        if self._failures[trial.name] > self.settings.retries:
            self.health.forgive(trial.name)
            self.outcomes[trial.name] = outcome
            self._tell(f"trial {trial.name} failed{where} ({outcome.why}): no retry is left")
            return
        self._avoid.setdefault(trial.name, set()).update(dead or attempt.nodes)
        self._waiting.appendleft(trial)
        self._tell(f"trial {trial.name} failed{where} ({outcome.why}): it is begun again")

    def _leave_out(self) -> None:
        new = self.health.newly_left_out()
        for node in sorted(new):
            self.record.write("left_out", node=node)
            self._tell(f"node {node} is left out: it failed twice")
        if new:
            self.backend.leave_out(new)

    def _give_up(self) -> None:
        why = (
            f"too few nodes are left, after {', '.join(sorted(self.health.left_out))} failed twice"
        )
        for trial in self._waiting:
            self.outcomes[trial.name] = Outcome("failed", why=why)
        self._waiting.clear()

    def _can_end(self) -> bool:
        """Whether a trial that is begun now would end in time; one that is longer than the whole
        job has to be made in parts, and may begin whenever.
        """
        if self.end is None:
            return True
        stop = self.end - self.settings.stop_before_walltime
        needs = float(self.settings.trial_seconds or 0.0)
        if self.settings.trial_seconds is None:
            needs = max(self.record.seconds, default=0.0)
        return time.time() + needs <= stop or bool(self._begin + needs > stop > time.time())

    def _stop_if_it_is_time(self) -> None:
        now = time.time()
        if self._stopping is None:
            if self._signal is not None:
                self._stopping = f"by {signal.Signals(self._signal).name}"
            elif self.end is not None and now >= self.end - self.settings.stop_before_walltime:
                self._stopping = f"{max(0, round(self.end - now))} s before the walltime"
            else:
                return
            self._signal = None
            # Soon enough for the record to be closed before the walltime.
            stop_before = self.settings.stop_before_walltime
            self._kill_at = now + max(0.8 * stop_before, stop_before - 30.0)
            self.backend.stop()
        elif self._running and (self._signal is not None or now >= self._kill_at):
            self.backend.kill()
            self._signal = None

    def _note(self, number: int) -> None:
        """The first signal stops the sweep, a second kills what has not ended by then."""
        self._signal = number

    def _show(self) -> None:
        self.progress.show(
            done=len(self.outcomes),
            running=len(self._running),
            failed=sum(outcome.summary is None for outcome in self.outcomes.values()),
            nodes_out=len(self.health.left_out),
        )

    def _tell_once(self, sentence: str) -> None:
        if sentence not in self._told:
            self._told.add(sentence)
            self._tell(sentence)

    def _tell(self, sentence: str) -> None:
        self.progress.tell(f"largebatch: {sentence}")


def _last_words(log: Path) -> str:
    """What a refused trial has said."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return "it said nothing"
    said = [line for line in lines if line.startswith("largebatch: ")]
    return (said or lines or ["it said nothing"])[-1].removeprefix("largebatch: ")
