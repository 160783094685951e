"""The trust ratios of a run, read from its lines and drawn."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from largebatch.common.figures import paper_style
from largebatch.study.page.axes import NARROW, WIDE
from largebatch.study.report import main
from largebatch.study.single_runs.layers import layers_figure, read_layers
from largebatch.study.single_runs.report import write_runs_report


def write_run(folder: Path, lines: list[dict[str, float | None]], cut: str = "") -> None:
    folder.mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines) + cut
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


LINES: list[dict[str, float | None]] = [
    {"samples": 64, "trust_ratio/a.weight": 0.5, "trust_ratio/a.bias": 1.0},
    {"samples": 128, "loss": 2.0},
    {"samples": 192, "trust_ratio/a.weight": None, "trust_ratio/b.weight": 8.0},
]


def test_layers_are_read_in_order_with_what_a_line_lacks_left_open(tmp_path: Path) -> None:
    write_run(tmp_path / "run", LINES, cut='{"samples": 256, "trust_ra')
    history = read_layers(tmp_path / "run", [])
    assert history.layers == ["a.weight", "a.bias", "b.weight"]
    assert history.samples.tolist() == [64, 192]
    nan = float("nan")
    np.testing.assert_array_equal(history.ratios, [[0.5, nan], [1.0, nan], [nan, 8.0]])


def test_each_rectangle_of_the_picture_is_a_layer_between_two_lines(tmp_path: Path) -> None:
    write_run(tmp_path / "run", LINES)
    figure = layers_figure(read_layers(tmp_path / "run", []), "run")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "a.weight",
        "a.bias",
        "b.weight",
    ]
    shown = np.ma.filled(axes.collections[0].get_array(), -1.0).reshape(3, 2)
    np.testing.assert_array_equal(shown, [[0.5, -1], [1, -1], [-1, 8]])
    assert axes.get_xlim() == (0, 192)


def test_the_report_of_one_run_has_its_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", LINES)
    assert main([str(tmp_path / "run")]) == 0
    assert "layers.png" in capsys.readouterr().out
    assert (tmp_path / "run" / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png" in (tmp_path / "run" / "run.html").read_text(encoding="utf-8")


def test_pictures_of_one_run_follow_dark_pages_and_phones(tmp_path: Path) -> None:
    run = tmp_path / ("a_name_that_is_far_too_long_" * 5)
    write_run(run, LINES)
    page = write_runs_report(run).html.read_text(encoding="utf-8")
    assert "<img" not in page
    figures = re.findall(r"<figure.*?</figure>", page, re.DOTALL)
    assert len(figures) == 2
    assert 'class="tall"' in figures[0]
    for figure in figures:
        wide, narrow = figure.split('<div class="for-phone">')
        assert "var(--paper)" in wide
        assert "var(--paper)" in narrow
    for width in (NARROW, WIDE):
        with paper_style():
            drawn = layers_figure(read_layers(run, []), "Trust ratio" * (width == WIDE), width)
            drawn.draw_without_rendering()
            box = drawn.get_tightbbox()
        assert min(box.x0, box.y0) >= 0
        assert box.x1 <= width


def test_a_run_without_trust_ratios_says_how_to_record_them(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [{"samples": 64, "loss": 2.0}])
    with pytest.raises(ValueError, match=r"record\.layers=true"):
        read_layers(tmp_path / "run", [])
