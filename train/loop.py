"""The way of a batch. Read `Loop.make_steps` first: one step from plan to record."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from largebatch.conf.config import GuardConfig
from largebatch.distributed.ranks import Ranks
from largebatch.records.step_record import StepRecord
from largebatch.schedules import BatchSplit, Plan, Point
from largebatch.train.data.randomness import seed_step
from largebatch.train.data.sampler import Sampler
from largebatch.train.engines.precision import LossScale
from largebatch.train.engines.update import GradientLimits, StepMetrics
from largebatch.train.evaluation import Evaluation
from largebatch.train.guard import Guard, GuardAction
from largebatch.train.hyperparameter_scaler import HyperparameterScaler
from largebatch.train.parts import Parts
from largebatch.train.progress import RAMP_SIGNALS, Evaluated, RunProgress
from largebatch.train.reporting.async_metrics import AsyncMetrics
from largebatch.train.reporting.reporter import NullReporter
from largebatch.train.reporting.step_clock import StepClock
from largebatch.train.reporting.trust_ratios import trust_ratios
from largebatch.train.stop_signal import Stopping
from largebatch.train.tasks import Batch

if TYPE_CHECKING:
    from largebatch.train.checkpoints.checkpoint import Checkpoints


@dataclass
class Loop:
    """One training run over a plan. The reporter is called alike on every rank, in step order.

    Attributes:
        evaluation: None: never, for plans that do not wait for it.
        reporter: takes each complete record, and what else is done.
        guard: what becomes of numbers that go wrong.
        checkpoints: where the run's state is kept between two steps, and taken from; None: nowhere.
        clip_norm: gradients of a larger L2 norm are scaled down to it.
        record_layers: put each layer's trust ratio into the records.
    """

    plan: Plan
    parts: Parts
    sampler: Sampler
    ranks: Ranks
    evaluation: Evaluation | None
    reporter: NullReporter = field(default_factory=NullReporter)
    stopping: Stopping = field(default_factory=Stopping)
    guard: Guard = field(default_factory=lambda: Guard(GuardConfig()))
    checkpoints: "Checkpoints | None" = None
    clip_norm: float | None = None
    record_layers: bool = False
    progress: RunProgress = field(default_factory=RunProgress)
    _metrics: AsyncMetrics = field(default_factory=AsyncMetrics)
    _rollback: dict[str, Any] | None = None
    """The event for which the run has to roll back."""
    _save_is_due: bool = False
    _clock: StepClock = field(default_factory=StepClock)
    _scaler: HyperparameterScaler = field(init=False)

    def __post_init__(self) -> None:
        self._scaler = HyperparameterScaler(self.plan, self.parts.optimizer, self.parts.average)

    def run(self) -> RunProgress:
        """Step until the target, the budget, an interruption, or numbers the guard stops at."""
        if self.progress.status == "reached" or self.is_spent:  # before it was resumed
            return self.progress
        self.make_steps()
        while self._rollback is not None:
            if self.roll_back(self._rollback):
                self.make_steps()
        if self.checkpoints is not None:
            if self.progress.status != "diverged":
                self.save()
            self.checkpoints.wait()
        return self.progress

    def make_steps(self) -> None:
        """Step from where the run stands until it ends, or has to roll back."""
        self._clock.start()
        self.progress.should_stop = False
        for point in self.plan.steps_from(self.progress.samples):
            batch = self.take(point)
            loss = self.parts.engine.forward_backward(self.parts.task, batch, point.batch_size)
            metrics = self.measure(point, loss)
            change = self._scaler.apply(point)
            metrics |= self.update(point.lr)
            before = self.send_off(point, metrics)
            self._metrics.annotate(**change)
            self.advance(point)
            self.meet_if_due()
            self.record(before)
            self.evaluate_if_due(point)
            self.save_if_due(point)
            if self.progress.should_stop:
                break
        last = self._metrics.flush()
        if self._rollback is None:  # else it is of a step that is undone
            self.record(self.arrived(last))

    @property
    def is_broken(self) -> bool:
        """Whether the weights are those of a step that should not have been made."""
        return self.progress.status == "diverged" or self._rollback is not None

    @property
    def has_met(self) -> bool:
        """Whether the model holds the run's weights: with outer steps, only just after one."""
        outer = self.parts.outer
        return outer is None or outer.is_due(self.progress.steps) or self.is_spent

    @property
    def is_spent(self) -> bool:
        """Whether there are no more samples to train on."""
        limit = min(self.stopping.give_up_samples or math.inf, self.plan.budget_samples)
        return self.progress.samples >= limit

    def take(self, point: Point) -> Batch:
        """This rank's share of the global batch, and the randomness of the step."""
        share = point.batch_size // self.parts.engine.data_parallel_size
        position = point.samples + self.progress.left_out
        start = position + self.ranks.rank * share
        seed_step(self.parts.engine.device, self.sampler.seed, position, self.ranks.rank)
        if self.parts.noise is not None:
            self.parts.noise.begin(self.progress.steps)
        return self.parts.task.train_batch(self.sampler.take(start, share))

    def measure(self, point: Point, loss: Tensor) -> StepMetrics:
        """The step's metrics, gradients untouched."""
        flags = self.parts.engine.flags
        reduced = {"loss": loss, "interrupted": flags[self.stopping.signal.is_due]}
        if self.checkpoints is not None:
            due = self.ranks.is_first and self.checkpoints.is_due_by_time()
            reduced["save_is_due"] = flags[due]
        if self.parts.noise is not None:
            scale = self.parts.engine.precision.loss_scale
            factor = 1.0 if scale is None else scale.value
            reduced |= self.parts.noise.parts(self.split(point), factor)
        return StepMetrics(reduced, {}, self.parts.sites.maxima())

    def split(self, point: Point) -> BatchSplit:
        """How ranks and micro-batches make up the global batch."""
        ranks = self.parts.engine.data_parallel_size
        micro = self.parts.engine.micro_batch_size(point.batch_size)
        return BatchSplit(point.batch_size, ranks, math.ceil(point.batch_size / (ranks * micro)))

    def update(self, lr: float) -> StepMetrics:
        """One optimizer step at learning rate `lr`."""
        optimizer, squares = self.parts.optimizer, dict[str, Tensor]()
        self._scaler.set_lr(lr)
        limits = GradientLimits(self.clip_norm, self.skip_above())
        average = nullcontext() if self.parts.average is None else self.parts.average.step(lr)
        with average, self.parts.sites.update(squares):
            metrics = self.parts.engine.update(optimizer, limits)
        return metrics | StepMetrics(squares, trust_ratios(optimizer, self.record_layers))

    def skip_above(self) -> float | None:
        """The gradient norm above which the next step is skipped; None: never."""
        return self.guard.threshold() if self.guard.skips else None

    def send_off(self, point: Point, metrics: StepMetrics) -> StepRecord | None:
        """Pack the step's metrics for the host; returns the record of the step before."""
        names, packed, work = self.parts.engine.over_ranks(metrics)
        split = self.split(point)
        record: StepRecord = {
            "step": self.progress.steps + 1,
            "samples": point.samples + point.batch_size,
            "lr": point.lr,
            "global_batch_size": point.batch_size,
            "micro_batch_size": self.parts.engine.micro_batch_size(point.batch_size),
            "gradient_accumulation_steps": split.gradient_accumulation_steps,
            "data_parallel_size": split.data_parallel_size,
            "step_seconds": self._clock.step(),
        }
        if self.plan.tokens_per_sample > 1:
            record["tokens"] = record["samples"] * self.plan.tokens_per_sample
        if self.guard.threshold() < math.inf:
            record["grad_norm_bound"] = self.guard.threshold()
        return self.arrived(self._metrics.push(cast(dict[str, Any], record), names, packed, work))

    def flush(self) -> StepRecord | None:
        """Wait for the record under way; None where there is none."""
        return self.arrived(self._metrics.flush())

    def arrived(self, line: dict[str, Any] | None) -> StepRecord | None:
        """Complete what came back from the device; the noise scale takes its numbers in."""
        if line is None:
            return None
        if "grad_square" in line:
            line["grad_norm"] = math.sqrt(line.pop("grad_square"))
        if "skipped" in line:
            line["skipped"] = line["skipped"] > 0
        if line.get("skipped") and line.get("loss_scale", 0.0) > LossScale.LEAST:
            line["overflow"] = math.isfinite(line["loss"]) and not math.isfinite(line["grad_norm"])
        if self.clip_norm is not None:
            line["grad_norm_clipped"] = min(line["grad_norm"], self.clip_norm)
        self.parts.sites.take(line)
        if self.parts.noise is not None:
            self.parts.noise.take(line)
        return cast(StepRecord, line)

    def advance(self, point: Point) -> None:
        """Count the step; the run stops where its samples are spent."""
        self.progress.steps += 1
        self.progress.samples = point.samples + point.batch_size
        self.progress.should_stop |= self.is_spent

    def meet_if_due(self) -> None:
        """Make an outer step after each interval of inner ones, and after the last of them all."""
        if self.parts.outer is not None and self.has_met:
            self.parts.outer.step()

    def record(self, record: StepRecord | None) -> None:
        """Judge a complete record and report it; None: there is none yet."""
        if record is not None:
            self.judge(record)
            self.report(record)

    def judge(self, record: StepRecord) -> None:
        """Ask the guard about a complete record, and do as it says."""
        self.progress.take_loss(record["loss"])
        # What follows an action belongs to it.
        known = self.is_broken or record.get("overflow")
        action = None if known else self.guard.take(record)
        if action is not None:
            self.act_on(action)

    def judge_evaluation(self, found: Evaluated) -> None:
        """End the run at an evaluation that meets the target, or that the guard stops at."""
        progress, target = self.progress, self.stopping.target
        if not math.isfinite(found.loss):
            progress.end("diverged", f"eval_loss is {found.loss}")
        elif target is not None and target.is_met(found.value(target.metric)):
            progress.end("reached")
        else:
            action = self.guard.take_evaluation(
                found.loss, progress.steps, progress.samples, self.plan.budget_samples
            )
            if action is not None:
                self.act_on(action)

    def report(self, record: StepRecord) -> None:
        """Report a record that is judged, and stop where it says so: an interruption waits for the
        weights that are to be saved, and each record after it says so again.
        """
        interrupted = record.pop("interrupted") > 0
        self._save_is_due |= record.pop("save_is_due", 0.0) > 0
        self.reporter.line(record)
        if interrupted and self.has_met and self.progress.status == "exhausted":
            self.progress.end("interrupted")
        self.progress.should_stop |= self.stopping.enough(record)

    def act_on(self, action: GuardAction) -> None:
        """Do as the guard says, and report it; every rank comes here with the same action."""
        event = asdict(action) | self.parts.sites.blame()
        if not math.isfinite(action.value):
            steps_ago = self.progress.steps - action.step
            event["parameters"] = self.parts.engine.non_finite(steps_ago)
        if action.kind == "rollback":
            self._rollback = event
            self.progress.should_stop = True
        else:
            self.reporter.event(event)
        if action.kind == "stop":
            named = event.get("parameters")
            said = f"; not finite: {', '.join(named[:4])}" if named else ""
            self.progress.end("diverged", action.reason + said)

    def roll_back(self, event: dict[str, Any]) -> bool:
        """Roll back to the last good checkpoint and skip the samples consumed since. Returns False
        if there is none, which ends the run.
        """
        self._rollback = None
        state = self.last_state()
        if state is None:
            self.progress.end(
                "diverged", f"{event['reason']}, and there is no checkpoint to go back to"
            )
            self.reporter.event(event | {"kind": "stop", "reason": self.progress.reason})
            return False
        position = self.progress.samples + self.progress.left_out
        self.load_state_dict(state, rolled_back=True)
        window = [self.progress.samples + self.progress.left_out, position]
        self.progress.left_out = position - self.progress.samples
        self.reporter.rewind(self.progress.samples)
        self.reporter.event(event | {"to_samples": self.progress.samples, "left_out": window})
        return True

    def last_state(self) -> dict[str, Any] | None:
        """Of the last checkpoint, model and optimizer set to what they were then."""
        if self.checkpoints is None:
            return None
        self.checkpoints.wait()
        last = self.checkpoints.last
        return None if last is None else self.checkpoints.load(last)

    def evaluate_if_due(self, point: Point) -> None:
        """Evaluate where the grid or the end says so, or as soon after as there are weights for it;
        an interruption leaves no boundary out.
        """
        if self.evaluation is None or self.is_broken or not self.has_met:
            return
        if self.evaluation.grid.is_due(self.progress.steps):
            self.evaluation.grid.advance(self.progress.steps)
            near = self.evaluation.is_near(self.progress.running_loss, self.stopping.target_loss)
            if not (near or self.plan.is_open or self.is_spent):
                self.progress.eval_steps = None
                return
        elif not self.is_spent:
            return
        record = self.flush()
        assert record is not None
        self.judge(record)
        if not self.is_broken:  # weights that are rolled back, or given up, are not evaluated
            self.evaluate(point, record, self.evaluation.find)
        self.report(record)

    def evaluate(self, point: Point, record: StepRecord, find: Callable[[], Evaluated]) -> None:
        """Evaluate, and let the ramp decide what follows."""
        step_seconds = self._clock.mean_of_steps()
        with self._clock.paused():
            self.reporter.phase("evaluate")
            found = find()
        cast(dict[str, Any], record).update(found.fields())
        self.progress.take_evaluation(found, self.stopping.target, self._clock.pause)
        if self.plan.is_open:
            measured = {"batch_size": point.batch_size, "step_seconds": step_seconds}
            noise = self.parts.noise
            self.decide({**record} | ({} if noise is None else noise.readings()) | measured)
        self.judge_evaluation(found)

    def decide(self, measured: dict[str, Any]) -> None:
        """Give the plan what the run has measured, in rank 0's words: all ranks decide alike."""
        signals = {name: measured[name] for name in sorted(RAMP_SIGNALS & measured.keys())}
        values = [float(value) for value in signals.values()]
        agreed = self.parts.engine.as_first_rank(values)
        self.plan.observe(self.progress.samples, **dict(zip(signals, agreed, strict=True)))

    def save_if_due(self, point: Point) -> None:
        """Save, unless the run stops: then it is saved at its end, if at all."""
        if self.checkpoints is None or self.progress.should_stop:
            return
        if not (self._save_is_due or self.checkpoints.due(point.samples, self.progress.samples)):
            return
        if not self.has_met:
            self._save_is_due = True
            return
        self.record(self.flush())
        if not self.progress.should_stop:
            self._save_is_due = False
            with self._clock.paused():
                self.save()

    def save(self) -> None:
        assert self.checkpoints is not None
        self.reporter.phase("save")
        self.checkpoints.save(self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands between two steps, model and optimizer aside, in plain numbers."""
        noise = self.parts.noise
        return {
            "progress": self.progress.state_dict(),
            "budget_samples": self.plan.budget_samples,
            "plan": self.plan.state_dict(),
            "guard": self.guard.state_dict(),
            "precision": self.parts.engine.precision.state_dict(),
            "noise": {} if noise is None else noise.state_dict(),
            "evaluation_due_at": None if self.evaluation is None else self.evaluation.grid.due_at,
            "batch_size": self._scaler.batch_size,
        }

    def load_state_dict(self, state: dict[str, Any], rolled_back: bool = False) -> None:
        """Resume from a `state_dict`, the model's and the optimizer's state being loaded."""
        vars(self.progress).update(state["progress"])
        if self.progress.status == "interrupted":
            self.progress.status = "exhausted"
        self.plan.load_state_dict(state["plan"])
        self.parts.engine.precision.load_state_dict(state["precision"])
        if rolled_back:
            self.guard.rewind(state["guard"])
        else:
            self.guard.load_state_dict(state["guard"])
        if self.parts.noise is not None:
            self.parts.noise.load_state_dict(state["noise"])
        if self.evaluation is not None:
            self.evaluation.grid.due_at = state["evaluation_due_at"]
        if self.parts.outer is not None:
            self.parts.outer.begin()
        self._scaler.batch_size = state["batch_size"]
