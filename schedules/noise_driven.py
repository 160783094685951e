"""Batch ramps that follow the gradient noise: one state, five policies.

The state is what `noise.py` estimates, tr Σ and ‖G‖² with their ratio B_noise, and the loss. A
policy says with `desired` which batch size that state asks for; `NoiseRamp` makes a ramp of it.

What a boundary votes on is whether the policy, *at the next rung*, would ask for no less than that
rung. For a policy that asks for the same wherever it stands, as the √-law, that is whether it asks
for the next rung. The norm test, though, never asks for more than 1/η² times the batch it stands
at: by its word where it stands, it would stop far below its own fixed point, or never begin.

A batch that has grown stays, so a vote has to be sure, not likely: a policy that needs B_noise
takes the lower end of its 95% interval, tr Σ / (‖G‖² + 1.96 SE of ‖G‖²). That holds also where
‖G‖² is lost in the noise ("unresolved"), which far below B_noise may last for the whole run: a ramp
that waited for a resolved ‖G‖² would stall where growth pays most. Where the mean of ‖G‖² is
not positive, a run's record has no error for it, hence no bound, and there is no vote but from the
norm test and CABS, which can do without.
"""

import math
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from largebatch.schedules.adaptive import AdaptiveRamp
from largebatch.schedules.fields import count, real
from largebatch.schedules.noise import NORMAL_QUANTILE
from largebatch.schedules.ramps import GeometricBatch

Readings = Mapping[str, float]

NUM_KEPT = 15
"""Times of one batch size: enough for a median, few enough to follow the machine."""


@dataclass(kw_only=True)
class NoiseRamp(AdaptiveRamp):
    """From `start` times `factor` a rung, after `votes` votes in a row, to `size` at most.

    Votes are cast at boundaries, one each; a boundary without one begins the count anew, and so
    does a rise. Where readings say at how many `noise_samples` the noise was last measured, a
    boundary without a new measurement is passed by. The batch never shrinks.

    Attributes:
        start: the batch size before the first rise.
        size: the cap, `start` times a power of `factor`.
        factor: of one rise, at least 2.
        votes: how many boundaries in a row have to ask for the next rung.

    Raises:
        ValueError: a value out of range, or a size that is no power of `factor` above start.
    """

    size: int = count("batch.size", least=1)
    factor: int = count("batch.factor", 2, least=2)
    votes: int = count("batch.votes", 3, least=1)
    _rungs: tuple[int, ...] = field(init=False, repr=False)
    _count: int = field(init=False, repr=False, default=0)
    _boundary: int = field(init=False, repr=False, default=-1)
    _measured: float = field(init=False, repr=False, default=-1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        ladder = GeometricBatch(
            start=self.start, factor=self.factor, ramp_samples=1, size=self.size
        )
        self._rungs = tuple(ladder.sizes())

    def sizes(self) -> Iterator[int]:
        return iter(self._rungs)

    @abstractmethod
    def desired(self, batch_size: int, readings: Readings) -> float:
        """The batch size that the readings ask for, standing at `batch_size`, in samples.

        NaN where they do not say.
        """

    def observe(self, samples: int, readings: Readings) -> None:
        if samples == self._boundary:  # a second reading at one boundary is no second vote
            return
        super().observe(samples, readings)
        self._boundary = samples

    def decide(self, samples: int, readings: Readings) -> int:
        del samples
        if self.batch_size >= self.size:
            return self.batch_size
        measured = readings.get("noise_samples")
        if measured is not None:
            if measured == self._measured:  # nothing new: neither a vote nor the lack of one
                return self.batch_size
            self._measured = measured
        rung = self.batch_size * self.factor
        votes_for_it = self.desired(rung, readings) >= rung  # never of NaN
        self._count = self._count + 1 if votes_for_it else 0
        if self._count < self.votes:
            return self.batch_size
        self._count = 0
        return rung

    def state_dict(self) -> dict[str, Any]:
        counts = {"votes": self._count, "boundary": self._boundary, "measured": self._measured}
        return super().state_dict() | counts

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a `state_dict`.

        Raises:
            ValueError: of a ramp with other rungs, whose batch sizes nobody has planned for.
        """
        strays = [size for _, size in state["stages"] if size not in self._rungs]
        if strays:
            raise ValueError(
                f"the run had reached a batch size of {strays[0]}, and batch.start = {self.start}, "
                f"batch.factor = {self.factor} and batch.size = {self.size} allow "
                f"{', '.join(map(str, self._rungs))}: resume with the keys it began with"
            )
        super().load_state_dict(state)
        self._count, self._boundary = int(state["votes"]), int(state["boundary"])
        self._measured = float(state["measured"])


@dataclass(kw_only=True)
class SqrtNoise(NoiseRamp):
    """B = √(r B_noise): the best use of time and samples together (McCandlish et al. 2018, app. D).

    Where one step less is worth r samples more, the cost of a stretch of training at batch B is
    (1 + B_noise / B)(r + B) up to a factor, which is least at this B. r = B_noise gives B_noise.

    Attributes:
        exchange_rate: r, in samples a step.
    """

    exchange_rate: float = real("batch.exchange_rate", above=0.0)

    def desired(self, batch_size: int, readings: Readings) -> float:
        del batch_size
        return math.sqrt(self.exchange_rate * least_noise_scale(readings))


@dataclass(kw_only=True)
class NormTest(NoiseRamp):
    """B = ⌈tr Σ / (η² ‖ḡ‖²)⌉: the variance of the batch's gradient within η² of its squared norm.

    Byrd et al. 2012; with ‖ḡ‖² the gradient's own squared norm at batch B, on average
    ‖G‖² + tr Σ / B, as AdAdaGrad (Lau et al. 2024, arXiv:2402.11215) and its distributed successor
    (arXiv:2412.21124) have it. Its noise is in ‖ḡ‖² as well, so the test is content from
    B_noise (1/η² - 1) on: B_noise at η = 1/√2. From η = 1 on it never asks for growth.

    ‖G‖² is the upper end of its interval, and zero where its mean is not positive: a batch whose
    gradient is all noise fails the test however little is known of ‖G‖².

    Attributes:
        eta: η, above 0 and below 1.
    """

    eta: float = real("batch.eta", math.sqrt(0.5), above=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta >= 1:
            raise ValueError(
                f"batch.eta must be below 1, got {self.eta:g}: the norm test is content at any "
                "batch size from there on"
            )

    def desired(self, batch_size: int, readings: Readings) -> float:
        trace = number(readings, "grad_trace")
        most = most_grad_sq_norm(readings)
        if not (trace > 0 and most >= 0):
            return math.nan
        return math.ceil(trace / (self.eta**2 * (most + trace / batch_size)))


@dataclass(kw_only=True)
class DiveBatch(NoiseRamp):
    """B = δ n Δ with the gradient diversity Δ over a set of n samples (Chen et al. 2025).

    https://arxiv.org/abs/2509.16173. Δ = Σ‖g_i‖² / ‖Σ g_i‖² is (‖G‖² + tr Σ) / (n ‖G‖²), so n Δ =
    1 + B_noise, whatever n is: no sums over the set are taken here, and the batch only grows.

    Attributes:
        delta: δ.
    """

    delta: float = real("batch.delta", 1.0, above=0.0)

    def desired(self, batch_size: int, readings: Readings) -> float:
        del batch_size
        return self.delta * (1 + least_noise_scale(readings))


@dataclass(kw_only=True)
class CABS(NoiseRamp):
    """B = lr tr Σ / loss: coupled to the learning rate (Balles et al. 2017).

    https://arxiv.org/abs/1612.05086, for SGD and a loss whose least value is near 0. It does not
    ask for ‖G‖², and it follows the learning rate: a scaling rule that raises lr with the batch
    feeds back into it, so it belongs with `scaling=none`. The loss is that of the last batch alone;
    `votes` is what steadies it.
    """

    def desired(self, batch_size: int, readings: Readings) -> float:
        del batch_size
        trace, loss = number(readings, "grad_trace"), number(readings, "loss")
        if not (trace > 0 and loss > 0):
            return math.nan
        return number(readings, "lr") * trace / loss


class StepTimes:
    """The last few measured times of each batch size.

    Medians, because the first steps at a batch size may take a hundred times as long (compilation,
    allocation): in a mean over a few boundaries that would stay for good once the batch has grown.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {}

    def __contains__(self, batch_size: int) -> bool:
        return batch_size in self._seconds

    def add(self, batch_size: int, seconds: float) -> None:
        """Take in the seconds a step of `batch_size` samples took."""
        self._seconds.setdefault(batch_size, deque(maxlen=NUM_KEPT)).append(seconds)

    def medians(self) -> dict[int, float]:
        """Seconds a step by batch size."""
        return {size: median(seconds) for size, seconds in self._seconds.items()}

    def fit(self) -> tuple[float, float]:
        """(a, b) of a step's seconds a + b · batch size, with the least squares of relative errors.

        One batch size alone is taken to say a; b is then 0.
        """
        times = self.medians()
        assert times
        if len(times) == 1:
            return next(iter(times.values())), 0.0
        weights = {size: seconds**-2 for size, seconds in times.items()}
        total = sum(weights.values())
        mean_size = sum(weights[size] * size for size in times) / total
        mean_seconds = sum(weights[size] * times[size] for size in times) / total
        offsets = {size: size - mean_size for size in times}
        covariance = sum(weights[size] * offsets[size] * times[size] for size in times)
        variance = sum(weights[size] * offsets[size] ** 2 for size in times)
        slope = covariance / variance
        return mean_seconds - slope * mean_size, slope

    def state_dict(self) -> list[Any]:
        """What was measured, in plain numbers."""
        return [[size, list(seconds)] for size, seconds in self._seconds.items()]

    def load_state_dict(self, state: list[Any]) -> None:
        """Resume from a `state_dict`."""
        self._seconds = {
            int(size): deque(map(float, seconds), maxlen=NUM_KEPT) for size, seconds in state
        }


@dataclass(kw_only=True)
class Goodput(NoiseRamp):
    """The most progress a second: throughput times efficiency (Pollux, Qiao et al. 2021).

    https://arxiv.org/abs/2008.12260. At batch B a step takes a + b B seconds, so that B / (a + b B)
    samples pass a second, each worth 1 / (B_noise + B) of what it is worth alone up to a factor.
    The derivative of B / ((a + b B)(B_noise + B)) has the sign of a B_noise - b B²: the most is at
    B = √(B_noise a/b), the √-law with the measured exchange rate r = a/b. Pollux fits a model of
    gradient and network time that overlap; here they add up.

    a and b are fitted to the `step_seconds` of the batch sizes seen so far. As long as that is one,
    a step is taken to cost the same whatever its batch, and the ramp tries the next rung; from then
    on no boundary votes before the batch size in hand was measured. What it decides depends on
    the machine: two runs of one configuration may differ.
    """

    step_times: StepTimes = field(init=False, repr=False, default_factory=StepTimes)

    def decide(self, samples: int, readings: Readings) -> int:
        seconds = number(readings, "step_seconds")
        if seconds > 0:
            self.step_times.add(self.batch_size, seconds)
        return super().decide(samples, readings)

    def desired(self, batch_size: int, readings: Readings) -> float:
        del batch_size
        if self.batch_size not in self.step_times:
            return math.nan
        overhead, per_sample = self.step_times.fit()
        return best_goodput(least_noise_scale(readings), overhead, per_sample)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"step_seconds": self.step_times.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.step_times.load_state_dict(state["step_seconds"])


def best_goodput(noise_scale: float, overhead_seconds: float, seconds_per_sample: float) -> float:
    """The batch size of the most progress a second, in samples.

    0 where a step's time is all its samples', infinite where none of it is.
    """
    if math.isnan(noise_scale) or noise_scale <= 0:
        return math.nan
    if overhead_seconds <= 0:
        return 0.0
    if seconds_per_sample <= 0:
        return math.inf
    return math.sqrt(noise_scale * overhead_seconds / seconds_per_sample)


def least_noise_scale(readings: Readings) -> float:
    """The lower end of B_noise's 95% interval, in samples; NaN where there is none."""
    return number(readings, "noise_scale") / _margin(readings)


def most_grad_sq_norm(readings: Readings) -> float:
    """The upper end of ‖G‖²'s 95% interval; 0 where its mean is not positive."""
    grad = number(readings, "grad_sq_norm")
    return 0.0 if grad <= 0 else grad * _margin(readings)


def _margin(readings: Readings) -> float:
    """Upper end of ‖G‖² over its mean, NaN where that is not known.

    The error of R = tr Σ / ‖G‖² is that of ‖G‖² where the noise is large, so 1 + 1.96 E / R.
    """
    scale, error = number(readings, "noise_scale"), number(readings, "noise_scale_error")
    return 1 + NORMAL_QUANTILE * error / scale if scale > 0 and error >= 0 else math.nan


def number(readings: Readings, name: str) -> float:
    """A reading; NaN where it is missing or infinite."""
    value = readings.get(name, math.nan)
    return value if math.isfinite(value) else math.nan
