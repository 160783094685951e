"""From steps against batch size to time against tiles.

A run on N tiles has R = N / p replicas of p pipeline stages, each of which takes m micro-batches of
b samples a step, so that the global batch is B = R m b. A step lasts

    t(B, N) = b (c / p) (m + p - 1) + s + (1 - o) a(N)

with c seconds of one tile for one sample, s seconds that no split makes shorter, a(N) those of the
gradient's all-reduce by the cost model of `benchmarks/collectives`, of which the share o is hidden
behind the backward pass. (m + p - 1) / m is what a pipeline's bubble costs: (p - 1) / (m + p - 1)
of its time is idle (Huang et al. 2019, arXiv:1811.06965). Time to the target is S(B) t(B, N), S(B)
the fitted curve; m is chosen for each N. Node-hours grow where B goes beyond the curve's bend and
where sums take longer. Beyond the tiles on which a run takes twice the node-hours of one node (or
by another efficiency) more do not pay: without sums, overhead and bubble that is where one sample a
tile makes a batch of about B_crit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from largebatch.benchmarks.collectives.models import Cluster, project
from largebatch.study.statistics.intervals import Estimate, refit_table
from largebatch.study.statistics.jackknife import Refits
from largebatch.study.statistics.solver import Array, Counts
from largebatch.study.statistics.table import SeedSteps, StepsTable, table_of

MICRO_BATCHES: Final = np.unique(np.round(2 ** (np.arange(81) / 4)))
"""Numbers of micro-batches that are tried, to a million."""
STEPS_AN_OCTAVE: Final = 8
CONFIDENCE: Final = 0.95


@dataclass(frozen=True)
class Step:
    """What a step takes.

    Attributes:
        sample_seconds: c, of one tile for forward and backward pass of one sample.
        fixed_seconds: s.
        gradient_bytes: that are summed over all tiles.
        overlap: o, from 0 to 1.
        stages: p; `micro_batch` is b.
    """

    cluster: Cluster
    sample_seconds: float
    gradient_bytes: int
    fixed_seconds: float = 0.0
    overlap: float = 0.0
    stages: int = 1
    micro_batch: int = 1

    def replicas(self, tiles: int) -> int:
        """Copies of the model."""
        return tiles // self.stages

    def batch(self, tiles: int, micro_batches: Array | float) -> Array:
        """The global batch size, in samples."""
        return np.asarray(self.replicas(tiles) * self.micro_batch * micro_batches, np.float64)

    def compute_seconds(self, micro_batches: Array | float) -> Array:
        """Of a step without its sums."""
        one = self.micro_batch * self.sample_seconds / self.stages
        return np.asarray(one * (micro_batches + self.stages - 1) + self.fixed_seconds, np.float64)

    def sum_seconds(self, tiles: int) -> float:
        """Of a step's all-reduce, as far as nothing hides it."""
        ranks = min(tiles, self.cluster.ranks_per_node)
        if tiles == 1:
            return 0.0
        cluster = Cluster(ranks, self.cluster.adapters, self.cluster.inside, self.cluster.out)
        nodes = tiles // ranks
        seconds = project(cluster, nodes, self.gradient_bytes).seconds
        return (1 - self.overlap) * min(seconds.values())


def bubble(stages: int, micro_batches: float) -> float:
    """The share of a pipeline's time that is idle.

    >>> [round(bubble(8, micro_batches), 3) for micro_batches in (1, 8, 56)]
    [0.875, 0.467, 0.111]
    """
    return (stages - 1) / (micro_batches + stages - 1)


@dataclass(frozen=True)
class TimePoint:
    """One curve on so many tiles; `seconds` and `node_hours` with their intervals.

    Attributes:
        beyond: the batch size is larger than any that was tried.
    """

    nodes: float
    tiles: int
    batch_size: int
    micro_batches: int
    steps: float
    step_seconds: float
    sum_seconds: float
    seconds: Estimate
    node_hours: Estimate
    efficiency: float
    beyond: bool


@dataclass(frozen=True)
class TimeCurve:
    """One optimizer.

    Attributes:
        pays_to: tiles beyond which the efficiency is below what is asked; None: more than were
            looked at.
        fastest: tiles of the least time, of those looked at.
    """

    optimizer: str
    points: Sequence[TimePoint]
    pays_to: Estimate | None
    fastest: int


def time_curves(
    rows: Sequence[SeedSteps], step: Step, tiles: Sequence[int], most_nodes: int,
    efficiency: float = 0.5,
) -> list[TimeCurve]:  # fmt: skip
    """Time and node-hours of each optimizer that has a fit, on each number of tiles.

    Intervals are the jackknife's over seeds, every seed left out of the curve, of the choice of m
    and of what follows; nothing of the machine's numbers is in them.

    Raises:
        ValueError: no optimizer has a fit.
    """
    table = table_of(rows)
    refits = refit_table(table, CONFIDENCE)
    fitted = np.flatnonzero(~np.isnan(refits.curves.b_crit[:, 0]))
    if not len(fitted):
        raise ValueError("no optimizer has a fit, which needs three batch sizes that reached")
    fine = _fine(step, most_nodes)
    base = _times(refits, step, fine[0])[0] * fine[0]  # (curves, 1 + seeds), tile-seconds
    dense = np.stack([_times(refits, step, count)[0] * count for count in fine])
    shares = base / dense  # (tiles, curves, 1 + seeds)
    pays = np.log(_crossings(np.log(fine), shares, efficiency))
    found = []
    for one in fitted.tolist():
        points = [_point(refits, table, step, one, count, base) for count in tiles]
        least = fine[int(np.argmin(dense[:, one, 0] / fine))]
        found.append(
            TimeCurve(table.optimizers[one], points, _estimate(refits, pays, one), int(least))
        )
    return found


def _fine(step: Step, most_nodes: int) -> Counts:
    """Whole nodes from one to the most, in even ratios."""
    octaves = math.log2(most_nodes)
    powers = np.arange(math.floor(octaves * STEPS_AN_OCTAVE) + 1) / STEPS_AN_OCTAVE
    nodes = np.unique(np.append(np.round(2**powers), most_nodes)).astype(np.int64)
    counts: Counts = nodes * max(step.cluster.ranks_per_node, step.stages)
    return counts


def _times(refits: Refits, step: Step, tiles: int) -> tuple[Array, Array]:
    """The least seconds over m, (curves, 1 + seeds), and the m of each."""
    steps = _steps(refits, step.batch(int(tiles), MICRO_BATCHES))
    each = step.compute_seconds(MICRO_BATCHES) + step.sum_seconds(int(tiles))
    seconds = np.where(np.isnan(steps), np.inf, steps * each)
    best = np.argmin(seconds, axis=-1)
    least = np.take_along_axis(seconds, best[..., None], axis=-1)[..., 0]
    return np.where(np.isinf(least), np.nan, least), MICRO_BATCHES[best]


def _steps(refits: Refits, batch: Array) -> Array:
    """Steps of the printed fits at batch sizes: (curves, 1 + seeds, batch sizes)."""
    curves = refits.curves
    n = np.where(refits.shape_is_one[:, None], 1.0, curves.shape)[..., None]
    e_min, s_min = curves.e_min[..., None], curves.s_min[..., None]
    powers: Array = (s_min**n + (e_min / batch) ** n) ** (1 / n)
    return powers


def _point(
    refits: Refits, table: StepsTable, step: Step, one: int, tiles: int, base: Array
) -> TimePoint:
    seconds, chosen = _times(refits, step, tiles)
    time = _estimate(refits, np.log(seconds), one)
    assert time is not None
    nodes, m = tiles / step.cluster.ranks_per_node, float(chosen[one, 0])
    batch = step.batch(tiles, m)
    ends = (time.low, time.high)
    hours = [None if end is None else end * nodes / 3600 for end in ends]
    tried = table.batch_sizes[~np.isnan(table.points[one]).all(axis=1)]
    return TimePoint(
        nodes=nodes,
        tiles=tiles,
        batch_size=int(batch),
        micro_batches=int(m),
        steps=float(_steps(refits, batch[None])[one, 0, 0]),
        step_seconds=float(step.compute_seconds(m) + step.sum_seconds(tiles)),
        sum_seconds=step.sum_seconds(tiles),
        seconds=time,
        node_hours=Estimate(time.value * nodes / 3600, *hours),
        efficiency=float(base[one, 0] / (seconds[one, 0] * tiles)),
        beyond=bool(batch > tried.max()),
    )


def _estimate(refits: Refits, logs: Array, one: int) -> Estimate | None:
    """Of logarithms (curves, 1 + seeds), one curve's, with its interval where all are known."""
    if math.isnan(logs[one, 0]):
        return None
    interval = refits.interval(logs, CONFIDENCE)
    low, high = math.exp(interval.low[one]), math.exp(interval.high[one])
    known = math.isfinite(low) and math.isfinite(high)
    value = math.exp(interval.value[one])
    return Estimate(value, low, high) if known else Estimate(value)


def _crossings(log_tiles: Array, shares: Array, wanted: float) -> Array:
    """The tiles at which the efficiency, (tiles, …), falls below what is wanted, interpolated; NaN
    where it never does.
    """
    below = shares < wanted
    place = np.argmax(below, axis=0)
    never = ~below.any(axis=0) | np.isnan(shares).any(axis=0)
    after = np.maximum(place, 1)
    left = np.take_along_axis(shares, (after - 1)[None], axis=0)[0]
    right = np.take_along_axis(shares, after[None], axis=0)[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        part = (1 / wanted - 1 / left) / (1 / right - 1 / left)  # node-hours, nearly straight in N
    low, high = np.exp(log_tiles[after - 1]), np.exp(log_tiles[after])
    return np.where(never, np.nan, low + part * (high - low))
