"""Single runs over their course: how they are called, what is drawn, and the page."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from largebatch.common.figures import paper_style
from largebatch.study.page.axes import NARROW, WIDE
from largebatch.study.page.styles import curve_styles
from largebatch.study.report import main
from largebatch.study.single_runs.figure import runs_figure
from largebatch.study.single_runs.history import RunHistory, names_of, read_history
from largebatch.study.single_runs.report import print_runs, runs_table, write_runs_report


def config(**optim: Any) -> dict[str, Any]:
    return {"optim": {"_target_": "x.LAMB", "lr": 0.1, **optim}, "seed": 0, "target": {"loss": 1.5}}


def write_run(
    folder: Path, steps: int = 40, of: dict[str, Any] | None = None, ended: bool = True
) -> Path:
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = [
        {"step": step, "samples": 64 * step, "seconds": 0.5 * step, "loss": 1 + 4 / step, "lr": 0.1,
         "global_batch_size": 64, "grad_norm": 1.0}
        for step in range(1, steps + 1)
    ]  # fmt: skip
    lines[-1]["eval_loss"] = 1.25
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    if ended:
        summary = {"status": "reached", "optimizer": "lamb", "config": of or config()}
        summary["provenance"] = {"device": "cpu", "git_commit": "0" * 40}
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def history(optimizer: str, folder: str = "runs/a", **identity: Any) -> RunHistory:
    return RunHistory(Path(folder), {}, "reached", optimizer, None, {}, identity)


@pytest.mark.parametrize(
    ("runs", "names"),
    [
        ([history("lamb", "runs/mine")], ["mine"]),
        ([history("lamb"), history("adamw")], ["lamb", "adamw"]),
        ([history("lamb", **{"optim.lr": 0.1}), history("adamw", **{"optim.lr": 0.2})],
         ["lamb", "adamw"]),
        ([history("lamb", **{"optim.lr": 0.1, "seed": 0}),
          history("lamb", **{"optim.lr": 0.2, "seed": 0})], ["lr=0.1", "lr=0.2"]),
        ([history("lamb", **{"optim.lr": lr, "batch.size": size})
          for lr, size in ((0.1, 64), (0.2, 64), (0.1, 128))],
         ["batch.size=64 lr=0.1", "batch.size=64 lr=0.2", "batch.size=128 lr=0.1"]),
        ([history("lamb", seed=0), history("lamb", seed=1)], ["seed=0", "seed=1"]),
        ([history("lamb", "runs/a"), history("lamb", "runs/b")], ["a", "b"]),
        ([history("lamb", "x/a"), history("lamb", "x/b"), history("sgd", "x/c")],
         ["lamb a", "lamb b", "sgd"]),
    ],
)  # fmt: skip
def test_runs_are_named_by_what_they_differ_in(runs: list[RunHistory], names: list[str]) -> None:
    assert names_of(runs) == names


def test_a_run_that_still_lives_is_read_by_its_configuration(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ended=False)
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "config.yaml").write_text(
        "optim: {_target_: largebatch.optim.LARS, lr: 0.1}\ntarget: {loss: 2.5}\n"
    )
    problems: list[str] = []
    found = read_history(folder, problems)
    assert (found.status, found.optimizer, found.target) == (
        "running",
        "lars",
        ("loss", 2.5, "min"),
    )
    assert found.last("step") == 40
    assert problems == []


def test_the_panels_hold_what_was_recorded(tmp_path: Path) -> None:
    run = read_history(write_run(tmp_path / "run"), [])
    picture = runs_figure([run], ["run"], curve_styles([("run", "lamb")]), 7.0, "seconds")
    loss, lr, batch, norm = picture.figure.axes
    assert norm.get_xlabel() == "Seconds of training"
    faint, mean, evaluation, target = loss.lines
    np.testing.assert_allclose(faint.get_ydata(), run.columns["loss"])
    np.testing.assert_allclose(faint.get_xdata(), run.columns["seconds"])
    np.testing.assert_allclose(mean.get_ydata(), run.columns["loss"])  # of less than 50 lines
    np.testing.assert_allclose(evaluation.get_xydata(), [[20.0, 1.25]])
    np.testing.assert_allclose(target.get_ydata(), 1.5)
    assert {*np.ravel(lr.lines[0].get_ydata())} == {0.1}
    assert {*np.ravel(batch.lines[0].get_ydata())} == {64.0}
    assert picture.tips == {
        "tips-0": ["run: evaluation loss 1.25 after step 40, 2,560 samples; rate 0.1"]
    }


def test_a_metric_has_a_panel_with_its_target(tmp_path: Path) -> None:
    of = config() | {"target": {"loss": None, "metric": "accuracy", "value": 0.9}}
    folder = write_run(tmp_path / "run", of=of)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for place, value in ((9, 0.5), (39, 0.95)):
        lines[place] |= {"eval_loss": 1.5, "eval_accuracy": value, "eval_$x^{$": 1.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_history(folder, [])
    assert (run.target, run.metrics) == (("accuracy", 0.9, "max"), ["accuracy"])
    picture = runs_figure([run], ["run"], curve_styles([("run", "lamb")]), 7.0)
    loss, accuracy, *_ = picture.figure.axes
    assert len(loss.lines) == 3  # no target
    assert accuracy.get_ylabel() == "Accuracy"
    evaluated, target = accuracy.lines
    np.testing.assert_allclose(evaluated.get_xydata(), [[640.0, 0.5], [2560.0, 0.95]])
    np.testing.assert_allclose(target.get_ydata(), 0.9)
    assert "run: accuracy 0.5 after step 10, 640 samples; rate 0.1" in picture.tips["tips-1"]
    table = runs_table({"run": run})
    assert "accuracy" in table.heads
    assert table.rows[0][table.heads.index("accuracy")].text == "0.95"


@pytest.mark.parametrize(
    ("metric", "values", "scale"),
    [
        ("accuracy", (0.0, 0.1, 0.97), "linear"),
        ("word_error", (0.9, 0.02), "linear"),
        ("hits", (0.05, 0.9), "linear"),
        ("reward", (-3.0, 40.0), "linear"),
        ("accuracy", (1.0, 1.0), "linear"),
        ("perplexity", (900.0, 12.0), "log"),
    ],
)
def test_a_share_has_a_linear_axis_and_a_perplexity_may_have_a_logarithmic_one(
    metric: str, values: tuple[float, ...], scale: str, tmp_path: Path
) -> None:
    aim = {"loss": None, "metric": metric, "value": 0.5, "direction": "max"}
    folder = write_run(tmp_path / "run", of=config() | {"target": aim})
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for place, value in enumerate(values):
        lines[place] |= {f"eval_{metric}": value}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_history(folder, [])
    picture = runs_figure([run], ["run"], curve_styles([("run", "lamb")]), 7.0)
    panel = picture.figure.axes[1]
    low, high = panel.get_ylim()
    assert panel.get_yscale() == scale
    assert low < min(*values, 0.5)
    assert max(*values, 0.5) < high  # the target too is seen
    assert len(panel.get_yticks()) >= 2


@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_labels_and_ticks_are_within_the_picture(width: float, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    spans = {"samples_per_second": (1e2, 9e5), "grad_norm": (1e-7, 1.0), "lr": (1e-4, 2e-4),
             "global_batch_size": (16_384, 65_536), "trust_ratio_median": (1e-3, 1e3)}  # fmt: skip
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for place in range(2):
            values = {key: span[place] for key, span in spans.items()}
            file.write(json.dumps({"step": 41 + place, "samples": 9e5 + place, **values}) + "\n")
    run = read_history(folder, [])
    with paper_style():
        figure = runs_figure([run], ["run"], curve_styles([("run", "lamb")]), width).figure
        figure.draw_without_rendering()
        box = figure.get_tightbbox()
    assert min(box.x0, box.y0) >= 0
    assert box.x1 <= width
    for axes in figure.axes:  # a label does not run into its ticks
        label = axes.yaxis.label.get_window_extent()
        ticks = [tick.get_window_extent() for tick in axes.get_yticklabels() if tick.get_text()]
        assert label.x1 <= min(tick.x0 for tick in ticks)


def test_the_panel_of_the_noise_scale_spans_what_is_resolved(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    scales = ((5e7, False), (100.0, True), (140.0, True))
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for place, (scale, resolved) in enumerate(scales):
            line = {"samples": 9e5 + place, "noise_scale": scale, "noise_resolved": resolved}
            file.write(json.dumps(line) + "\n")
    run = read_history(folder, [])
    figure = runs_figure([run], ["run"], curve_styles([("run", "lamb")]), 7.0).figure
    (panel,) = (axes for axes in figure.axes if axes.get_ylabel() == "Noise scale")
    assert panel.get_ylim() == pytest.approx((97.6, 142.4))


def test_a_diverged_loss_does_not_flatten_the_picture(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 41, "samples": 2700, "loss": 1e12}\n')
    run = read_history(folder, [])
    picture = runs_figure([run], ["run"], curve_styles([("run", "lamb")]), 7.0)
    assert picture.figure.axes[0].get_ylim()[1] < 10


def test_the_page_of_runs_is_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (
        write_run(tmp_path / "a", of=config(lr=0.1)),
        write_run(tmp_path / "b", of=config(lr=0.2)),
    )
    assert main([str(a), str(b), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "lr=0.1" in printed
    assert f"report: {tmp_path / 'out' / 'run.html'}" in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "run.html", "run.png", "run.svg",
    ]  # fmt: skip
    page = (tmp_path / "out" / "run.html").read_text(encoding="utf-8")
    assert "<title>2 runs</title>" in page
    assert page.count("evaluation loss 1.25 after step 40") == 2  # one a run, none for phones
    assert "commit: 000000000000…" in page
    assert "src=" not in page
    assert 'href="http' not in page


@pytest.mark.parametrize(
    ("width", "left_out"), [(160, []), (80, ["time", "samples"]), (50, ["batch", "rate", "f1"])]
)
def test_a_narrow_terminal_has_fewer_columns_and_no_cell_cut(
    width: int, left_out: list[str], tmp_path: Path
) -> None:
    folder = write_run(tmp_path / "run")
    line = {"step": 41, "samples": 2_624_000, "loss": 1.0, "eval_accuracy": 0.9712, "eval_f1": 0.95,
            "seconds": 7300.0, "global_batch_size": 65_536}  # fmt: skip
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    told = io.StringIO()
    print_runs(write_runs_report(folder), Console(file=told, width=width))
    lines = told.getvalue().splitlines()
    assert max(map(len, lines[:5])) <= width
    assert "…" not in told.getvalue()
    (heads,) = (line.split() for line in lines if "status" in line)
    assert {"run", "status", "steps", "loss", "eval"} <= {*heads}
    assert {*heads}.isdisjoint(left_out)
    assert ("time" in heads) is ("2.03 hours" in told.getvalue()) is (not left_out)


@pytest.mark.parametrize("lines", ["", '{"loss": 1.0}\n'])
def test_a_run_without_a_step_is_refused(
    lines: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert main([str(tmp_path)]) == 2
    assert "no line with samples" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_beside_a_folder_of_runs_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "study" / "run")
    assert main([str(run), str(tmp_path / "study")]) == 2
    assert "holds no run itself" in capsys.readouterr().err
