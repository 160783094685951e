"""`largebatch bench transfer`: the search finds a basin's best rate, the table how far apart."""

from pathlib import Path
from statistics import fmean

import pytest

from largebatch.benchmarks import command
from largebatch.benchmarks.transfer import (
    Ratio,
    configured,
    draw,
    measure,
    ratios,
    search,
    table,
    vertex,
)


@pytest.mark.parametrize("best", [-7.3, -1.0, 0.4, 6.8])
def test_the_search_walks_to_the_best_rate_with_both_its_neighbours(best: float) -> None:
    losses = search(lambda power: (power - best) ** 2, start=0)
    assert vertex(losses) == pytest.approx(best)
    assert len(losses) <= 10


def test_rates_that_diverge_are_worse_than_any() -> None:
    losses = search(lambda power: float("inf") if power > 3 else -power, start=0)
    assert min(losses, key=losses.__getitem__) == 3
    assert vertex(losses) == 3.0  # no parabola through what is infinite


def test_runs_are_made_and_what_comes_out_is_told(tmp_path: Path) -> None:
    few = ["task.sequence_length=8", "task.num_eval=8", "model.depth=1", "task.num_bytes=20000"]
    record = measure(["adamw"], [16, 32], few, steps=10, samples=2, seeds=2)
    assert [(c["width"], c["transferred"]) for c in record["curves"]] == [
        (16, True), (32, True), (32, False),
    ]  # fmt: skip
    for curve in record["curves"]:
        means = [fmean(losses) for losses in curve["losses"].values()]
        assert curve["best_loss"] == min(means)
        assert all(first != second for first, second in curve["losses"].values())
        assert len(curve["best_lr_of_seeds"]) == 2
        rates = list(curve["losses"])
        near = sorted(rates, key=lambda rate: abs(rate - curve["best_lr"]))[:2]
        assert rates[means.index(min(means))] in near
    assert set(ratios(record)) == {"adamw"}
    assert table(record).splitlines()[2].startswith("| adamw | ")
    draw(record, tmp_path / "transfer.png")
    assert (tmp_path / "transfer.png").stat().st_size > 5_000


def test_a_rule_that_is_asked_for_is_not_one_rate_for_all() -> None:
    asked = ["scaling.step=relative"]
    assert configured("lamb", 32, 16, asked).scaling.step == "relative"
    assert configured("lamb", 32, None, asked).scaling.step is None


def test_the_mean_s_ratio_stands_beside_those_of_seeds_alone() -> None:
    def curve(width: int, best: float, of_seeds: list[float]) -> dict[str, object]:
        return {
            "optimizer": "lamb", "width": width, "best_lr": best, "best_loss": 2.0,
            "best_lr_of_seeds": of_seeds,
        }  # fmt: skip

    record = {
        "widths": [16, 32],
        "curves": [
            curve(16, 0.5, [0.5, 0.25, 1.0]),
            curve(32, 0.25, [0.25, 0.375, 0.5]),
            curve(32, 0.125, [0.125, 0.125, 0.125]),
        ],
    }
    found = ratios(record)["lamb"]
    assert found == (Ratio(0.5, 0.5, 1.5), Ratio(0.25, 0.125, 0.5))
    assert "| 0.50 (0.50 to 1.50) | no |" in table(record)


def test_options_that_cannot_be_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["--widths", "64"], "--widths must be two or more, got 64"),
        (["--steps", "3"], "--steps must be 10 or more, got 3"),
        (["--seeds", "0"], "--seeds must be 1 or more, got 0"),
    ):
        assert command.main(["transfer", *words]) == 2
        assert said in capsys.readouterr().err
