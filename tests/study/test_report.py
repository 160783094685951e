"""From run folders to tables, pictures and a page: what counts, what is left out, what is said."""

import csv
import io
import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from rich.console import Console

from largebatch.study.figures import curve_figure, learning_rate_figure
from largebatch.study.fit import fit_points
from largebatch.study.points import curve_points
from largebatch.study.report import main, print_report, read_study, write_report
from largebatch.study.runs import read_runs

BATCHES = [2**power for power in range(6, 15)]
STEPS = {
    "adamw": [520, 250, 146, 83, 49, 37, 30, 28, 26],
    "lamb": [560, 260, 146, 90, 64, 42, 30, 27, 25],
    "lars": [900, 420, 218, 130, 79, 55, 43, 40, 38],
    "sgd": [675, 350, 185, 105, 66, 55, 50, 48, 47],
}


def record(folder: Path, steps: int | None, /, **changes: Any) -> Path:
    """Write one run folder as the trainer does; `steps` None is a run that missed."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    batch = changes.get("batch_size", 64)
    summary: dict[str, Any] = {
        "status": "exhausted" if steps is None else "reached",
        "optimizer": "adamw",
        "batch_size": batch,
        "seed": 0,
        "lr": 0.01,
        "base_lr": 0.01,
        "scaling": {"rule": "none", "base_batch": 64},
        "target_loss": 2.2,
        "steps": steps or 1000,
        "samples": (steps or 1000) * batch,
        "steps_to_target": steps,
        "samples_to_target": steps and steps * batch,
        "eval_loss": 2.19,
        "loss": 2.1,
        "seconds": 1.5,
        "task": "bytes",
        "provenance": {
            "data_hash": "0f3a",
            "data": "a text",
            "versions": {"python": "3.12", "torch": "2.13"},
            "device": "cpu",
            "world_size": 1,
        },
        "give_up_samples": None,
        "some_later_key": [1, 2],
    }
    (folder / "summary.json").write_text(json.dumps(summary | changes))
    return folder


def record_study(root: Path, optimizers: dict[str, list[int]]) -> None:
    """Three learning rates a point, the middle one best and growing as the square root."""
    for name, curve in optimizers.items():
        for index, (batch, steps) in enumerate(zip(BATCHES, curve, strict=True)):
            for trial, penalty in ((-1, 1.3), (0, 1.0), (1, 1.2)):
                lr = 0.01 * 2 ** ((index + trial) / 2)
                folder = root / name / f"{batch}" / f"{trial}"
                cost = round(steps * penalty)
                record(folder, cost, optimizer=name, batch_size=batch, lr=lr)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_study_becomes_its_files_with_exact_columns(tmp_path: Path) -> None:
    record_study(tmp_path / "runs", STEPS)
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "curve.csv", "curve.png", "fits.csv", "learning_rate.png", "report.html",
    ]  # fmt: skip
    lines = (out / "curve.csv").read_text().splitlines()
    assert lines[0] == "optimizer,batch_size,steps,samples,lr,trials,at_edge,missed"
    assert lines[1] == "adamw,64,520,33280,0.01,3,false,false"
    assert len(lines) == 1 + 4 * 9
    assert (out / "fits.csv").read_text().splitlines()[0] == "optimizer,s_min,e_min,b_crit"
    fits = {row["optimizer"]: row for row in rows(out / "fits.csv")}
    assert list(fits) == sorted(STEPS)
    assert float(fits["adamw"]["b_crit"]) == pytest.approx(1292, rel=0.02)
    for picture in ("curve.png", "learning_rate.png"):
        data = (out / picture).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert int.from_bytes(data[16:20], "big") == 1400  # 7 inches at 200 dots


def test_the_report_lands_beside_the_runs_by_default(tmp_path: Path) -> None:
    record(tmp_path / "run", 100)
    report = write_report(tmp_path)
    assert report.html == tmp_path / "report.html"
    assert report.html.exists()
    assert report.rules_csv is None
    assert (tmp_path / "fits.csv").read_text() == "optimizer,s_min,e_min,b_crit\n"
    write_report(tmp_path)  # its own files do not disturb a second reading
    assert len(rows(tmp_path / "curve.csv")) == 1


def test_the_page_is_one_file_that_tells_everything(tmp_path: Path) -> None:
    record_study(tmp_path / "runs", {"adamw": STEPS["adamw"], "a<b": STEPS["sgd"]})
    page = write_report(tmp_path / "runs", tmp_path / "out").html.read_text()
    assert page.count('src="data:image/png;base64,') == 2
    assert page.count("src=") == 2
    assert "<link" not in page
    assert "$" not in page
    assert "prefers-color-scheme: dark" in page
    assert "width=device-width" in page
    assert "a&lt;b" in page
    assert "a<b" not in page
    for fact in (
        "0f3a",
        "torch 2.13",
        "Finished runs: 54",
        "Seed 0",
        "20.0x fewer",
        "B_crit 1,290",
    ):
        assert fact in page
    assert "one seed" in page
    assert page.count("<tr") == (1 + 18) + (1 + 2)


def test_the_terminal_shows_ratio_and_critical_batch(tmp_path: Path) -> None:
    record_study(tmp_path, {"adamw": STEPS["adamw"]})
    shown = io.StringIO()
    print_report(write_report(tmp_path), Console(file=shown, width=200))
    text = shown.getvalue()
    assert "520 steps at batch 64, 26 at 16,384: 20.0x fewer steps for a 256x larger batch" in text
    assert "B_crit 1,290" in text
    assert str(tmp_path / "report.html") in text


def test_the_score_is_the_upper_median_over_seeds(tmp_path: Path) -> None:
    for seed, steps in enumerate((100, 120, 300)):
        record(tmp_path / f"a{seed}", steps, seed=seed, lr=0.01)
    for seed, steps in enumerate((90, 130)):
        record(tmp_path / f"b{seed}", steps, seed=seed, lr=0.02)
    (point,) = read_study(tmp_path).points
    assert (point.steps, point.lr, point.samples) == (120, 0.01, 120 * 64)
    assert (point.seeds, point.steps_low, point.steps_high) == (3, 100, 300)


def test_a_seed_that_missed_counts_as_infinite(tmp_path: Path) -> None:
    record(tmp_path / "a0", 50, lr=0.02)
    record(tmp_path / "a1", None, lr=0.02, seed=1)
    record(tmp_path / "b0", 200, lr=0.01)
    record(tmp_path / "b1", 210, lr=0.01, seed=1)
    (point,) = read_study(tmp_path).points
    assert (point.steps, point.lr) == (210, 0.01)


def test_ties_go_to_the_lower_loss_and_then_to_the_lower_rate(tmp_path: Path) -> None:
    record(tmp_path / "a", 100, lr=0.01, eval_loss=2.19)
    record(tmp_path / "b", 100, lr=0.02, eval_loss=2.15)
    record(tmp_path / "c", 100, lr=0.04, eval_loss=2.15)
    record(tmp_path / "d", 100, lr=0.08, eval_loss=float("nan"))
    (point,) = read_study(tmp_path).points
    assert point.lr == 0.02
    assert not point.at_edge


def test_a_run_that_diverged_beyond_all_numbers_is_a_miss_and_not_left_out(tmp_path: Path) -> None:
    record(tmp_path / "a", 100, lr=0.01)
    record(tmp_path / "b", None, lr=0.02, status="diverged", eval_loss=4.75e33, loss=1e38)
    study = read_study(tmp_path)
    assert study.problems == []
    assert (study.points[0].steps, study.points[0].trials) == (100, 2)


def test_the_best_rate_at_an_end_of_those_tried_is_at_the_edge(tmp_path: Path) -> None:
    record(tmp_path / "64a", 100, lr=0.01)
    record(tmp_path / "128a", 60, lr=0.01, batch_size=128)
    record(tmp_path / "128b", 50, lr=0.02, batch_size=128)
    record(tmp_path / "256a", 40, lr=0.01, batch_size=256)
    record(tmp_path / "256b", 30, lr=0.02, batch_size=256)
    record(tmp_path / "256c", None, lr=0.04, batch_size=256)
    edges = {point.batch_size: point.at_edge for point in read_study(tmp_path).points}
    assert edges == {64: True, 128: True, 256: False}


def test_one_rate_computed_in_two_ways_is_one_trial(tmp_path: Path) -> None:
    record(tmp_path / "a", 100, lr=0.01 * 2**0.5)
    record(tmp_path / "b", 110, lr=0.02 / 2**0.5 * (1 + 1e-15), seed=1)
    (point,) = read_study(tmp_path).points
    assert (point.trials, point.seeds) == (1, 2)


def test_a_missed_point_has_empty_cells(tmp_path: Path) -> None:
    record(tmp_path / "a", 100)
    record(tmp_path / "b", None, batch_size=128, lr=0.01)
    record(tmp_path / "c", None, batch_size=128, lr=0.02)
    write_report(tmp_path)
    assert (tmp_path / "curve.csv").read_text().splitlines()[2] == "adamw,128,,,,2,false,true"


def test_a_point_that_only_diverged_bounds_nothing_by_its_steps(tmp_path: Path) -> None:
    record(tmp_path / "a", None, status="diverged", steps=5)
    (alone,) = read_study(tmp_path).points
    assert alone.lower_bound is None
    record(tmp_path / "0", None, status="diverged", steps=9, give_up_samples=6400)
    (limited,) = read_study(tmp_path).points
    assert limited.lower_bound == 100
    record(tmp_path / "b", None, status="exhausted", steps=700, lr=0.02)
    record(tmp_path / "c", None, status="exhausted", steps=900, lr=0.04)
    (point,) = read_study(tmp_path).points
    assert point.lower_bound == 700


def test_the_bound_of_a_missed_point_reaches_the_fit(tmp_path: Path) -> None:
    for batch, steps in ((64, 640), (128, 320), (256, 160)):
        record(tmp_path / f"{batch}", steps, batch_size=batch)
    record(tmp_path / "4096", None, batch_size=4096, steps=50)
    study = read_study(tmp_path)
    fit = study.fits["adamw"]
    free = fit_points([point for point in study.points if not point.missed])
    assert fit is not None
    assert free is not None
    assert fit.num_censored == 1
    assert fit.s_min + fit.e_min / 4096 > 2 * (free.s_min + free.e_min / 4096)


def test_wall_clock_stands_beside_the_steps_and_is_that_of_the_median_run(tmp_path: Path) -> None:
    for seed, (steps, seconds) in enumerate(((90, 7.25), (100, 3.5), (300, 1.0))):
        record(tmp_path / str(seed), steps, seed=seed, seconds=seconds)
    report = write_report(tmp_path)
    assert report.study.points[0].seconds == 3.5
    assert "<td>3.5</td>" in report.html.read_text().replace('<td class="number">', "<td>")


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_a_run_that_stopped_early_is_no_miss(tmp_path: Path, status: str) -> None:
    record(tmp_path / "a", 100)
    record(tmp_path / "b", None, status=status, lr=0.02)
    study = read_study(tmp_path)
    assert study.points[0].trials == 1
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
    assert (tmp_path / "curve.csv").read_text().splitlines()[1:] == [
        "adamw,64,100,6400,0.01,1,true,false",
        "adamw,256,40,10240,0.03,1,true,false",
    ]
    assert (tmp_path / "rules.csv").read_text().splitlines() == [
        "optimizer,rule,base_batch,batch_size,lr,steps,tuned_steps,ratio",
        "adamw,linear,64,256,0.04,,40,",
        "adamw,sqrt,64,256,0.02,50,40,1.25",
    ]
    assert "Scaling rules" in report.html.read_text()
    shown = io.StringIO()
    print_report(report, Console(file=shown, width=100))
    assert "1.25" in shown.getvalue()


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
    runs, problems = read_runs(tmp_path)
    assert [run.folder.name for run in runs] == ["good"]
    assert len(problems) == 3
    assert "cut/summary.json" in problems[0]
    assert "not valid JSON" in problems[0]
    assert "the key lr is missing" in problems[1]
    assert "1 unfinished" in problems[2]
    assert "the key lr is missing" in write_report(tmp_path).html.read_text()


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
        ({"provenance": {"data_hash": {}}}, "provenance: data_hash must be text, got {}"),
    ],
)
def test_an_impossible_value_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    record(tmp_path / "run", 100, **changes)
    runs, problems = read_runs(tmp_path)
    assert not runs
    assert complaint in problems[0]


def test_one_damaged_run_of_a_study_is_named_and_the_others_are_reported(tmp_path: Path) -> None:
    record(tmp_path / "good", 100)
    record(tmp_path / "bad", 100, provenance={"data_hash": ["x"]})
    record(tmp_path / "odd\x1b[2J", 100, steps=None)
    study = read_study(tmp_path)
    assert [run.folder.name for run in study.runs] == ["good"]
    assert study.problems == [
        "bad/summary.json: provenance: data_hash must be text, got ['x']: this run is left out",
        r"odd\x1b[2J/summary.json: steps must be a whole number >= 0, got None: this run is left "
        "out",
    ]


STRANGE = {  # as it is in a record, and in a cell
    "$x^{$": "$x^{$", "$\\frac$": "$\\frac$", r"\$a$": r"\$a$", "_hidden": "_hidden",
    "=1+1": "'=1+1", "-2": "'-2", "@sum": "'@sum", "+3": "'+3", "\x1b[2Jred": r"\x1b[2Jred",
    "a" * 999: "a" * 999,
}  # fmt: skip


def test_names_are_text_in_pictures_tables_and_on_the_terminal(tmp_path: Path) -> None:
    for number, name in enumerate(STRANGE):
        record(tmp_path / "runs" / f"{number}", 100, optimizer=name, task="$t$ {}")
    shown = io.StringIO()
    found = write_report(tmp_path / "runs", tmp_path / "out")
    print_report(found, Console(file=shown, width=200))
    assert all(line.isprintable() for line in shown.getvalue().splitlines())
    page = found.html.read_text()
    assert "\x1b" not in page
    assert all(text in page for text in ("$x^{$", r"\x1b[2Jred", "_hidden", "$t$ {}"))
    cells = [row["optimizer"] for row in rows(found.curve_csv)]
    assert sorted(cells) == sorted(STRANGE.values())
    figure = curve_figure(found.study.points, {}, "$t$")
    (legend,) = [axes.get_legend() for axes in figure.axes]
    figure.canvas.draw()
    drawn = [text.get_text() for text in legend.get_texts()]
    assert r"\$x^{\$" in drawn  # matplotlib's way to write $x^{$
    assert " _hidden" in drawn


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "digits"}, ("tasks", "bytes (1 runs", "digits (1 runs")),
        ({"target_loss": 1.95}, ("target losses", "2.2 (1 runs", "1.95 (1 runs")),
        ({"provenance": {"data_hash": "ffff"}}, ("data hashes", "0f3a", "ffff")),
    ],
)
def test_mixed_studies_are_refused_in_one_sentence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    words: tuple[str, ...],
) -> None:
    record(tmp_path / "a", 100)
    record(tmp_path / "b", 50, batch_size=128, **changes)
    assert main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for word in (*words, str(tmp_path / "a"), str(tmp_path / "b")):
        assert word in said
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
    assert "no finished run below" in capsys.readouterr().err
    record(tmp_path / "aimless", None, target_loss=None)
    assert main([str(tmp_path)]) == 2
    assert "have no target loss" in capsys.readouterr().err


def data_of(line: Line2D) -> tuple[list[float], list[float]]:
    return np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()


def overlapping_texts(figure: Figure) -> list[tuple[str, str]]:
    figure.draw_without_rendering()
    outside = {  # ticks beyond the ends of an axis keep a label that is never drawn
        label
        for panel in figure.axes
        for axis, (low, high) in ((panel.xaxis, panel.get_xlim()), (panel.yaxis, panel.get_ylim()))
        for tick in axis.get_major_ticks()
        if not low <= tick.get_loc() <= high
        for label in (tick.label1, tick.label2)
    }
    shown = [
        (text.get_text(), text.get_window_extent())
        for text in figure.findobj(Text)
        if isinstance(text, Text) and text.get_visible() and text.get_text().strip()
        if text not in outside
    ]
    assert len(shown) > 20
    return [(one, two) for (one, a), (two, b) in combinations(shown, 2) if a.overlaps(b)]


def test_no_two_texts_of_the_pictures_overlap(tmp_path: Path) -> None:
    record_study(tmp_path, STEPS)
    study = read_study(tmp_path)
    assert overlapping_texts(curve_figure(study.points, study.fits, study.title)) == []
    assert overlapping_texts(learning_rate_figure(study.points, "best learning rate")) == []


def test_the_curve_picture_draws_the_points_and_sets_misses_apart(tmp_path: Path) -> None:
    record(tmp_path / "a", 500)
    record(tmp_path / "b", 260, batch_size=128)
    record(tmp_path / "c", 140, batch_size=256)
    record(tmp_path / "d", None, batch_size=512)
    study = read_study(tmp_path)
    panel = curve_figure(study.points, study.fits, "a title").axes[0]
    assert ([64.0, 128.0, 256.0], [500.0, 260.0, 140.0]) in [*map(data_of, panel.lines)]
    (missed,) = (line for line in panel.lines if data_of(line)[0] == [512])
    assert missed.get_markerfacecolor() == "white"
    height = panel.transData.inverted().transform(missed.get_transform().transform((512, 0.9)))[1]
    assert height > 500


def test_the_learning_rate_picture_hollows_the_edges(tmp_path: Path) -> None:
    record(tmp_path / "a", 100, lr=0.01)
    for name, lr, steps in (("b", 0.01, 70), ("c", 0.02, 60), ("d", 0.04, 80)):
        record(tmp_path / name, steps, batch_size=256, lr=lr)
    panel = learning_rate_figure(curve_points(read_runs(tmp_path)[0]), "rates").axes[0]
    faces = {data_of(line)[0][0]: line.get_markerfacecolor() for line in panel.lines[-2:]}
    assert faces[64] == "white"
    assert faces[256] != "white"


def test_a_study_in_which_everything_missed_still_reports(tmp_path: Path) -> None:
    record(tmp_path / "a", None)
    record(tmp_path / "b", None, batch_size=128)
    assert "missed the target at every batch size" in write_report(tmp_path).html.read_text()


def test_reading_runs_loads_neither_torch_nor_the_plotting() -> None:
    heavy = "{'torch', 'matplotlib', 'scipy', 'rich', 'hydra'}"
    code = f"import sys, largebatch.study.runs; print({heavy} & set(sys.modules))"
    source = Path(__file__).parents[2] / "src"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(source)},
    )
    assert done.stdout.strip() == "set()"
