"""The way of a batch. Read `Loop.run` first: one step from plan to record."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from largebatch.schedules import Plan, Point
from largebatch.train.coscaling import CoScaling
from largebatch.train.engines import Engine
from largebatch.train.evaluation import EvaluationGrid
from largebatch.train.gradient_noise import GradientNoise
from largebatch.train.interruption import Interruption
from largebatch.train.randomness import seed_step
from largebatch.train.ranks import Ranks
from largebatch.train.readings import Readings
from largebatch.train.sampler import Sampler
from largebatch.train.small_gradients import Share
from largebatch.train.tasks import Batch, Task
from largebatch.train.update import Limits, Numbers


@dataclass
class Progress:
    """Where a run stands, and how it ended."""

    status: str = "exhausted"
    steps: int = 0
    samples: int = 0
    loss: float | None = None
    eval_loss: float | None = None


# What a ramp may decide on.
READINGS = frozenset(
    {
        "batch_size",
        "eval_loss",
        "grad_sq_norm",
        "grad_trace",
        "loss",
        "lr",
        "noise_resolved",
        "noise_samples",
        "noise_scale",
        "noise_scale_error",
        "step_seconds",
    }
)


@dataclass
class Loop:
    """One training run over a plan.

    Attributes:
        evaluate: the evaluation loss now, the same number on every rank; None: never, for plans
            that do not wait for it.
        record: takes each complete line; called on every rank, in step order.
        noise: measures the noise scale, where it is asked for.
        save: takes the run's state as it is between two steps; called on every rank.
        save_every_samples: how often, and at the end of all runs but diverged ones; None: never.
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
    interruption: Interruption
    noise: GradientNoise | None = None
    save: Callable[[dict[str, Any]], None] = lambda state: None
    save_every_samples: int | None = None
    clip_norm: float | None = None
    target_loss: float | None = None
    give_up_samples: int | None = None
    record_layers: bool = False
    enough: Callable[[dict[str, Any]], bool] = lambda line: False
    progress: Progress = field(default_factory=Progress)
    _readings: Readings = field(default_factory=Readings)
    _coscaling: CoScaling = field(init=False)
    _boundary: tuple[int, float] = field(init=False)

    def __post_init__(self) -> None:
        self._coscaling = CoScaling(self.plan, self.optimizer)

    def run(self) -> Progress:
        """Step until the target, the budget, an interruption or a non-finite number."""
        if self.progress.status == "reached" or self.is_spent:  # before it was resumed
            return self.progress
        self._boundary = (self.progress.steps, time.perf_counter())
        for point in self.plan.steps_from(self.progress.samples):
            batch = self.take(point)
            loss = self.engine.forward_backward(self.task, batch, point.batch_size)
            numbers = self.measure(point, loss)
            change = self._coscaling.take_up(point)
            numbers |= self.update(point.lr)
            before = self.send_off(point, numbers)
            self._readings.annotate(**change)
            self.advance(point)
            ended = self.ends_with(before)
            if self.progress.status != "diverged":  # an interruption leaves no boundary out
                ended = self.boundary_ends_it(point) or ended
            if ended or self.saving_ends_it(point):
                break
        self.ends_with(self.arrived(self._readings.flush()))
        if self.progress.status != "diverged" and self.save_every_samples is not None:
            self.save(self.state_dict())
        return self.progress

    @property
    def is_spent(self) -> bool:
        """Whether there are no more samples to train on."""
        limit = min(self.give_up_samples or math.inf, self.plan.budget_samples)
        return self.progress.samples >= limit

    def take(self, point: Point) -> Batch:
        """This rank's share of the global batch, and the randomness of the step."""
        share = point.batch_size // self.engine.data_parallel_size
        start = point.samples + self.ranks.rank * share
        seed_step(self.engine.device, self.sampler.seed, point.samples, self.ranks.rank)
        if self.noise is not None:
            self.noise.begin(self.progress.steps)
        return self.task.train_batch(self.sampler.take(start, share))

    def measure(self, point: Point, loss: Tensor) -> Numbers:
        """The step's numbers, gradients untouched."""
        interrupted = torch.full_like(loss, float(self.interruption.signal is not None))
        summed = {"loss": loss, "interrupted": interrupted}
        if self.noise is not None:
            scale = self.engine.precision.loss_scale
            summed |= self.noise.parts(self.share(point), 1.0 if scale is None else scale.value)
        return Numbers(summed, {})

    def share(self, point: Point) -> Share:
        ranks, micro = (
            self.engine.data_parallel_size,
            self.engine.micro_batch_size(point.batch_size),
        )
        return Share(point.batch_size, ranks, math.ceil(point.batch_size / (ranks * micro)))

    def update(self, lr: float) -> Numbers:
        """One optimizer step at learning rate `lr`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        numbers = self.engine.update(self.optimizer, Limits(self.clip_norm))
        return Numbers(numbers.summed, numbers.own | trust_ratios(self.optimizer, self.record_layers))

    def send_off(self, point: Point, numbers: Numbers) -> dict[str, Any] | None:
        """Pack the step's numbers for the host; returns the line of the step before."""
        all_of_them = numbers.summed | numbers.own
        packed = torch.stack([*all_of_them.values()])
        work = self.engine.sum_over_ranks(packed[: len(numbers.summed)])
        share = self.share(point)
        line = {
            "step": self.progress.steps + 1,
            "samples": point.samples + point.batch_size,
            "lr": point.lr,
            "global_batch_size": point.batch_size,
            "micro_batch_size": self.engine.micro_batch_size(point.batch_size),
            "gradient_accumulation_steps": share.gradient_accumulation_steps,
            "data_parallel_size": share.data_parallel_size,
        }
        return self.arrived(self._readings.push(line, tuple(all_of_them), packed, work))

    def arrived(self, line: dict[str, Any] | None) -> dict[str, Any] | None:
        """Take in what a line that is now complete says of the gradient."""
        if line is None:
            return None
        if "grad_square" in line:
            line["grad_norm"] = math.sqrt(line.pop("grad_square"))
        if self.clip_norm is not None:
            line["grad_norm_clipped"] = min(line["grad_norm"], self.clip_norm)
        if self.noise is not None:
            self.noise.take(line)
        return line

    def advance(self, point: Point) -> None:
        self.progress.steps += 1
        self.progress.samples = point.samples + point.batch_size

    def ends_with(self, line: dict[str, Any] | None) -> bool:
        """Record a complete line; True where it ends the run."""
        if line is None:
            return False
        interrupted = line.pop("interrupted") > 0
        self.progress.loss = line["loss"]
        self.record(line)
        if not (math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])):
            self.progress.status = "diverged"
        elif interrupted and self.progress.status == "exhausted":
            self.progress.status = "interrupted"
        return self.enough(line) or self.progress.status in ("diverged", "interrupted")

    def boundary_ends_it(self, point: Point) -> bool:
        """Evaluate where the grid or the end says so, and let the ramp decide what follows; True
        where the run has no more to do.
        """
        seen, spent = self.progress.samples, self.is_spent
        if self.evaluate is None:
            return spent
        if not (self.grid.is_due(self.progress.steps) or spent):
            return False
        line = self.arrived(self._readings.flush())
        assert line is not None
        steps, begun = self._boundary
        step_seconds = (time.perf_counter() - begun) / (self.progress.steps - steps)
        line["eval_loss"] = self.progress.eval_loss = self.evaluate()
        if self.plan.is_open:
            measured = {"batch_size": point.batch_size, "step_seconds": step_seconds}
            known = {} if self.noise is None else self.noise.readings()
            self.decide(seen, line | known | measured)
        if not math.isfinite(self.progress.eval_loss):
            self.progress.status = "diverged"
        elif self.target_loss is not None and self.progress.eval_loss <= self.target_loss:
            self.progress.status = "reached"
        self._boundary = (self.progress.steps, time.perf_counter())
        return self.ends_with(line) or spent or self.progress.status != "exhausted"

    def decide(self, seen: int, line: dict[str, Any]) -> None:
        """Tell the plan what the run has measured, in rank 0's words: all ranks decide alike."""
        readings = {name: line[name] for name in sorted(READINGS & line.keys())}
        agreed = self.engine.as_first_rank([float(value) for value in readings.values()])
        self.plan.observe(seen, **dict(zip(readings, agreed, strict=True)))

    def saving_ends_it(self, point: Point) -> bool:
        """Save where the step has passed a multiple of `save_every_samples`; True where its last
        line ends the run.
        """
        every = self.save_every_samples
        if every is None or self.progress.samples // every == point.samples // every:
            return False
        if self.ends_with(self.arrived(self._readings.flush())):
            return True
        begun = time.perf_counter()
        self.save(self.state_dict())
        steps, boundary = self._boundary
        self._boundary = (steps, boundary + time.perf_counter() - begun)  # is no time of steps
        return False

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands between two steps, model and optimizer aside, in plain numbers."""
        return {
            "progress": asdict(self.progress),
            "plan": self.plan.state_dict(),
            "noise": {} if self.noise is None else self.noise.state_dict(),
            "evaluation_due_at": self.grid.due_at,
            "batch_size": self._coscaling.batch_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`, the model's and the optimizer's state being loaded."""
        vars(self.progress).update(state["progress"])
        if self.progress.status == "interrupted":
            self.progress.status = "exhausted"
        self.plan.load_state_dict(state["plan"])
        if self.noise is not None:
            self.noise.load_state_dict(state["noise"])
        self.grid.due_at = state["evaluation_due_at"]
        self._coscaling.batch_size = state["batch_size"]


def trust_ratios(optimizer: Optimizer, by_layer: bool) -> dict[str, Tensor]:
    """Least, median and greatest trust ratio over the layers, where the optimizer has any.

    With `by_layer` every layer's as well, as `trust_ratio/NAME`.
    """
    layer_stats: Callable[[], dict[Any, dict[str, Tensor]]] = getattr(
        optimizer, "layer_stats", dict
    )
    layers = {name: stats["trust_ratio"] for name, stats in layer_stats().items()}
    if not layers:
        return {}
    ratios = torch.stack([*layers.values()])
    each = {f"trust_ratio/{name}": ratio for name, ratio in layers.items()} if by_layer else {}
    return each | {
        "trust_ratio_min": ratios.min(),
        "trust_ratio_median": ratios.median(),
        "trust_ratio_max": ratios.max(),
    }
