"""`largebatch bench transfer`: the search finds a basin's best rate, the table how far apart."""

from pathlib import Path

import pytest

from largebatch.benchmarks import command
from largebatch.benchmarks.transfer import draw, measure, ratios, search, table, vertex


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
    record = measure(["adamw"], [16, 32], few, steps=10, samples=2)
    assert [(c["width"], c["transferred"]) for c in record["curves"]] == [
        (16, True), (32, True), (32, False),
    ]  # fmt: skip
    assert set(ratios(record)) == {"adamw"}
    assert table(record).splitlines()[2].startswith("| adamw | ")
    draw(record, tmp_path / "transfer.png")
    assert (tmp_path / "transfer.png").stat().st_size > 5_000


def test_options_that_cannot_be_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["--widths", "64"], "--widths must be two or more, got 64"),
        (["--steps", "3"], "--steps must be 10 or more, got 3"),
    ):
        assert command.main(["transfer", *words]) == 2
        assert said in capsys.readouterr().err
