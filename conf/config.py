"""The types of a run's configuration. Hydra composes it; one merge into `TrainConfig` refuses the
rest.

Groups whose choices differ in their keys (task, model, optim, lr, batch, logger) stay mappings with
a `_target_`; what they build checks its own arguments. Imports no torch.
"""

from dataclasses import dataclass, field, is_dataclass
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from largebatch.common.errors import ConfigError, format_config_error
from largebatch.common.numbers import moment, real_number, whole_number
from largebatch.conf.engine_config import EngineConfig
from largebatch.conf.sweep_config import LRFindConfig, StudyConfig
from largebatch.schedules.scaling import RULES, check_hold, check_options

Node = dict[str, Any]


@dataclass
class ScalingConfig:
    """`optim.lr`, `optim.betas`, … are those of `base_batch`; `schedules/scaling.py` has the
    rules.
    """

    rule: str = "none"
    base_batch: Any = 256
    hold: str | None = None
    base_samples: Any = None
    exponent: Any = None
    noise_scale: Any = None
    function: str | None = None

    def __post_init__(self) -> None:
        self.base_batch = whole_number(self.base_batch, "scaling.base_batch", 1)
        names = [*RULES, "custom"]
        if self.rule not in names:
            raise ConfigError(f"scaling.rule must be one of {', '.join(names)}, got {self.rule!r}")
        if (self.rule == "custom") != (self.function is not None):
            raise ConfigError(
                "scaling.function names the rule where scaling=custom, and nothing else, got "
                f"scaling.rule={self.rule} and scaling.function={self.function}"
            )
        check_hold(self.hold)
        if self.base_samples is not None:
            self.base_samples = whole_number(self.base_samples, "scaling.base_samples", 1)
        if self.rule in RULES:
            check_options(RULES[self.rule], self.options)

    @property
    def options(self) -> dict[str, Any]:
        """What the rule is given beside the batch sizes."""
        options = {"exponent": self.exponent, "noise_scale": self.noise_scale}
        return {name: value for name, value in options.items() if value is not None}


PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass
class TargetConfig:
    loss: Any = None
    give_up_samples: Any = None

    def __post_init__(self) -> None:
        if self.loss is not None:
            self.loss = real_number(self.loss, "target.loss")
        if self.give_up_samples is not None:
            self.give_up_samples = whole_number(self.give_up_samples, "target.give_up_samples", 1)


@dataclass
class BudgetConfig:
    samples: Any = 1_000_000
    tokens: Any = None
    tokens_per_sample: Any = 1

    def __post_init__(self) -> None:
        per = whole_number(self.tokens_per_sample, "budget.tokens_per_sample", 1)
        self.tokens_per_sample = per
        if self.tokens is not None:
            self.samples = whole_number(self.tokens, "budget.tokens", per) // per
            self.tokens = None
        self.samples = whole_number(self.samples, "budget.samples", 1)


@dataclass
class EvaluationConfig:
    growth: Any = 1.03

    def __post_init__(self) -> None:
        self.growth = real_number(self.growth, "evaluation.growth", least=1.0)


@dataclass
class RecordConfig:
    every: Any = 1
    layers: bool = False

    def __post_init__(self) -> None:
        self.every = whole_number(self.every, "record.every", 1)


NOISE_SEAMS = ("auto", "rank", "micro_batch", "example")


@dataclass
class NoiseConfig:
    """What small gradients the noise scale is measured with; None: it is not measured."""

    small: str | None = None
    half_life_samples: Any = 8192
    every: Any = 1
    preconditioned: bool = False

    def __post_init__(self) -> None:
        if self.small is not None and self.small not in NOISE_SEAMS:
            raise ConfigError(
                f"noise.small must be null or one of {', '.join(NOISE_SEAMS)}, got {self.small!r}"
            )
        name = "noise.half_life_samples"
        self.half_life_samples = whole_number(self.half_life_samples, name, 1)
        self.every = whole_number(self.every, "noise.every", 1)


CHECKPOINT_MODES = ("sync", "async")
CHECKPOINT_CHECKS = ("auto", "full", "size")


@dataclass
class CheckpointConfig:
    """When a run is saved, what stays, and what is read before one is gone on from."""

    every_samples: Any = None
    every_minutes: Any = None
    mode: str = "sync"
    keep: Any = 2
    keep_every_samples: Any = None
    verify: str = "auto"
    required: bool = False
    folder: str | None = None

    def __post_init__(self) -> None:
        for name in ("every_samples", "keep_every_samples"):
            if getattr(self, name) is not None:
                count = whole_number(getattr(self, name), f"checkpoint.{name}", 1)
                setattr(self, name, count)
        if self.every_minutes is not None:
            self.every_minutes = real_number(
                self.every_minutes, "checkpoint.every_minutes", above=0.0
            )
        self.keep = whole_number(self.keep, "checkpoint.keep", 1)
        if self.folder is not None and not self.folder.startswith("/"):
            raise ConfigError(
                f"checkpoint.folder must be a path from / on, got {self.folder!r}: null keeps "
                "checkpoints in the run's own folder"
            )
        for name, words in (("mode", CHECKPOINT_MODES), ("verify", CHECKPOINT_CHECKS)):
            if getattr(self, name) not in words:
                raise ConfigError(
                    f"checkpoint.{name} must be one of {', '.join(words)}, "
                    f"got {getattr(self, name)!r}"
                )

    @property
    def saves(self) -> bool:
        """Whether a run is saved at all."""
        return self.every_samples is not None or self.every_minutes is not None


REMEDIES = ("skip", "rollback", "stop")


@dataclass
class GuardConfig:
    """What is done about numbers that go wrong; `train/guard.py` has the rules."""

    non_finite: str = "stop"
    spike: str = "skip"
    grad_norm_multiple: Any = None
    loss_deviations: Any = None
    eval_loss_multiple: Any = 100.0
    window: Any = 100
    warmup_steps: Any = 20
    most_events: Any = 10

    def __post_init__(self) -> None:
        for name in ("non_finite", "spike"):
            if getattr(self, name) not in REMEDIES:
                raise ConfigError(
                    f"guard.{name} must be one of {', '.join(REMEDIES)}, "
                    f"got {getattr(self, name)!r}"
                )
        for name in ("grad_norm_multiple", "loss_deviations", "eval_loss_multiple"):
            if getattr(self, name) is not None:
                above = 0.0 if name == "loss_deviations" else 1.0
                setattr(self, name, real_number(getattr(self, name), f"guard.{name}", above=above))
        for name, least in (("window", 5), ("warmup_steps", 0), ("most_events", 0)):
            setattr(self, name, whole_number(getattr(self, name), f"guard.{name}", least))
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

    formula: str | None = None
    peak_tflops: Any = None
    steps_left_out: Any = 5

    def __post_init__(self) -> None:
        if self.formula and self.formula not in FORMULAS:
            raise ConfigError(
                f"throughput.formula must be null or one of {', '.join(FORMULAS)}, "
                f"got {self.formula!r}"
            )
        if self.peak_tflops is not None:
            name = "throughput.peak_tflops"
            self.peak_tflops = real_number(self.peak_tflops, name, above=0.0)
        self.steps_left_out = whole_number(self.steps_left_out, "throughput.steps_left_out")


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
    guard: GuardConfig = field(default_factory=GuardConfig)
    throughput: ThroughputConfig = field(default_factory=ThroughputConfig)
    precision: str = "fp32"
    clip_norm: Any = None
    resume: str | None = None
    stop_at: Any = None
    stop_before_walltime: Any = 300
    mode: LRFindConfig | None = None
    study: StudyConfig | None = None
    seed: Any = 0

    def __post_init__(self) -> None:
        self.seed = whole_number(self.seed, "seed")
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}"
            )
        if self.clip_norm is not None:
            self.clip_norm = real_number(self.clip_norm, "clip_norm", above=0.0)
        if self.stop_at is not None:
            self.stop_at = moment(self.stop_at, "stop_at")
        self.stop_before_walltime = real_number(
            self.stop_before_walltime, "stop_before_walltime", least=0.0
        )
        if self.guard.rolls_back and not self.checkpoint.saves:
            raise ConfigError(
                "guard goes back to the last checkpoint: set checkpoint.every_samples or "
                "every_minutes, or guard.non_finite and guard.spike to skip or stop"
            )
        if self.resume not in (None, "auto"):
            raise ConfigError(f"resume must be null or auto, got {self.resume!r}")
        if self.resume is not None and self.study is not None:
            raise ConfigError("a study goes on by itself in its folder: leave resume at null")
        if self.mode is not None:
            self._check_sweep()
        self.optim["lr"] = real_number(self.optim.get("lr"), "optim.lr", above=0.0)
        per = self.budget.tokens_per_sample
        self.lr, self.batch = (
            in_samples(node, name, per) for node, name in ((self.lr, "lr"), (self.batch, "batch"))
        )
        if self.batch.get("unit") == "tokens":
            self.batch["tokens_per_sample"] = per

    def _check_sweep(self) -> None:
        """Refuse what mode=lr_find has no use for.

        Raises:
            ConfigError: naming the key and the way out.
        """
        if self.study is not None:
            raise ConfigError(
                "a study searches its learning rates itself: leave out study, or mode=lr_find"
            )
        if self.resume is not None or self.checkpoint.saves:
            raise ConfigError(
                "a sweep of mode=lr_find is short and made in one piece: leave resume and "
                "checkpoint.every_samples at null, and checkpoint.every_minutes"
            )
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
    """The composed configuration as a `TrainConfig`.

    Raises:
        ConfigError: a missing or unknown key, a wrong type or an impossible value.
    """
    try:
        missing = [
            f"{group!s}._target_" for group in config if _has_no_target(config._get_node(group))
        ]
        if missing:
            raise ConfigError(f"{' and '.join(missing)} must be given, as KEY=VALUE")
        merged = OmegaConf.merge(_schema(), config)
        result = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(format_config_error(error)) from error
    assert isinstance(result, TrainConfig)
    _refuse_empty(result, "")
    return result


def _refuse_empty(config: Any, above: str) -> None:
    """Refuse an empty word, which would be taken for none; groups of a target check their own."""
    for name, value in vars(config).items():
        if value == "" and isinstance(value, str):
            raise ConfigError(f"{above}{name} must not be empty: null stands for none, got ''")
        if is_dataclass(value):
            _refuse_empty(value, f"{above}{name}.")


@cache
def _schema() -> DictConfig:
    schema: DictConfig = OmegaConf.structured(TrainConfig)
    return schema


def _has_no_target(node: Any) -> bool:
    return isinstance(node, DictConfig) and OmegaConf.is_missing(node, "_target_")
