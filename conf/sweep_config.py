"""The types of what is run in the place of one plain run: a study, or a learning-rate sweep."""

from dataclasses import dataclass, field
from typing import Any

from largebatch.common.errors import ConfigError
from largebatch.common.numbers import real_number, whole_number
from largebatch.schedules.scaling import RULES, options_of

FEWEST_POINTS = 5
"""Learning rates before the blow-up; with fewer a sweep says nothing."""


@dataclass
class LRFindConfig:
    """A sweep of the learning rate in the place of the run's curve and ramp."""

    low: Any = 1e-5
    high: Any = 10.0
    points: Any = 100
    blow_up: Any = 3.0

    def __post_init__(self) -> None:
        self.low = real_number(self.low, "mode.low", above=0.0)
        self.high = real_number(self.high, "mode.high", above=0.0)
        if self.low >= self.high:
            raise ConfigError(f"mode.low must be < mode.high = {self.high:g}, got {self.low:g}")
        self.points = whole_number(self.points, "mode.points", FEWEST_POINTS + 1)
        self.blow_up = real_number(self.blow_up, "mode.blow_up", above=1.0)


@dataclass
class StudyConfig:
    optimizers: list[str] = field(default_factory=list)
    batch_sizes: list[Any] = field(default_factory=list)
    start_batch: Any = 256
    seeds: list[Any] = field(default_factory=lambda: [0])
    rules: list[str] = field(default_factory=list)
    rule_batches: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("optimizers", "batch_sizes", "seeds"):
            if not getattr(self, name):
                raise ConfigError(f"study.{name} must name at least one, got an empty list")
        sizes = [whole_number(size, "study.batch_sizes", 1) for size in self.batch_sizes]
        self.batch_sizes = sorted(set(sizes))
        self.seeds = [whole_number(seed, "study.seeds") for seed in self.seeds]
        self.start_batch = whole_number(self.start_batch, "study.start_batch", 1)
        if self.start_batch not in self.batch_sizes:
            raise ConfigError(
                f"study.start_batch must be one of study.batch_sizes {self.batch_sizes}, "
                f"got {self.start_batch}"
            )
        self.rule_batches = [
            whole_number(size, "study.rule_batches", 1) for size in self.rule_batches
        ]
        strange = [size for size in self.rule_batches if size not in self.batch_sizes]
        if strange:
            raise ConfigError(
                f"study.rule_batches must be among study.batch_sizes {self.batch_sizes}, "
                f"got {strange}"
            )
        # A noise scale is measured at one place, and a study scales from many.
        known = [name for name, rule in RULES.items() if "noise_scale" not in options_of(rule)]
        unknown = [rule for rule in self.rules if rule not in known]
        if unknown:
            raise ConfigError(f"study.rules must be among {', '.join(known)}, got {unknown}")
