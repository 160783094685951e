"""The way of a batch. Read `Loop.run` first: one step from plan to record."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from largebatch.conf.config import GuardConfig
from largebatch.distributed.ranks import Ranks
from largebatch.schedules import BatchSplit, Plan, Point
from largebatch.train.data.randomness import seed_step
from largebatch.train.data.sampler import Sampler
from largebatch.train.engines.base import Engine
from largebatch.train.engines.precision import LossScale
from largebatch.train.engines.update import GradientLimits, StepMetrics
from largebatch.train.evaluation import EvaluationGrid
from largebatch.train.guard import Guard, GuardAction
from largebatch.train.hyperparameter_scaler import HyperparameterScaler
from largebatch.train.noise.gradient_noise import GradientNoise
from largebatch.train.progress import RAMP_SIGNALS, Progress
from largebatch.train.reporting.async_metrics import AsyncMetrics
from largebatch.train.reporting.step_clock import StepClock
from largebatch.train.reporting.trust_ratios import trust_ratios
from largebatch.train.stop_signal import StopSignal
from largebatch.train.tasks import Batch, Task

if TYPE_CHECKING:
    from largebatch.train.checkpoints.checkpoint import Checkpoints


@dataclass
class Loop:
    """One training run over a plan.

    Attributes:
        evaluate: the evaluation loss now, the same number on every rank; None: never, for plans
            that do not wait for it.
        record: takes each complete line; called on every rank, in step order.
        noise: measures the noise scale, where it is asked for.
        guard: what becomes of numbers that go wrong.
        event: takes what the guard has done, as keywords of an event; called on every rank.
        checkpoints: where the run's state is kept between two steps, and taken from; None: nowhere.
        rewind: cuts the record to the lines until so many samples; called on every rank.
        phase: takes the name of what is done between steps: "evaluate", "save".
        clip_norm: gradients of a larger L2 norm are scaled down to it.
        target_loss: the run ends at the first evaluation at or below it.
        record_layers: put each layer's trust ratio into the lines.
        give_up_samples: ends a run without its target earlier than the budget, which schedules see.
        enough: sees each complete line, a step late, on every rank alike; true ends the run as if
            its budget were spent.
    """

    plan: Plan
    task: Task
    engine: Engine
    optimizer: Optimizer
    sampler: Sampler
    ranks: Ranks
    evaluate: Callable[[], float] | None
    grid: EvaluationGrid
    record: Callable[[dict[str, Any]], None]
    stop_signal: StopSignal
    noise: GradientNoise | None = None
    guard: Guard = field(default_factory=lambda: Guard(GuardConfig()))
    event: Callable[[dict[str, Any]], None] = lambda event: None
    checkpoints: "Checkpoints | None" = None
    rewind: Callable[[int], None] = lambda samples: None
    phase: Callable[[str], None] = lambda name: None
    clip_norm: float | None = None
    target_loss: float | None = None
    give_up_samples: int | None = None
    record_layers: bool = False
    enough: Callable[[dict[str, Any]], bool] = lambda line: False
    progress: Progress = field(default_factory=Progress)
    _metrics: AsyncMetrics = field(default_factory=AsyncMetrics)
    _rollback: dict[str, Any] | None = None
    """The event that the run goes back for."""
    _save_is_due: bool = False
    _clock: StepClock = field(default_factory=StepClock)
    _scaler: HyperparameterScaler = field(init=False)

    def __post_init__(self) -> None:
        self._scaler = HyperparameterScaler(self.plan, self.optimizer)

    def run(self) -> Progress:
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
        """Step from where the run stands until it ends, or is to go back."""
        self._clock.start()
        for point in self.plan.steps_from(self.progress.samples):
            batch = self.take(point)
            loss = self.engine.forward_backward(self.task, batch, point.batch_size)
            numbers = self.measure(point, loss)
            change = self._scaler.apply(point)
            numbers |= self.update(point.lr)
            before = self.send_off(point, numbers)
            self._metrics.annotate(**change)
            self.advance(point)
            ended = self.ends_with(before)
            if not self.is_broken:  # an interruption leaves no boundary out
                ended = self.boundary_ends_it(point) or ended
            if ended or self.saving_ends_it(point):
                break
        if self._rollback is None:
            self.ends_with(self.arrived(self._metrics.flush()))
        else:
            self._metrics.flush()  # of a step that will not have been

    @property
    def is_broken(self) -> bool:
        """Whether the weights are those of a step that should not have been made."""
        return self.progress.status == "diverged" or self._rollback is not None

    @property
    def is_spent(self) -> bool:
        """Whether there are no more samples to train on."""
        limit = min(self.give_up_samples or math.inf, self.plan.budget_samples)
        return self.progress.samples >= limit

    def take(self, point: Point) -> Batch:
        """This rank's share of the global batch, and the randomness of the step."""
        share = point.batch_size // self.engine.data_parallel_size
        position = point.samples + self.progress.left_out
        start = position + self.ranks.rank * share
        seed_step(self.engine.device, self.sampler.seed, position, self.ranks.rank)
        if self.noise is not None:
            self.noise.begin(self.progress.steps)
        return self.task.train_batch(self.sampler.take(start, share))

    def measure(self, point: Point, loss: Tensor) -> StepMetrics:
        """The step's numbers, gradients untouched."""
        interrupted = torch.full_like(loss, float(self.stop_signal.is_due))
        reduced = {"loss": loss, "interrupted": interrupted}
        if self.checkpoints is not None:
            due = self.ranks.is_first and self.checkpoints.is_due_by_time()
            reduced["save_is_due"] = torch.full_like(loss, float(due))
        if self.noise is not None:
            scale = self.engine.precision.loss_scale
            reduced |= self.noise.parts(self.split(point), 1.0 if scale is None else scale.value)
        return StepMetrics(reduced, {})

    def split(self, point: Point) -> BatchSplit:
        ranks, micro = (
            self.engine.data_parallel_size,
            self.engine.micro_batch_size(point.batch_size),
        )
        return BatchSplit(point.batch_size, ranks, math.ceil(point.batch_size / (ranks * micro)))

    def update(self, lr: float) -> StepMetrics:
        """One optimizer step at learning rate `lr`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        numbers = self.engine.update(
            self.optimizer, GradientLimits(self.clip_norm, self.skip_above())
        )
        return numbers | StepMetrics({}, trust_ratios(self.optimizer, self.record_layers))

    def skip_above(self) -> float | None:
        """The gradient norm above which the next step is none; None: every step is made."""
        return self.guard.threshold() if self.guard.skips else None

    def send_off(self, point: Point, numbers: StepMetrics) -> dict[str, Any] | None:
        """Pack the step's numbers for the host; returns the line of the step before."""
        values = numbers.reduced | numbers.replicated
        packed = torch.stack([*values.values()])
        work = self.engine.sum_over_ranks(packed[: len(numbers.reduced)])
        split = self.split(point)
        line = {
            "step": self.progress.steps + 1,
            "samples": point.samples + point.batch_size,
            "lr": point.lr,
            "global_batch_size": point.batch_size,
            "micro_batch_size": self.engine.micro_batch_size(point.batch_size),
            "gradient_accumulation_steps": split.gradient_accumulation_steps,
            "data_parallel_size": split.data_parallel_size,
            "step_seconds": self._clock.step(),
        }
        if self.plan.tokens_per_sample > 1:
            line["tokens"] = line["samples"] * self.plan.tokens_per_sample
        if self.guard.threshold() < math.inf:
            line["grad_norm_bound"] = self.guard.threshold()
        return self.arrived(self._metrics.push(line, tuple(values), packed, work))

    def arrived(self, line: dict[str, Any] | None) -> dict[str, Any] | None:
        """Take in what a line that is now complete says of the gradient."""
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
        if self.noise is not None:
            self.noise.take(line)
        return line

    def advance(self, point: Point) -> None:
        self.progress.steps += 1
        self.progress.samples = point.samples + point.batch_size

    def ends_with(self, line: dict[str, Any] | None) -> bool:
        """Judge and record a complete line; True where it ends the steps."""
        if line is None:
            return False
        self.judge(line)
        return self.recorded_ends_it(line)

    def judge(self, line: dict[str, Any]) -> None:
        """Ask the guard about a complete line, and do as it says."""
        self.progress.loss = line["loss"]
        known = self.is_broken or line.get("overflow")  # what follows an action is one with it
        action = None if known else self.guard.take(line)
        if action is not None:
            self.act_on(action)

    def judge_evaluation(self, eval_loss: float) -> None:
        """Ask the guard about an evaluation loss, and do as it says."""
        action = self.guard.take_evaluation(
            eval_loss, self.progress.steps, self.progress.samples, self.plan.budget_samples
        )
        if action is not None:
            self.act_on(action)

    def recorded_ends_it(self, line: dict[str, Any]) -> bool:
        """Record a line that is judged; True where it ends the steps."""
        interrupted = line.pop("interrupted") > 0
        self._save_is_due |= line.pop("save_is_due", 0.0) > 0
        self.record(line)
        if interrupted and self.progress.status == "exhausted":
            self.progress.status = "interrupted"
        return self.enough(line) or self.is_broken or self.progress.status == "interrupted"

    def act_on(self, action: GuardAction) -> None:
        """Do as the guard says, and tell; every rank comes here with the same action."""
        event = asdict(action)
        if not math.isfinite(action.value):
            event["parameters"] = self.engine.non_finite(self.progress.steps - action.step)
        if action.kind == "rollback":
            self._rollback = event
        else:
            self.event(event)
        if action.kind == "stop":
            named = event.get("parameters")
            said = f"; not finite: {', '.join(named[:4])}" if named else ""
            self.progress.status, self.progress.reason = "diverged", action.reason + said

    def roll_back(self, event: dict[str, Any]) -> bool:
        """Go back to the last good checkpoint, the samples since then left out for good; False
        where there is none, and the run ends.
        """
        self._rollback = None
        state = self.last_state()
        if state is None:
            self.progress.status = "diverged"
            self.progress.reason = f"{event['reason']}, and there is no checkpoint to go back to"
            self.event(event | {"kind": "stop", "reason": self.progress.reason})
            return False
        position = self.progress.samples + self.progress.left_out
        self.load_state_dict(state, rolled_back=True)
        window = [self.progress.samples + self.progress.left_out, position]
        self.progress.left_out = position - self.progress.samples
        self.rewind(self.progress.samples)
        self.event(event | {"to_samples": self.progress.samples, "left_out": window})
        return True

    def last_state(self) -> dict[str, Any] | None:
        """Of the last checkpoint, model and optimizer set to what they were then."""
        if self.checkpoints is None:
            return None
        self.checkpoints.wait()
        last = self.checkpoints.last
        return None if last is None else self.checkpoints.load(last)

    def boundary_ends_it(self, point: Point) -> bool:
        """Evaluate where the grid or the end says so, and let the ramp decide what follows; True
        where the run has no more to do.
        """
        seen, spent = self.progress.samples, self.is_spent
        if self.evaluate is None:
            return spent
        if not (self.grid.is_due(self.progress.steps) or spent):
            return False
        line = self.arrived(self._metrics.flush())
        assert line is not None
        self.judge(line)
        if self.is_broken:  # weights that are gone back on, or given up, are not evaluated
            return self.recorded_ends_it(line)
        step_seconds = self._clock.mean_of_steps()
        with self._clock.paused():
            self.phase("evaluate")
            line["eval_loss"] = self.progress.eval_loss = self.evaluate()
        if self.plan.is_open:
            measured = {"batch_size": point.batch_size, "step_seconds": step_seconds}
            known = {} if self.noise is None else self.noise.readings()
            self.decide(seen, line | known | measured)
        if not math.isfinite(self.progress.eval_loss):
            self.progress.status = "diverged"
            self.progress.reason = f"eval_loss is {self.progress.eval_loss}"
        elif self.target_loss is not None and self.progress.eval_loss <= self.target_loss:
            self.progress.status = "reached"
        else:
            self.judge_evaluation(self.progress.eval_loss)
        return self.recorded_ends_it(line) or spent or self.progress.status != "exhausted"

    def decide(self, seen: int, line: dict[str, Any]) -> None:
        """Tell the plan what the run has measured, in rank 0's words: all ranks decide alike."""
        readings = {name: line[name] for name in sorted(RAMP_SIGNALS & line.keys())}
        agreed = self.engine.as_first_rank([float(value) for value in readings.values()])
        self.plan.observe(seen, **dict(zip(readings, agreed, strict=True)))

    def saving_ends_it(self, point: Point) -> bool:
        """Save where it is due; True where its last line ends the steps."""
        if self.checkpoints is None:
            return False
        if not (self._save_is_due or self.checkpoints.due(point.samples, self.progress.samples)):
            return False
        if self.ends_with(self.arrived(self._metrics.flush())):
            return True
        self._save_is_due = False
        with self._clock.paused():
            self.save()
        return False

    def save(self) -> None:
        assert self.checkpoints is not None
        self.phase("save")
        self.checkpoints.save(self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands between two steps, model and optimizer aside, in plain numbers."""
        return {
            "progress": asdict(self.progress),
            "budget_samples": self.plan.budget_samples,
            "plan": self.plan.state_dict(),
            "guard": self.guard.state_dict(),
            "precision": self.engine.precision.state_dict(),
            "noise": {} if self.noise is None else self.noise.state_dict(),
            "evaluation_due_at": self.grid.due_at,
            "batch_size": self._scaler.batch_size,
        }

    def load_state_dict(self, state: dict[str, Any], rolled_back: bool = False) -> None:
        """Go on from a `state_dict`, the model's and the optimizer's state being loaded."""
        vars(self.progress).update(state["progress"])
        if self.progress.status == "interrupted":
            self.progress.status = "exhausted"
        self.plan.load_state_dict(state["plan"])
        self.engine.precision.load_state_dict(state["precision"])
        if rolled_back:
            self.guard.rewind(state["guard"])
        else:
            self.guard.load_state_dict(state["guard"])
        if self.noise is not None:
            self.noise.load_state_dict(state["noise"])
        self.grid.due_at = state["evaluation_due_at"]
        self._scaler.batch_size = state["batch_size"]
