"""The types of what is run in the place of one plain run: a study, or a learning-rate sweep."""

from dataclasses import dataclass, field

from largebatch.common.errors import ConfigError
from largebatch.conf.specs import choice, count, each_count, real
from largebatch.schedules.scaling import RULES, options_of

SEARCHABLE = ("lr", "momentum", "beta2", "damping", "weight_decay")
FEWEST_POINTS = 5
"""Learning rates before the blow-up; with fewer a sweep says nothing."""


@dataclass
class LRFindConfig:
    """A sweep of the learning rate in the place of the run's curve and ramp."""

    low: float = real(1e-5, above=0.0)
    high: float = real(10.0, above=0.0)
    points: int = count(100, least=FEWEST_POINTS + 1)
    blow_up: float = real(3.0, above=1.0)

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ConfigError(f"mode.low must be < mode.high = {self.high:g}, got {self.low:g}")


STEPS, LOSS = "steps_to_target", "loss_at_budget"
"""What a study may ask: how many steps to a loss, or what loss after so many samples, decayed."""


@dataclass
class StudyConfig:
    optimizers: list[str] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list, metadata=each_count(least=1))
    start_batch: int = count(256, least=1)
    select_seeds: list[int] = field(default_factory=lambda: [0], metadata=each_count())
    report_seeds: list[int] = field(default_factory=list, metadata=each_count())
    search: list[str] = field(default_factory=lambda: ["lr"])
    most_trials: int = count(64, least=3)
    join: bool = False
    rules: list[str] = field(default_factory=list)
    rule_batches: list[int] = field(default_factory=list, metadata=each_count(least=1))
    protocol: str = choice(STEPS, STEPS, LOSS)
    budgets: list[int] = field(default_factory=list, metadata=each_count(least=1))

    def __post_init__(self) -> None:
        for name in ("optimizers", "batch_sizes", "select_seeds"):
            if not getattr(self, name):
                raise ConfigError(f"study.{name} must name at least one, got an empty list")
        self.batch_sizes = sorted(set(self.batch_sizes))
        self.budgets = sorted(set(self.budgets))
        self._check_protocol()
        if both := sorted({*self.select_seeds} & {*self.report_seeds}):
            raise ConfigError(
                "study.report_seeds must not be among study.select_seeds (a seed that chose the "
                f"setting flatters it), got {both} in both"
            )
        if "lr" not in self.search or {*self.search} - {*SEARCHABLE}:
            raise ConfigError(
                f"study.search must hold lr, and may hold {', '.join(SEARCHABLE[1:])}, "
                f"got {self.search}"
            )
        if self.start_batch not in self.batch_sizes:
            raise ConfigError(
                f"study.start_batch must be one of study.batch_sizes {self.batch_sizes}, "
                f"got {self.start_batch}"
            )
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

    def _check_protocol(self) -> None:
        if self.protocol == STEPS and self.budgets:
            raise ConfigError(
                f"study.budgets are of study.protocol={LOSS}, got {self.budgets}: under "
                f"{STEPS} budget.samples is the most that a run may take"
            )
        if self.protocol == LOSS and not self.budgets:
            raise ConfigError(f"study.protocol={LOSS} needs study.budgets, in samples: got none")
        if self.protocol == LOSS and self.rules:
            raise ConfigError(
                f"study.rules are compared by steps to a target, got {self.rules} with "
                f"study.protocol={LOSS}: leave them at []"
            )
