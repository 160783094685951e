"""The types of a run's configuration. Hydra composes it; one merge into `TrainConfig` refuses the
rest.

Groups whose choices differ in their keys (task, model, optim, lr, batch, logger) stay mappings with
a `_target_`; what they build checks its own arguments. Imports no torch.
"""

from dataclasses import dataclass, field, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

import largebatch.conf.resolvers  # noqa: F401 — registers them
from largebatch.common.errors import ConfigError
from largebatch.common.numbers import moment, real_number, whole_number
from largebatch.conf.engine_config import EngineConfig
from largebatch.conf.specs import choice, count, real, spec, typed_as
from largebatch.conf.sweep_config import LRFindConfig, StudyConfig
from largebatch.conf.weights_config import AverageConfig, OuterConfig
from largebatch.records.target import DIRECTIONS, MIN, Target, direction_of
from largebatch.schedules.scaling import RULES, check_duration, check_hold, check_options
from largebatch.schedules.transfer import STEPS

Node = dict[str, Any]


@dataclass
class ScalingConfig:
    """`optim.lr`, `optim.betas`, … are those of `base_batch` (`schedules/scaling.py` has the
    rules), and of a model of the base's width and depth (`schedules/transfer.py`).
    """

    rule: str = choice("none", *RULES, "custom")
    base_batch: int = count(256, least=1)
    hold: str | None = None
    base_samples: int | None = count(None, least=1)
    duration_exponent: float | None = real(None, least=0.0)
    exponent: Any = None
    noise_scale: Any = None
    function: str | None = None
    base_width: int | None = count(None, least=1)
    base_depth: int | None = count(None, least=1)
    base_model: Node | None = None
    step: str | None = choice(None, *STEPS)

    def __post_init__(self) -> None:
        if self.base_model is not None and self.across_sizes:
            raise ConfigError(
                "scaling.base_model is for models other than the package's transformer, whose "
                "scaling.base_width and scaling.base_depth say it all: leave one at null"
            )
        if (self.rule == "custom") != (self.function is not None):
            raise ConfigError(
                "scaling.function names the rule where scaling=custom, and nothing else, got "
                f"scaling.rule={self.rule} and scaling.function={self.function}"
            )
        check_hold(self.hold)
        check_duration(self.duration_exponent, self.base_samples)
        if self.rule in RULES:
            check_options(RULES[self.rule], self.options)

    @property
    def across_sizes(self) -> bool:
        """Whether rates come from a transformer of another size."""
        return self.base_width is not None or self.base_depth is not None

    @property
    def options(self) -> dict[str, Any]:
        """What the rule is given beside the batch sizes."""
        options = {"exponent": self.exponent, "noise_scale": self.noise_scale}
        return {name: value for name, value in options.items() if value is not None}


@dataclass
class TargetConfig:
    """An evaluation loss; or, where one is named, a metric of the task."""

    loss: float | None = real(None)
    metric: str | None = None
    value: float | None = real(None)
    direction: str | None = choice(None, *DIRECTIONS)
    give_up_samples: int | None = count(None, least=1)

    def __post_init__(self) -> None:
        if self.metric is None:
            given = {"value": self.value, "direction": self.direction}
            for key, value in given.items():
                if value is not None:
                    raise ConfigError(
                        f"target.{key}={value} is of target.metric, which is null: give "
                        "target.metric=accuracy, say, or target.loss alone"
                    )
            return
        if self.value is None:
            raise ConfigError(
                f"target.metric={self.metric} needs target.value: what it is to reach"
            )
        self.direction = self.direction or direction_of(self.metric)
        if self.direction is None:
            raise ConfigError(
                f"target.metric={self.metric} does not say which way it is better: give "
                "target.direction=max (more is) or target.direction=min"
            )
        self.loss = None  # the task's own
        if self.metric == "loss":
            if self.direction != MIN:
                raise ConfigError("target.metric=loss is better below: leave out target.direction")
            self.loss, self.metric, self.value, self.direction = self.value, None, None, None

    @property
    def aim(self) -> Target | None:
        """What an evaluation is to reach."""
        if self.metric is not None and self.value is not None and self.direction is not None:
            return Target(self.metric, self.value, self.direction)
        return None if self.loss is None else Target("loss", self.loss)


@dataclass
class BudgetConfig:
    samples: int = count(1_000_000, least=1)
    tokens: int | None = count(None, least=1)
    steps: int | None = count(None, least=1)
    tokens_per_sample: int = count(1, least=1)

    def __post_init__(self) -> None:
        if self.tokens is not None and self.steps is not None:
            raise ConfigError(
                f"budget.tokens={self.tokens:,} and budget.steps={self.steps:,} are two budgets: "
                "give one"
            )
        if self.tokens is not None:
            per = self.tokens_per_sample
            self.samples = whole_number(self.tokens, "budget.tokens", per) // per
            self.tokens = None


@dataclass
class EvaluationConfig:
    growth: float = real(1.03, least=1.0)
    within: float | None = real(None, least=0.0)
    micro_batch_size: int | None = count(None, least=1)


@dataclass
class RecordConfig:
    every: int = count(1, least=1)
    layers: bool = False
    sites: bool = False


@dataclass
class NoiseConfig:
    """What small gradients the noise scale is measured with; None: it is not measured."""

    small: str | None = choice(None, "auto", "rank", "micro_batch", "example")
    half_life_samples: int = count(8192, least=1)
    every: int = count(1, least=1)
    preconditioned: bool = False


@dataclass
class CheckpointConfig:
    """When a run is saved, what stays, and what is read before one is gone on from."""

    every_samples: int | None = count(None, least=1)
    every_minutes: float | None = real(None, above=0.0)
    mode: str = choice("sync", "sync", "async")
    keep: int = count(2, least=1)
    keep_every_samples: int | None = count(None, least=1)
    verify: str = choice("auto", "auto", "full", "size")
    required: bool = False
    folder: str | None = None

    def __post_init__(self) -> None:
        if self.folder is not None and not self.folder.startswith("/"):
            raise ConfigError(
                f"checkpoint.folder must be a path from / on, got {self.folder!r}: null keeps "
                "checkpoints in the run's own folder"
            )

    @property
    def saves(self) -> bool:
        """Whether a run is saved at all."""
        return self.every_samples is not None or self.every_minutes is not None


REMEDIES = ("skip", "rollback", "stop")


@dataclass
class GuardConfig:
    """What is done about numbers that go wrong; `train/guard.py` has the rules."""

    non_finite: str = choice("stop", *REMEDIES)
    spike: str = choice("skip", *REMEDIES)
    grad_norm_multiple: float | None = real(None, above=1.0)
    loss_deviations: float | None = real(None, above=0.0)
    eval_loss_multiple: float | None = real(100.0, above=1.0, optional=True)
    window: int = count(100, least=5)
    warmup_steps: int = count(20)
    most_events: int = count(10)

    def __post_init__(self) -> None:
        if self.spike == "skip" and self.loss_deviations is not None:
            raise ConfigError(
                "guard.loss_deviations sees a loss when its step is made, too late to skip it: "
                "set guard.spike to rollback or stop"
            )
        without_bound = self.grad_norm_multiple is None and self.loss_deviations is None
        if self.spike != "skip" and without_bound:
            raise ConfigError(
                f"guard.spike={self.spike} needs to know what a spike is: set "
                "guard.grad_norm_multiple (20, say) or guard.loss_deviations (10, say)"
            )

    @property
    def rolls_back(self) -> bool:
        """Whether it may want a checkpoint to go back to."""
        return "rollback" in (self.non_finite, self.spike)


FORMULAS = ("auto", "palm", "megatron", "megatron_recompute", "counted")


@dataclass
class ThroughputConfig:
    """What rates are made with: see `flops.py` and `peaks.py` in `train/reporting`."""

    formula: str | None = choice(None, *FORMULAS)
    peak_tflops: float | None = real(None, above=0.0)
    steps_left_out: int = count(5)


@dataclass
class TrainConfig:
    """Everything that decides a run, typed. `optim.lr` is the learning rate at
    `scaling.base_batch`.
    """

    task: Node
    model: Node
    optim: Node
    lr: Node
    batch: Node
    logger: Node
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    record: RecordConfig = field(default_factory=RecordConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    outer: OuterConfig = field(default_factory=OuterConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    throughput: ThroughputConfig = field(default_factory=ThroughputConfig)
    precision: str = choice("fp32", "fp32", "bf16", "fp16")
    clip_norm: float | None = real(None, above=0.0)
    resume: str | None = None
    branch_from: str | None = None
    stop_at: float | None = spec(None, moment)
    stop_before_walltime: float = real(300.0, least=0.0)
    mode: LRFindConfig | None = None
    study: StudyConfig | None = None
    seed: int = count(0)
    objective: str | None = choice(None, "steps", "samples", "loss")

    def __post_init__(self) -> None:
        if self.objective in ("steps", "samples") and self.target.aim is None:
            raise ConfigError(
                f"objective={self.objective} counts to target.loss, which is null: give a target, "
                "or take objective=loss"
            )
        if self.guard.rolls_back and not self.checkpoint.saves:
            raise ConfigError(
                "guard goes back to the last checkpoint: set checkpoint.every_samples or "
                "every_minutes, or guard.non_finite and guard.spike to skip or stop"
            )
        if self.evaluation.within is not None and self.target.loss is None:
            raise ConfigError(
                f"evaluation.within={self.evaluation.within:g} is a distance from target.loss, "
                "which is null: give target.loss, or leave evaluation.within at null"
            )
        if self.resume not in (None, "auto"):
            raise ConfigError(
                "resume must be null, or auto, which continues the run in hydra.run.dir, got "
                f"{self.resume!r}"
            )
        if self.resume is not None and self.study is not None:
            raise ConfigError("a study resumes by itself in its folder: leave resume at null")
        if self.outer.kind is not None:
            self.outer.check_beside(self.average.kind, self.mode is not None, self.optim)
        if self.mode is not None:
            self._check_sweep()
        self.optim["lr"] = real_number(self.optim.get("lr"), "optim.lr", above=0.0)
        per = self.budget.tokens_per_sample
        self._steps_in_samples()
        self.lr, self.batch = (
            in_samples(node, name, per) for node, name in ((self.lr, "lr"), (self.batch, "batch"))
        )
        if self.batch.get("unit") == "tokens":
            self.batch["tokens_per_sample"] = per

    def _steps_in_samples(self) -> None:
        """Turn lengths in steps into samples, where each step has the same number of them."""
        given = {f"lr.{key}": self.lr.pop(key) for key in [*self.lr] if key.endswith("_steps")}
        given["budget.steps"] = self.budget.steps
        self.budget.steps = None
        size = self.batch.get("size")
        size = None if size is None else whole_number(size, "batch.size", 1)
        fixed = str(self.batch.get("_target_")).endswith(".ConstantBatch") and self.study is None
        for key, steps in given.items():
            if steps is None:
                continue
            counts = [
                whole_number(one, key) for one in (steps if isinstance(steps, list) else [steps])
            ]
            in_samples = key.replace("steps", "samples")
            if size is None or not fixed:
                why = "a study has many" if self.study is not None else "the run may have several"
                last = (
                    "" if size is None else f" ({counts[-1]:,} x {size:,} = {counts[-1] * size:,})"
                )
                raise ConfigError(
                    f"{key}={steps} is no number of samples where {why} batch sizes: give "
                    f"{in_samples}, which is steps times batch size{last}"
                )
            if key == "budget.steps":
                self.budget.samples = counts[0] * size
            else:
                found = [count * size for count in counts]
                self.lr[in_samples.removeprefix("lr.")] = (
                    found if isinstance(steps, list) else found[0]
                )

    def _check_sweep(self) -> None:
        """Refuse what mode=lr_find has no use for."""
        if self.study is not None:
            raise ConfigError(
                "a study searches its learning rates itself: leave out study, or mode=lr_find"
            )
        if self.resume is not None or self.checkpoint.saves:
            raise ConfigError(
                "a sweep of mode=lr_find is short and made in one piece: leave resume and "
                "checkpoint.every_samples at null, and checkpoint.every_minutes"
            )
        if self.branch_from is not None:
            raise ConfigError("mode=lr_find begins with new weights: leave branch_from at null")
        if self.guard != GuardConfig():
            raise ConfigError("mode=lr_find ends where it blows up: leave guard as it is")


def in_samples(node: Node, name: str, tokens_per_sample: int) -> Node:
    """A schedule's keys with every length `…_tokens` that is given in place of its `…_samples`."""
    lengths: Node = {}
    for key in [key for key in node if str(key).endswith("_tokens")]:
        tokens = node[key]
        if tokens is None:
            continue
        counts = [
            whole_number(count, f"{name}.{key}") // tokens_per_sample
            for count in (tokens if isinstance(tokens, list) else [tokens])
        ]
        twin = str(key).removesuffix("tokens") + "samples"
        lengths[twin] = counts if isinstance(tokens, list) else counts[0]
    kept = {key: value for key, value in node.items() if not str(key).endswith("_tokens")}
    return kept | lengths


def typed(config: DictConfig) -> TrainConfig:
    """The composed configuration as a `TrainConfig`."""
    missing = [f"{group!s}._target_" for group in config if _has_no_target(config._get_node(group))]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} must be given, as KEY=VALUE")
    result = typed_as(TrainConfig, config)
    _refuse_empty(result, "")
    return result


def _refuse_empty(config: Any, above: str) -> None:
    """Refuse an empty word, which would be taken for none; groups of a target check their own."""
    for name, value in vars(config).items():
        if value == "" and isinstance(value, str):
            raise ConfigError(f"{above}{name} must not be empty: null stands for none, got ''")
        if is_dataclass(value):
            _refuse_empty(value, f"{above}{name}.")


def _has_no_target(node: Any) -> bool:
    return isinstance(node, DictConfig) and OmegaConf.is_missing(node, "_target_")
