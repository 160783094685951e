"""From run folders to tables, pictures and a page: what counts, what is left out, what is said."""

import csv
import io
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from study_records import STEPS, record, record_curves, record_study

from largebatch.study.points import StudyPoint
from largebatch.study.reading import read_runs
from largebatch.study.report import main, print_report, write_report
from largebatch.study.section_study import SectionStudy, read_study, runs

CURVE_COLUMNS = (
    "optimizer,batch_size,steps,samples,lr,trials,at_edge,missed,seeds,low,high,interpolated,cut"
)
pytestmark = pytest.mark.usefixtures("undrawn")

PICTURES = ("basins", "curve", "learning_rate", "ratio")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def only(folder: Path) -> SectionStudy:
    (section,) = read_study(folder).sections
    return section


def points(folder: Path) -> list[StudyPoint]:
    return only(folder).all_points


@pytest.mark.drawn
def test_a_study_becomes_its_files_with_exact_columns(tmp_path: Path) -> None:
    record_study(tmp_path / "runs", STEPS)
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    out = tmp_path / "out"
    drawn = [f"{name}.{kind}" for name in PICTURES for kind in ("png", "svg")]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["basin.csv", "curve.csv", "fits.csv", "pairs.csv", "report.html", *drawn]
    )
    lines = (out / "curve.csv").read_text().splitlines()
    assert lines[0] == CURVE_COLUMNS
    assert len(lines) == 1 + 4 * 9
    first = rows(out / "curve.csv")[0]
    assert (first["optimizer"], first["batch_size"], first["lr"]) == ("adamw", "64", "0.01")
    assert (first["trials"], first["seeds"], first["cut"]) == ("9", "5", "1")
    assert (first["at_edge"], first["missed"]) == ("false", "false")
    assert int(first["steps"]) * 64 == int(first["samples"])
    assert float(first["low"]) < float(first["interpolated"]) < float(first["high"])
    head = (out / "fits.csv").read_text().splitlines()[0]
    assert head.startswith("optimizer,s_min,e_min,b_crit,s_min_low,s_min_high,e_min_low")
    fits = {row["optimizer"]: row for row in rows(out / "fits.csv")}
    assert sorted(fits) == sorted(STEPS)
    assert float(fits["adamw"]["b_crit"]) == pytest.approx(1292, rel=0.03)
    low, value, high = (float(fits["sgd"][f"b_crit{end}"]) for end in ("_low", "", "_high"))
    assert low < value < high
    assert fits["adamw"]["identified"] == "true"
    trials = rows(out / "basin.csv")
    assert len(trials) == 4 * 9 * 9
    assert sum(row["chosen"] == "true" for row in trials) == 4 * 9 * 5
    assert {row["outcome"] for row in trials} == {"reached", "cut"}
    assert trials[0]["run"] == "adamw/batch-64/lr-0.007071/seed-0"
    told = [row for row in rows(out / "pairs.csv") if row["quantity"] == "steps"]
    assert len(told) == 6 * 9
    assert {row["verdict"] for row in told} <= {"more", "fewer", "not told apart"}
    for picture in PICTURES:
        data = (out / f"{picture}.png").read_bytes()
        assert data.startswith(b"\x89PNG")
        assert int.from_bytes(data[16:20], "big") == 1400  # 7 inches at 200 dots


def test_the_report_lands_beside_the_runs_by_default(tmp_path: Path) -> None:
    record(tmp_path / "run", 100)
    report = write_report(tmp_path)
    assert report.html == tmp_path / "report.html"
    assert report.html.exists()
    assert "rules" not in report.tables
    assert len((tmp_path / "fits.csv").read_text().splitlines()) == 1
    write_report(tmp_path)  # its own files do not disturb a second reading
    assert len(rows(tmp_path / "curve.csv")) == 1


def test_the_terminal_shows_points_answers_and_where_the_page_is(tmp_path: Path) -> None:
    record_study(tmp_path, {"adamw": STEPS["adamw"], "sgd": STEPS["sgd"]})
    shown = io.StringIO()
    print_report(write_report(tmp_path), Console(file=shown, width=300))
    text = shown.getvalue()
    assert "adamw needs the fewest steps" in text
    assert "Critical batch size" in text
    assert text.count("16,384") >= 2
    assert str(tmp_path / "report.html") in text


def test_report_seeds_make_the_point_and_selecting_seeds_do_not(tmp_path: Path) -> None:
    record_study(tmp_path, {"adamw": STEPS["adamw"]}, seeds=(2, 3, 4))
    first = points(tmp_path)[0]
    assert list(first.steps_by_seed) == [2, 3, 4]
    assert first.selected_by_others
    assert only(tmp_path).select_seeds == (0, 1)
    assert [trial.outcome for trial in first.basin].count("cut") == 1


def test_without_roles_the_rate_of_least_mean_log_steps_among_those_with_most_seeds_is_chosen(
    tmp_path: Path,
) -> None:
    for seed, steps in enumerate((100, 120, 300)):
        record(tmp_path / f"a{seed}", steps, seed=seed, lr=0.01)
    for seed, steps in enumerate((110, 110, 110)):
        record(tmp_path / f"b{seed}", steps, seed=seed, lr=0.02)
    for seed, steps in enumerate((40, 45)):
        record(tmp_path / f"c{seed}", steps, seed=seed, lr=0.04)
    (point,) = points(tmp_path)
    assert point.steps == pytest.approx(110)
    assert (point.lr, point.whole_steps, len(point.steps_by_seed)) == (0.02, 110, 3)
    assert not point.selected_by_others


def test_a_rate_at_which_a_seed_missed_is_not_chosen(tmp_path: Path) -> None:
    record(tmp_path / "a0", 50, lr=0.02)
    record(tmp_path / "a1", None, lr=0.02, seed=1)
    record(tmp_path / "b0", 200, lr=0.01)
    record(tmp_path / "b1", 210, lr=0.01, seed=1)
    (point,) = points(tmp_path)
    assert point.lr == 0.01
    assert point.steps == pytest.approx((200 * 210) ** 0.5)


def test_ties_go_to_the_lower_rate(tmp_path: Path) -> None:
    for name, lr in (("a", 0.04), ("b", 0.02), ("c", 0.01)):
        record(tmp_path / name, 100 if name != "c" else 130, lr=lr)
    (point,) = points(tmp_path)
    assert point.lr == 0.02
    assert not point.at_edge


def test_a_run_that_diverged_beyond_all_numbers_is_a_miss_and_not_left_out(tmp_path: Path) -> None:
    record(tmp_path / "a", 100, lr=0.01)
    record(tmp_path / "b", None, lr=0.02, status="diverged", eval_loss=4.75e33, loss=1e38)
    study = read_study(tmp_path)
    assert study.problems == []
    (point,) = study.sections[0].all_points
    assert (point.steps, point.trials) == (pytest.approx(100), 2)
    assert [trial.outcome for trial in point.basin] == ["reached", "diverged"]


def test_the_best_rate_at_an_end_of_those_tried_is_at_the_edge(tmp_path: Path) -> None:
    record(tmp_path / "64a", 100, lr=0.01)
    record(tmp_path / "128a", 60, lr=0.01, batch_size=128)
    record(tmp_path / "128b", 50, lr=0.02, batch_size=128)
    record(tmp_path / "256a", 40, lr=0.01, batch_size=256)
    record(tmp_path / "256b", 30, lr=0.02, batch_size=256)
    record(tmp_path / "256c", None, lr=0.04, batch_size=256)
    edges = {point.batch_size: point.at_edge for point in points(tmp_path)}
    assert edges == {64: True, 128: True, 256: False}


def test_one_rate_computed_in_two_ways_is_one_rate(tmp_path: Path) -> None:
    record(tmp_path / "a", 100, lr=0.01 * 2**0.5)
    record(tmp_path / "b", 110, lr=0.02 / 2**0.5 * (1 + 1e-15), seed=1)
    (point,) = points(tmp_path)
    assert (point.trials, len(point.steps_by_seed)) == (2, 2)


def test_a_missed_point_has_empty_cells(tmp_path: Path) -> None:
    record(tmp_path / "a", 100)
    record(tmp_path / "b", None, batch_size=128, lr=0.01)
    record(tmp_path / "c", None, batch_size=128, lr=0.02)
    write_report(tmp_path)
    assert (tmp_path / "curve.csv").read_text().splitlines()[
        2
    ] == "adamw,128,,,,2,false,true,0,,,,0"


def test_a_point_that_only_diverged_bounds_nothing_by_its_steps(tmp_path: Path) -> None:
    record(tmp_path / "a", None, status="diverged", steps=5)
    (alone,) = points(tmp_path)
    assert alone.lower_bound is None
    record(tmp_path / "0", None, status="diverged", steps=9, give_up_samples=6400)
    (limited,) = points(tmp_path)
    assert limited.lower_bound == 100
    record(tmp_path / "b", None, status="exhausted", steps=700, lr=0.02)
    record(tmp_path / "c", None, status="exhausted", steps=900, lr=0.04)
    (point,) = points(tmp_path)
    assert point.lower_bound == 700


def test_a_miss_below_all_points_bounds_the_fit_and_one_above_them_does_not(tmp_path: Path) -> None:
    for batch, steps in ((128, 320), (256, 160), (512, 80), (1024, 42)):
        record(tmp_path / f"{batch}", steps, batch_size=batch)

    def s_min() -> float:
        found = only(tmp_path).estimates["adamw"].s_min
        assert found is not None
        return found.value

    alone = s_min()
    record(tmp_path / "4096", None, batch_size=4096, steps=50)
    assert s_min() == alone
    record(tmp_path / "64", None, batch_size=64, steps=2000)
    assert s_min() < 0.9 * alone


def test_wall_clock_stands_beside_the_steps_and_is_that_of_the_median_run(tmp_path: Path) -> None:
    for seed, (steps, seconds) in enumerate(((90, 7.25), (100, 3.5), (300, 1.0))):
        record(tmp_path / str(seed), steps, seed=seed, seconds=seconds)
    report = write_report(tmp_path)
    assert report.study.sections[0].all_points[0].seconds == 3.5
    assert '<td data-n="3.5">3.5</td>' in report.html.read_text()


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_a_run_that_stopped_early_is_no_miss(tmp_path: Path, status: str) -> None:
    record(tmp_path / "a", 100)
    record(tmp_path / "b", None, status=status, lr=0.02)
    study = read_study(tmp_path)
    assert study.sections[0].all_points[0].trials == 1
    assert any(f"1 {status}" in problem for problem in study.problems)


def test_rule_runs_stand_beside_the_tuned_curve(tmp_path: Path) -> None:
    record(tmp_path / "a", 100, lr=0.01)
    record(tmp_path / "b", 40, lr=0.03, batch_size=256)
    scaling = {"rule": "sqrt", "base_batch": 64}
    record(tmp_path / "r0", 30, lr=0.02, batch_size=256, scaling=scaling)
    record(tmp_path / "r1", 50, lr=0.02, batch_size=256, scaling=scaling, seed=1)
    linear = {"rule": "linear", "base_batch": 64}
    record(tmp_path / "l", None, lr=0.04, batch_size=256, scaling=linear)
    report = write_report(tmp_path)
    assert [row["steps"] for row in rows(tmp_path / "curve.csv")] == ["100", "40"]
    assert (tmp_path / "rules.csv").read_text().splitlines() == [
        "optimizer,rule,base_batch,batch_size,lr,steps,tuned_steps,ratio,seeds,missed,same_runs",
        "adamw,linear,64,256,0.04,,40,,1,1,false",
        # Its seed 1 has no tuned run to be compared with.
        "adamw,sqrt,64,256,0.02,38.7298,40,0.75,2,0,false",
    ]
    assert "Scaling rules" in report.html.read_text()
    shown = io.StringIO()
    print_report(report, Console(file=shown, width=100))
    assert "0.75" in shown.getvalue()


def test_a_rule_whose_rate_is_the_tuned_one_is_said_to_be_the_same_runs(tmp_path: Path) -> None:
    record_study(tmp_path, {"adamw": STEPS["adamw"]})
    path = tmp_path / "study.json"
    known = json.loads(path.read_text())
    same = {"optimizer": "adamw", "rule": "sqrt", "base_batch": 64, "batch_size": 256}
    known["decisions"]["same_rules"] = [same]
    path.write_text(json.dumps(known))
    report = write_report(tmp_path)
    (row,) = rows(tmp_path / "rules.csv")
    assert (row["ratio"], row["same_runs"], row["seeds"]) == ("1", "true", "5")
    assert "same runs" in report.html.read_text()


def test_an_optimizer_with_rule_runs_only_has_these_as_its_curve(tmp_path: Path) -> None:
    for batch in (64, 256):
        scaling = {"rule": "sqrt", "base_batch": 64}
        record(tmp_path / f"{batch}", 6400 // batch, batch_size=batch, scaling=scaling)
    report = write_report(tmp_path)
    assert [row["steps"] for row in rows(tmp_path / "curve.csv")] == ["100", "25"]
    assert not (tmp_path / "rules.csv").exists()
    assert "no rate was searched" in report.html.read_text()


def test_broken_and_unfinished_folders_are_named_and_skipped(tmp_path: Path) -> None:
    record(tmp_path / "deep" / "er" / "good", 100)
    record(tmp_path / "cut", 100)
    (tmp_path / "cut" / "summary.json").write_text('{"status": "rea')
    missing = record(tmp_path / "missing", 100) / "summary.json"
    kept = {key: value for key, value in json.loads(missing.read_text()).items() if key != "lr"}
    missing.write_text(json.dumps(kept))
    record(tmp_path / "unfinished", 100)
    (tmp_path / "unfinished" / "summary.json").unlink()
    found, problems = read_runs(tmp_path)
    assert [run.folder.name for run in found] == ["good"]
    assert len(problems) == 3
    assert "cut/summary.json" in problems[0]
    assert "not valid JSON" in problems[0]
    assert "the key lr is missing" in problems[1]
    assert "1 unfinished" in problems[2]
    assert "the key lr is missing" in write_report(tmp_path).html.read_text()


OF_A_METRIC = {"target_loss": None, "target_metric": "accuracy", "target_value": 0.97,
               "target_direction": "max", "metrics": {"accuracy": 0.971}}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number >= 1, got 0"),
        ({"lr": float("nan")}, "lr must be > 0 and finite"),
        ({"status": "done"}, "status must be one of"),
        ({"steps_to_target": None}, "must both be given"),
        ({"scaling": "none"}, "scaling must be an object"),
        ({"seed": True}, "seed must be a whole number"),
        ({"steps": 10**400}, "steps must be a whole number >= 0, got 1000"),
        ({"lr": 1e300}, "lr must be a learning rate from"),
        ({"target_loss": [2]}, "target_loss must be a finite number, got [2]"),
        (OF_A_METRIC | {"target_direction": "up"}, "target_direction must be one of min, max"),
        ({"metrics": {"accuracy": "high"}}, "accuracy must be a finite number"),
        ({"provenance": {"data_hash": {}}}, "provenance: data_hash must be text, got {}"),
    ],
)
def test_an_impossible_value_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    record(tmp_path / "run", 100, **changes)
    found, problems = read_runs(tmp_path)
    assert not found
    assert complaint in problems[0]


def test_one_damaged_run_of_a_study_is_named_and_the_others_are_reported(tmp_path: Path) -> None:
    record(tmp_path / "good", 100)
    record(tmp_path / "bad", 100, provenance={"data_hash": ["x"]})
    record(tmp_path / "odd\x1b[2J", 100, steps=None)
    study = read_study(tmp_path)
    assert [run.folder.name for run in study.sections[0].section.runs] == ["good"]
    assert study.problems == [
        "bad/summary.json: provenance: data_hash must be text, got ['x']: this run is left out",
        r"odd\x1b[2J/summary.json: steps must be a whole number >= 0, got None: this run is left "
        "out",
    ]


def test_decisions_that_are_damaged_are_named_and_the_runs_choose_for_themselves(
    tmp_path: Path,
) -> None:
    record_curves(tmp_path, {"adamw": STEPS["adamw"]})
    (tmp_path / "study.json").write_text('{"decisions": {"select_seeds": "none"}}')
    study = read_study(tmp_path)
    assert len(study.sections[0].all_points) == 9
    assert "points are chosen by the runs themselves" in " ".join(study.problems)


STRANGE = {  # as it is in a record, and in a cell
    "$x^{$": "$x^{$", "$\\frac$": "$\\frac$", r"\$a$": r"\$a$", "_hidden": "_hidden",
    "=1+1": "'=1+1", "-2": "'-2", "@sum": "'@sum", "+3": "'+3", "\x1b[2Jred": r"\x1b[2Jred",
    "a" * 999: "a" * 999, "</title><b>": "</title><b>", 'a"b': 'a"b',
}  # fmt: skip


@pytest.mark.drawn
def test_names_are_text_in_pictures_tables_and_on_the_terminal(tmp_path: Path) -> None:
    for number, name in enumerate(STRANGE):
        record(tmp_path / "runs" / f"{number}", 100, optimizer=name, task='$t$ {} "quoted"')
    shown = io.StringIO()
    found = write_report(tmp_path / "runs", out=tmp_path / "out")
    print_report(found, Console(file=shown, width=200))
    assert all(line.isprintable() for line in shown.getvalue().splitlines())
    page = found.html.read_text()
    assert "\x1b" not in page
    assert all(text in page for text in ("$x^{$", r"\x1b[2Jred", "_hidden", "$t$ {}"))
    assert "<b>" not in page.replace("<b>", "", page.count("<li><b>") + page.count(" <b>"))
    for table in found.tables.values():
        if table.name in ("curve.csv", "basin.csv"):
            cells = [row["optimizer"] for row in rows(table)]
            assert sorted(cells) == sorted(STRANGE.values())
    drawn = found.pictures["basins.svg"].read_text()
    assert "\x1b" not in drawn
    assert "$x^{$" in drawn  # in a legend, and not as mathematics
    assert "_hidden" in drawn


@pytest.mark.drawn
@pytest.mark.parametrize(
    ("changes", "titles"),
    [
        ({"task": "digits"}, ("bytes to loss 2.2", "digits to loss 2.2")),
        ({"target_loss": 1.95}, ("bytes to loss 2.2", "bytes to loss 1.95")),
        (OF_A_METRIC, ("bytes to loss 2.2", "bytes to accuracy 0.97")),
        ({"provenance": {"data_hash": "ffff"}}, ("data 0f3a0f3a0f3a…", "data ffff")),
    ],
)
def test_tasks_targets_and_data_sets_are_sections(
    tmp_path: Path, changes: dict[str, Any], titles: tuple[str, ...]
) -> None:
    record(tmp_path / "a", 100)
    record(tmp_path / "b", 50, batch_size=128, **changes)
    assert main([str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("<section>") == 2
    assert all(title in page for title in titles)
    found = rows(tmp_path / "curve.csv")
    target = changes.get("target_loss", 2.2)
    target = "accuracy 0.97" if target is None else f"{target:g}"
    assert sorted((row["task"], row["target"]) for row in found) == sorted(
        [("bytes", "2.2"), (changes.get("task", "bytes"), target)]
    )
    names = sorted(path.name for path in tmp_path.glob("curve*.png"))
    assert len(names) == 2
    assert all(one != two for one, two in pairwise(names))


def test_runs_that_differ_in_more_than_seed_and_rate_are_curves_of_their_own(
    tmp_path: Path,
) -> None:
    for beta, steps in ((0.9, 58), (0.5, 44)):
        for seed in (0, 1):
            config = {"optim": {"betas": [beta, 0.99], "weight_decay": 0.0}, "precision": "fp32"}
            record(tmp_path / f"{beta}-{seed}", steps + seed, seed=seed, config=config)
    report = write_report(tmp_path)
    assert {row["optimizer"]: row["steps"] for row in rows(tmp_path / "curve.csv")} == {
        "adamw betas.0=0.5": "45",
        "adamw betas.0=0.9": "59",
    }
    page = report.html.read_text()
    assert "adamw betas.0=0.5" in page
    assert "seeds 0 and 1" in page


def test_studies_are_compared_and_curves_of_one_name_are_told_apart_by_folder(
    tmp_path: Path,
) -> None:
    record_study(tmp_path / "first", {"adamw": STEPS["adamw"], "lamb": STEPS["lamb"]})
    record_study(tmp_path / "second", {"adamw": STEPS["sgd"], "sgd": STEPS["sgd"]})
    folders = [str(tmp_path / "first"), str(tmp_path / "second")]
    assert main([*folders, "--out", str(tmp_path / "out")]) == 0
    names = {row["optimizer"] for row in rows(tmp_path / "out" / "curve.csv")}
    assert names == {"adamw", "lamb", "adamw (second)", "sgd"}
    pairs = rows(tmp_path / "out" / "pairs.csv")
    (ratio,) = (
        float(row["ratio"])
        for row in pairs
        if (row["optimizer"], row["other"], row["batch_size"]) == ("adamw (second)", "adamw", "64")
    )
    assert ratio == pytest.approx(675 / 520, rel=1e-5)
    assert (
        f"largebatch report {folders[0]} {folders[1]}"
        in (tmp_path / "out" / "report.html").read_text()
    )


def test_a_folder_given_twice_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path / "a", 100)
    assert main([str(tmp_path), str(tmp_path)]) == 2
    assert "is given twice" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_nothing_to_report_is_two_and_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"largebatch report: no such folder: {tmp_path / 'nowhere'}"
    ]
    record(tmp_path / "crashed", None, status="failed")
    assert main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "no finished run below" in said
    record(tmp_path / "aimless", None, target_loss=None)
    assert main([str(tmp_path)]) == 2
    assert "have no target and" in capsys.readouterr().err


def test_a_study_in_which_everything_missed_still_reports(tmp_path: Path) -> None:
    record(tmp_path / "a", None)
    record(tmp_path / "b", None, batch_size=128)
    assert "Missed the target at every batch size" in write_report(tmp_path).html.read_text()


def test_runs_are_rows_of_a_table_and_the_chosen_ones_give_the_reports_estimates(
    tmp_path: Path,
) -> None:
    import largebatch.study as study

    record_study(tmp_path, {"adamw": STEPS["adamw"], "sgd": STEPS["sgd"]})
    found = runs(tmp_path)
    assert study.runs is runs
    assert len(found) == 2 * 9 * 9
    assert all(row.keys() == found[0].keys() for row in found)
    assert {row["outcome"] for row in found} == {"reached", "cut"}
    chosen = [row for row in found if row["chosen"]]
    assert len(chosen) == 2 * 9 * 5
    assert study.intervals(chosen)["adamw"] == only(tmp_path).estimates["adamw"]
    assert [pair.points for pair in study.pairs(chosen)] == [
        pair.points for pair in only(tmp_path).pairs
    ]
    assert "config.optim.betas.0" in runs(tmp_path, config=True)[0]


def test_rows_become_a_data_frame_where_there_is_pandas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path / "a", 100, **OF_A_METRIC)
    record(tmp_path / "b", 80, seed=1, **(OF_A_METRIC | {"metrics": {}}))
    found = runs(tmp_path)
    assert [row["eval_accuracy"] for row in found] == [0.971, None]
    assert {(row["target_metric"], row["target_value"]) for row in found} == {("accuracy", 0.97)}
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pandas"):
        found.to_pandas()
    monkeypatch.undo()
    pandas = pytest.importorskip("pandas")
    frame = found.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.shape == (2, len(found[0]))
    assert frame["steps"].tolist() == [100.0, 80.0]


def test_reading_runs_loads_neither_torch_nor_the_plotting() -> None:
    heavy = "{'torch', 'matplotlib', 'scipy', 'rich', 'hydra'}"
    code = f"import sys, largebatch.study.report; print({heavy} & set(sys.modules))"
    source = Path(__file__).parents[2] / "src"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(source)},
    )
    assert done.stdout.strip() == "set()"


def test_without_a_folder_it_says_so_in_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([])
    assert left.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "usage: largebatch report [OPTIONS] FOLDER …",
        "largebatch report: error: the following arguments are required: folder",
    ]
