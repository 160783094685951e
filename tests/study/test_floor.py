"""The line of a method that is no optimizer of a study: read from a file, drawn, noted if amiss."""

import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.lines import Line2D
from study_records import STEPS, record_study

from largebatch.common.figures import INK, paper_style
from largebatch.study.floor import COLUMNS, ORACLE
from largebatch.study.page.axes import WIDE
from largebatch.study.page.figures import steps_figure
from largebatch.study.page.html import Drawn, page_of
from largebatch.study.page.styles import curve_styles
from largebatch.study.section_study import Study, read_study

NAME = "Gauss-Newton by layers"
FLOOR = {64: 100.0, 1024: 12.0, 16384: 3.0}
"""Below all that the study's curve needs, so that the axis has to reach down to it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    record_study(root, {"adamw": STEPS["adamw"]}, seeds=(2, 3))
    return root


def read(folder: Path, target: str = "loss 2.2", luck: float = 0.9) -> Study:
    rows = [COLUMNS, f"{NAME},64,0.1,0.3,0,1,false,bytes,{target},9,2.2,0"]
    for size, steps in FLOOR.items():
        for seed, factor in ((2, luck), (3, 1 / luck)):
            rows.append(
                f"{NAME},{size},0.5,0.3,{seed},{steps * factor!r},true,bytes,{target},9,2.2,0"
            )
    (folder / ORACLE).write_text("\n".join(rows) + "\n", encoding="utf-8")
    return read_study(folder)


def test_its_line_its_intervals_and_what_they_are_stand_with_the_curves(folder: Path) -> None:
    study = read(folder)
    (section,) = study.sections
    assert section.floor is not None
    assert section.names == ["adamw"]  # it takes part in nothing else
    with paper_style():
        picture = steps_figure(study, section, curve_styles([("adamw", "adamw")]), WIDE)
    axes: Any = picture.figure.axes[0]
    (line,) = [one for one in axes.get_lines() if one.get_linestyle() == ":"]
    assert list(line.get_xdata()) == list(FLOOR)
    assert line.get_ydata() == pytest.approx(list(FLOOR.values()))
    (bars,) = [one for one in axes.collections if one.get_edgecolor().tolist() == [rgba(INK)]]
    low, high = bars.get_paths()[2].vertices[:, 1]
    assert low * high == pytest.approx(FLOOR[16384] ** 2)
    assert axes.get_ylim()[0] < low < FLOOR[16384] < high
    (tips,) = [tips for tips in picture.tips.values() if tips[0].startswith(NAME)]
    assert tips[1].startswith(f"{NAME}, batch 1,024: 12 (")
    shown = [text for legend in picture.figure.legends for text in legend.get_texts()]
    assert NAME in [text.get_text() for text in shown]
    drawn = [dict.fromkeys(("curve", "learning_rate", "basins"), Drawn("", ""))]
    assert f"Dotted: {NAME}" in page_of(study, drawn, [], "")


def rgba(colour: str) -> list[float]:
    return [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)] + [1.0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("batch_size,steps\n64,100\n", "not what `largebatch bench gauss_newton` writes"),
        (
            f"{COLUMNS}\n{NAME},64,0.5,0.3,2,-1,true,bytes,loss 2.2,9,2.2,0\n",
            "steps must be a number > 0, got -1",
        ),
        (f"{COLUMNS}\n", "not what `largebatch bench gauss_newton` writes"),
    ],
)
def test_a_file_that_is_none_is_named_and_left_out(folder: Path, text: str, said: str) -> None:
    (folder / ORACLE).write_text(text, encoding="utf-8")
    study = read_study(folder)
    assert study.sections[0].floor is None
    (problem,) = [problem for problem in study.problems if ORACLE in problem]
    assert said in problem


def test_one_of_another_target_is_left_out_and_one_seed_has_no_interval(folder: Path) -> None:
    study = read(folder, "loss 2.5")
    assert study.sections[0].floor is None
    assert "oracle.csv is of bytes to loss 2.5 and the study of bytes to loss 2.2" in "".join(
        study.problems
    )
    text = (folder / ORACLE).read_text(encoding="utf-8").replace("2.5", "2.2")
    lines = [line for line in text.splitlines() if ",3," not in line.partition("0.5,0.3")[2][:4]]
    (folder / ORACLE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    study = read_study(folder)
    (section,) = study.sections
    assert section.floor is not None
    assert [point.num_seeds for point in section.floor.points] == [1, 1, 1]
    with paper_style():
        axes = steps_figure(study, section, curve_styles([("adamw", "adamw")]), WIDE).figure.axes[0]
    assert any(isinstance(one, Line2D) and one.get_linestyle() == ":" for one in axes.get_lines())
    assert all(math.isfinite(limit) for limit in axes.get_ylim())
