"""Time to target on N tiles, where it can be computed by hand."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from largebatch.benchmarks.collectives.models import Cluster, Link, hierarchical_seconds
from largebatch.benchmarks.time_to_target.command import main
from largebatch.benchmarks.time_to_target.model import Step, bubble, time_curves
from largebatch.study.statistics.table import SeedSteps

S_MIN, E_MIN = 20.0, 40_000.0  # B_crit is 2,000
FREE = Link(0.0, 0.0)
BATCHES = (64, 256, 1024, 4096, 16_384)
LUCK = (0.95, 1.0, 1.05)


def rows(luck: tuple[float, ...] = LUCK) -> list[SeedSteps]:
    """Seeds that need so many times the steps at every batch size alike."""
    return [
        SeedSteps("adamw", batch, seed, (S_MIN + E_MIN / batch) * factor)
        for batch in BATCHES
        for seed, factor in enumerate(luck)
    ]


def made(**changes: float) -> Step:
    known = {"sample_seconds": 0.01, "gradient_bytes": 0}
    return Step(Cluster(1, 1, FREE, FREE), **known | changes)  # type: ignore[arg-type]


def mean(luck: tuple[float, ...]) -> float:
    return math.exp(float(np.mean(np.log(luck))))


def test_without_sums_more_tiles_do_not_pay_beyond_the_critical_batch() -> None:
    (curve,) = time_curves(rows(), made(), [1, 16, 1024, 4096], 65_536)
    # One sample a tile: E(N) = E_min + S_min N is twice E(1) at B_crit + 2.
    assert curve.pays_to is not None
    assert curve.pays_to.value == pytest.approx(E_MIN / S_MIN + 2, rel=2e-3)
    # All seeds agree on B_crit, whatever their steps.
    assert curve.pays_to.low == pytest.approx(curve.pays_to.high, rel=1e-6)
    for point in curve.points:
        steps = (S_MIN + E_MIN / point.tiles) * mean(LUCK)
        assert (point.batch_size, point.micro_batches) == (point.tiles, 1)
        assert point.steps == pytest.approx(steps, rel=1e-4)
        assert point.seconds.value == pytest.approx(steps * 0.01, rel=1e-4)
        assert point.node_hours.value == pytest.approx(steps * 0.01 * point.tiles / 3600, rel=1e-4)
        assert point.efficiency == pytest.approx(
            (E_MIN + S_MIN) / (E_MIN + S_MIN * point.tiles), rel=1e-4
        )
        assert point.beyond == (point.tiles > 16_384)
    assert curve.fastest == 65_536


def test_the_interval_of_the_time_is_the_jackknifes() -> None:
    (curve,) = time_curves(rows(), made(), [64], 1024)
    logs = np.log(LUCK)
    without = np.array([np.mean(np.delete(logs, seed)) for seed in range(3)])
    error = math.sqrt(2 / 3 * float(np.sum((without - without.mean()) ** 2)))
    seconds = curve.points[0].seconds
    assert seconds.high is not None
    assert math.log(seconds.high / seconds.value) == pytest.approx(4.302653 * error, rel=1e-3)


def test_sums_take_what_the_cost_model_says_and_ask_for_larger_batches() -> None:
    cluster = Cluster(12, 8, Link(2e-6, 1 / 15e9), Link(2e-6, 4e-11))
    step = Step(cluster, 1e-3, 4 * 10**8, overlap=0.25)
    (curve,) = time_curves(rows(), step, [12, 1200], 10_624)
    small, large = curve.points
    ring = hierarchical_seconds(cluster, 100, 4e8, "rabenseifner")
    assert large.sum_seconds <= 0.75 * ring
    # The best m: of S(B) (m c + a) with B = N m, least where m is about √(E_min a / (N c S_min)).
    best = math.sqrt(E_MIN / S_MIN * large.sum_seconds / (1200 * 1e-3))
    assert best / 1.2 < large.micro_batches < best * 1.2
    assert large.step_seconds == pytest.approx(large.micro_batches * 1e-3 + large.sum_seconds)
    free = time_curves(rows(), Step(cluster, 1e-3, 0), [12, 1200], 10_624)[0]
    assert free.points[1].micro_batches == 1
    assert curve.pays_to is not None
    assert free.pays_to is not None
    assert curve.pays_to.value < free.pays_to.value
    assert small.seconds.value > large.seconds.value


def test_a_pipeline_idles_less_the_more_micro_batches_there_are() -> None:
    assert bubble(1, 1) == 0.0
    assert bubble(4, 1) == 0.75
    assert bubble(4, 9) == 0.25
    (curve,) = time_curves(rows(), made(stages=4, micro_batch=2), [4, 256], 4096)
    for point in curve.points:
        replicas = point.tiles // 4
        assert point.batch_size == replicas * 2 * point.micro_batches
        idle = bubble(4, point.micro_batches)
        busy = point.batch_size / replicas * 0.01 / 4
        assert point.step_seconds == pytest.approx(busy / (1 - idle))
    # On few replicas a bubble is cheaper to shrink than the batch is to keep small.
    assert curve.points[0].micro_batches > curve.points[1].micro_batches > 1


def test_the_command_prints_its_assumptions_and_writes_what_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["optimizer,batch_size,lr,seed,outcome,steps,num_steps,chosen,run"]
    lines += [
        f"{row.optimizer},{row.batch_size},0.1,{row.seed},reached,{row.steps},9,true,x"
        for row in rows()
    ]
    (tmp_path / "basin.csv").write_text("\n".join([*lines, "adamw,64,0.2,0,missed,,9,false,x"]))
    words = [str(tmp_path), "--sample-seconds", "0.01", "--parameters", "1e7"]
    assert main([*words, "--nodes", "1,100,10624", "--out", str(tmp_path)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "assumed: 40 MB of gradients are summed at each step over all tiles, 0% of it" in printed
    assert "adamw: more tiles do not pay beyond " in printed
    found = list(csv.DictReader((tmp_path / "time.csv").read_text().splitlines()))
    assert [row["tiles"] for row in found] == ["12", "1200", "127488"]
    assert found[-1]["extrapolated"] == "true"
    assert (tmp_path / "time.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--parameters", "1e7"], "--sample-seconds or --run must be given"),
        (["--sample-seconds", "0", "--parameters", "1"], "--sample-seconds must be above 0"),
        (["--sample-seconds", "1", "--parameters", "1", "--stages", "5"], "--stages must be a div"),
        (["--sample-seconds", "1", "--parameters", "1", "--nodes", "x"], "--nodes must be whole"),
        (["--sample-seconds", "1", "--parameters", "1"], "no such folder"),
    ],
)
def test_what_cannot_be_projected_is_refused(
    words: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "none"), *words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert named in said
