"""Final losses at a budget: their statistics, and what a report makes of a folder of them."""

import csv
import json
import math
import statistics
from pathlib import Path

import pytest
from study_records import record

from largebatch.study import read_study
from largebatch.study.final_loss.answers import loss_answers
from largebatch.study.report import main, write_report
from largebatch.study.statistics.losses import SeedLoss, batch_excess, loss_means, loss_pairs

SEEDS = (2, 3, 4, 5, 6)
LUCK = (0.0, 0.01, -0.01, 0.02, -0.02)
BUDGETS = (16_384, 65_536)
BATCHES = (64, 256, 1024)


def loss_at(optimizer: str, batch: int, budget: int) -> float:
    """sgd is 0.1 worse at the small budget and 0.05 better at the large; all lose at 1,024."""
    shift = {16_384: 0.1, 65_536: -0.05}[budget] * (optimizer == "sgd")
    return 2.0 + 4_000 / budget + shift + 0.08 * (batch == 1024)


def record_losses(root: Path, seeds: tuple[int, ...] = SEEDS, *, decided: bool = True) -> None:
    """A study as the trainer leaves it: trunks, branches at three rates, decisions."""
    points = []
    for optimizer in ("adamw", "sgd"):
        for batch in BATCHES:
            for budget in BUDGETS:
                for trial, worse in ((0.5, 0.05), (1.0, 0.0), (2.0, 0.4)):
                    for place, seed in enumerate((0, *seeds) if worse else (0, 1, *seeds)):
                        if worse and seed != 0:
                            continue
                        folder = root / optimizer / f"{batch}-{trial}" / f"seed-{seed}"
                        loss = loss_at(optimizer, batch, budget) + worse
                        luck = LUCK[(place + len(optimizer) * batch) % 5] if seed > 1 else -0.5
                        gone = trial == 2.0 and batch == 64
                        record(
                            folder / f"decay-{budget}", None, optimizer=optimizer, seed=seed,
                            batch_size=batch, lr=0.01 * trial, target_loss=None, samples=budget,
                            budget_samples=budget, eval_loss=None if gone else loss + luck,
                            status="diverged" if gone else "exhausted",
                        )  # fmt: skip
                points.append(
                    {
                        "optimizer": optimizer, "batch_size": batch, "chosen": {"lr": 0.01},
                        "dropped": [], "open_below": False, "open_above": False, "trials": 9,
                        "budget": budget,
                    }
                )  # fmt: skip
            trunk = root / optimizer / f"{batch}-1.0" / "seed-0" / "trunk-52429"
            record(
                trunk, None, optimizer=optimizer, batch_size=batch, target_loss=None,
                give_up_samples=52_429, samples=52_429, budget_samples=65_536,
            )  # fmt: skip
    decisions = {
        "select_seeds": [0, 1], "report_seeds": list(seeds), "points": points, "same_rules": [],
        "tuned": {"adamw": [], "sgd": []},
    }  # fmt: skip
    if decided:
        (root / "study.json").write_text(json.dumps({"decisions": decisions}))


def test_a_mean_has_students_interval_moderated_over_batch_sizes() -> None:
    rows = [SeedLoss("adamw", 64, seed, loss) for seed, loss in enumerate((2.0, 2.1, 2.3))]
    (mean,) = loss_means(rows)["adamw"]
    reach = 4.302653 * statistics.stdev((2.0, 2.1, 2.3)) / math.sqrt(3)
    assert mean.loss.value == pytest.approx(2.1 + 1 / 30)
    assert mean.loss.low == pytest.approx(mean.loss.value - reach)
    # Of two batch sizes with as many seeds each has its own variance: a fifth of 2 is none.
    rows += [SeedLoss("adamw", 128, seed, 1.0 + loss) for seed, loss in enumerate((2.0, 2.0, 2.9))]
    assert loss_means(rows)["adamw"][0].loss.low == pytest.approx(mean.loss.low)


def test_differences_are_of_common_seeds_and_held_by_holm() -> None:
    luck = (0.0, 0.3, -0.2, 0.1)
    rows = [
        SeedLoss(name, batch, seed, 2.0 + shift + wobble * (seed % 2) + lucky)
        for name, wobble in (("adamw", 0.0), ("lamb", 0.01))
        for batch, shift in ((64, 0.0), (256, 0.1 * (name == "lamb")))
        for seed, lucky in enumerate(luck)
    ]
    (pair,) = loss_pairs(rows)
    assert [round(one.difference.value, 6) for one in pair.points] == [0.005, 0.105]
    assert [one.verdict for one in pair.points] == ["not told apart", "higher"]
    assert pair.points[0].p == pytest.approx(0.181690, abs=1e-5)  # t = √3, 3 degrees of freedom
    excess = batch_excess(rows)
    assert [(one.batch_size, one.verdict) for one in excess["lamb"]] == [(256, "higher")]
    assert excess["lamb"][0].difference.value == pytest.approx(0.1)
    with pytest.raises(ValueError, match="one row a seed"):
        loss_means([*rows, rows[0]])


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("losses")
    record_losses(folder)
    write_report(folder)
    return folder


def test_a_point_is_the_report_seeds_at_the_chosen_rate(reported: Path) -> None:
    (section,) = read_study(reported).losses
    assert section.title == "bytes: final loss after 16,384 and 65,536 samples"
    small, large = section.budgets
    assert (small.names, large.names) == (["adamw", "sgd"], ["sgd", "adamw"])
    for budget in section.budgets:
        for name, points in budget.points.items():
            for point in points:
                assert sorted(point.losses) == [*SEEDS]
                mean = budget.mean(name, point.batch_size)
                assert mean is not None
                expected = loss_at(name, point.batch_size, budget.budget)
                assert mean.loss.value == pytest.approx(expected)
                assert (point.lr, point.at_edge, point.selected_by_others) == (0.01, False, True)


def test_the_answers_say_who_ends_lowest_where_the_batch_costs_and_how_sure(
    reported: Path,
) -> None:
    (section,) = read_study(reported).losses
    told = dict(loss_answers(section))
    small, large = (f"Lowest loss after {budget:,} samples" for budget in BUDGETS)
    assert told[small].startswith("adamw ends lowest: 2.244 (2.2")
    assert "sgd ends 0.1 higher at every batch size" in told[small]
    assert told[large].startswith("sgd ends lowest: 2.011 (")
    far = told["How far, at 65,536 samples"]
    assert "sgd loses nothing that its seeds can tell up to 256, and ends 0.08 (" in far
    assert "higher at 1,024 than at" in far
    assert "seeds 2 to 6, which had no say in the rates (seeds 0 and 1 chose" in told["How sure"]
    assert "Seeds differ by 0.016 in loss" in told["How sure"]


def test_page_picture_and_tables_hold_every_point(reported: Path) -> None:
    page = (reported / "report.html").read_text()
    assert "final loss after 16,384 and 65,536 samples" in page
    assert "sgd ends lowest" in page
    assert "no target" not in page
    rows = list(csv.DictReader((reported / "final_loss.csv").read_text().splitlines()))
    assert len(rows) == 12
    for row in rows:
        expected = loss_at(row["optimizer"], int(row["batch_size"]), int(row["budget"]))
        assert float(row["loss"]) == pytest.approx(expected, rel=1e-4)
        assert float(row["low"]) < expected < float(row["high"])
        assert (row["seeds"], row["missed"]) == ("5", "false")
    pairs = list(csv.DictReader((reported / "loss_pairs.csv").read_text().splitlines()))
    assert {(row["optimizer"], row["budget"], row["verdict"]) for row in pairs} == {
        ("sgd", "16384", "higher"), ("adamw", "65536", "higher"),
    }  # fmt: skip
    basin = list(csv.DictReader((reported / "loss_basin.csv").read_text().splitlines()))
    assert len(basin) == 2 * 3 * 2 * 9  # no trunks
    assert sum(row["chosen"] == "true" for row in basin) == 60
    assert {row["status"] for row in basin if row["loss"] == ""} == {"diverged"}
    assert (reported / "final_loss.png").stat().st_size > 10_000
    assert not (reported / "curve.csv").exists()


def test_plain_runs_without_a_target_are_reported_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record_losses(tmp_path, (2,), decided=False)
    assert main([str(tmp_path)]) == 0
    assert "which chose the rates too: that flatters them" in " ".join(
        capsys.readouterr().out.split()
    )
    (section,) = read_study(tmp_path).losses
    for budget in section.budgets:
        for points in budget.points.values():
            # Seeds 0, 1 and 2 at one rate, one seed at the others: the rate of most seeds counts.
            assert {(point.lr, len(point.losses)) for point in points} == {(0.01, 3)}


def test_both_questions_stand_on_one_page(reported: Path, tmp_path: Path) -> None:
    steps = tmp_path / "steps"
    for seed in SEEDS:
        record(steps / f"{seed}", 100 + seed, seed=seed)
    report = write_report(steps, reported, out=tmp_path / "out")
    page = report.html.read_text()
    assert '<h2 id="task-2">bytes: final loss after' in page
    assert {"curve", "final_loss", "loss_pairs"} <= report.tables.keys()
