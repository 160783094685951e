"""What a study's page says and shows: sentences, looks, pictures, hover texts, published curves."""

import math
import re
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator
from study_records import BATCHES, STEPS, record, record_study

from largebatch.common.figures import COLOURS, paper_style
from largebatch.study.basins import basin_of
from largebatch.study.labels import plain
from largebatch.study.page.answers import answers
from largebatch.study.page.axes import NARROW, WIDE, Picture, round_numbers, set_grid
from largebatch.study.page.figures import ratio_figure, steps_figure
from largebatch.study.page.rate_figures import basin_figure, rate_figure
from largebatch.study.page.references import SOURCES, references
from largebatch.study.page.styles import KNOWN, curve_styles
from largebatch.study.page.svg import _VARIABLES, PAPER, svg_of, themed
from largebatch.study.page.ticks import PlainAxes
from largebatch.study.report import main, write_report
from largebatch.study.section_study import read_study

FIGURES: list[Callable[..., Picture]] = [steps_figure, ratio_figure, rate_figure, basin_figure]


def said(folder: Path) -> dict[str, str]:
    (section,) = read_study(folder).sections
    return {one.question: one.text for one in answers(section)}


def drawn(folder: Path, draw: Callable[..., Picture], width: float = WIDE) -> Picture:
    study = read_study(folder)
    (section,) = study.sections
    styles = curve_styles((curve.name, curve.optimizer) for curve in section.section.curves)
    with paper_style():
        return draw(study, section, styles, width)


def hyperbola(s_min: float, b_crit: float, n: float = 1.0) -> list[float]:
    return [s_min * (1 + (b_crit / batch) ** n) ** (1 / n) for batch in BATCHES]


def test_four_sentences_answer_with_intervals(tmp_path: Path) -> None:
    record_study(
        tmp_path,
        {"adamw": hyperbola(24, 1100), "lamb": hyperbola(26, 1100), "sgd": hyperbola(48, 700)},
    )
    told = said(tmp_path)
    assert list(told) == ["Fewest steps", "How far", "What to train at", "How sure"]
    fewest = told["Fewest steps"]
    assert re.match(r"adamw needs the fewest steps: 436 \(\d+ to \d+\) steps at batch 64", fewest)
    assert "lamb needs 1.08 times as many at every batch size" in fewest
    assert re.search(r"sgd needs 1\.\d\d to 1\.\d\d times as many at every batch size", fewest)
    assert "twice the fewest samples): adamw 1,1" in told["How far"]
    assert re.search(r"Smaller: sgd \d+ \(\d+ to \d+\)", told["How far"])
    assert re.search(r"80% of the sample efficiency of batch 64 up to a batch of \d+ \(", told[
        "What to train at"
    ])  # fmt: skip
    assert "0.01 at 64 and 0.16 at 16,384, as batch^0.50" in told["What to train at"]
    assert "95 of 100" in told["How sure"]
    assert (
        "seeds 2 to 6, which had no say in the rates (seeds 0 and 1 chose them)" in told["How sure"]
    )


def test_what_seeds_cannot_tell_apart_is_said_with_its_interval(tmp_path: Path) -> None:
    luck = (1.0, 1.1, 0.92, 1.05, 0.95)
    for batch, steps in zip(BATCHES, hyperbola(24, 1100), strict=True):
        for seed in range(5):
            for name, place in (("adamw", seed), ("lamb", (seed + 2) % 5)):
                record(
                    tmp_path / f"{name}-{batch}-{seed}", steps * luck[place], optimizer=name,
                    batch_size=batch, seed=seed,
                )  # fmt: skip
    told = said(tmp_path)
    assert re.search(
        r"lamb is not told apart from it at any batch size \(1\.00 times, 95% interval 0\.\d\d to "
        r"1\.\d\d, at 16,384\)",
        told["Fewest steps"],
    )
    assert "which chose the rates too: that flatters them" in told["How sure"]


def test_another_bend_is_named_and_twice_is_not_said_of_it(tmp_path: Path) -> None:
    record_study(tmp_path, {"sgd": hyperbola(50, 800, n=1.8)})
    assert re.search(
        r"Another bend than S_min \+ E_min / B: sgd sharper, n = 1\.8\d? \(1\.\d+ to \d\.?\d*\), "
        r"so that its steps there are 1\.47 times the fewest",
        said(tmp_path)["How far"],
    )


def test_one_seed_has_no_interval_and_says_so(tmp_path: Path) -> None:
    record_study(tmp_path, {"adamw": STEPS["adamw"], "sgd": STEPS["sgd"]}, seeds=(2,))
    told = said(tmp_path)
    assert "(no interval)" in told["Fewest steps"]
    assert "so there are no intervals" in told["How sure"]
    assert "95" not in told["How sure"]
    assert not re.search(r"\(\d+ to \d+\)", told["Fewest steps"] + told["How far"])
    page = write_report(tmp_path).html.read_text()
    assert "One seed a point: no bars" in page
    assert "one seed, no verdict" in page


def test_a_bend_that_the_batches_do_not_reach_is_not_identified(tmp_path: Path) -> None:
    record_study(tmp_path, {"adamw": hyperbola(24, 30_000)})
    assert "Not identified for adamw" in said(tmp_path)["How far"]
    assert "do not reach a factor 4 to both sides of it" in said(tmp_path)["How far"]


def test_the_basin_says_how_far_off_a_rate_may_be_and_where_it_misses(tmp_path: Path) -> None:
    for lr, steps in ((0.005, 130), (0.01, 104), (0.02, 100), (0.04, 108), (0.08, None)):
        record(tmp_path / f"{lr}", steps, lr=lr)
    ((section,),) = (read_study(tmp_path).sections,)
    basin = basin_of(section.all_points[0])
    assert basin is not None
    assert (basin.low, basin.high, basin.next_below, basin.next_above) == (0.01, 0.04, 0.005, 0.08)
    assert basin.first_miss == 0.08
    told = said(tmp_path)["What to train at"]
    assert "a rate 2.00 times lower or 2.00 times higher costs at most 10%" in told
    assert "at 4.00 times the rate a run misses (batch 64)" in told


def test_a_run_that_was_cut_is_no_miss(tmp_path: Path) -> None:
    record(tmp_path / "a", 100, lr=0.01)
    record(tmp_path / "b", None, lr=0.02, steps=115, samples=115 * 64, give_up_samples=115 * 64)
    (section,) = read_study(tmp_path).sections
    basin = basin_of(section.all_points[0])
    assert basin is not None
    assert basin.first_miss is None
    assert section.all_points[0].num_cut == 1
    assert "misses" not in said(tmp_path)["What to train at"]


def luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("place", [0, 1], ids=["light", "dark"])
def test_what_is_drawn_stands_out_from_the_paper(place: int) -> None:
    for name, colours in _VARIABLES.items():
        if name not in ("paper", "grid"):
            least = 7.0 if name == "ink" else 3.0
            assert contrast(colours[place], PAPER[place]) >= least, (name, colours[place])


def test_an_optimizer_looks_alike_in_every_study() -> None:
    few = curve_styles([("lamb", "lamb"), ("kfac", "kfac")])
    many = curve_styles([(name, name) for name in (*KNOWN, "mine")])
    assert few["lamb"] == many["lamb"] == KNOWN["lamb"]
    assert few["kfac"] == many["kfac"] == KNOWN["kfac"]
    assert len({(style.colour, style.marker) for style in KNOWN.values()}) == len(KNOWN)
    alone = curve_styles([("mine", "mine"), ("adamw", "adamw")])
    assert alone == curve_styles([("adamw", "adamw"), ("mine", "mine")])
    assert alone["mine"].colour != alone["adamw"].colour


def test_curves_of_one_optimizer_keep_its_colour_with_another_line() -> None:
    styles = curve_styles([("lamb", "lamb"), ("adamw", "adamw"), ("adamw (B)", "adamw")])
    assert styles["adamw"] == KNOWN["adamw"]
    assert styles["adamw (B)"].colour == KNOWN["adamw"].colour
    assert styles["adamw (B)"].line != styles["adamw"].line
    assert styles["adamw (B)"].marker != styles["adamw"].marker
    variants = curve_styles([(f"adamw betas.0=0.{k}", "adamw") for k in range(5, 10)])
    assert len({style.colour for style in variants.values()}) == 5


def test_the_page_is_one_file_with_hover_texts_sorted_tables_and_both_colour_schemes(
    tmp_path: Path,
) -> None:
    record_study(tmp_path / "runs", {"adamw": STEPS["adamw"], "a<b": STEPS["sgd"]})
    page = write_report(tmp_path / "runs", out=tmp_path / "out").html.read_text()
    assert "src=" not in page
    assert "<link" not in page
    assert "@import" not in page
    assert "{{" not in page
    assert "{%" not in page
    assert page.count("<script>") == 1
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    assert "width=device-width" in page
    assert "a&lt;b" in page
    assert "a<b" not in page
    hover = re.findall(r"<title>([^<]+)</title>", page)
    assert "adamw/batch-64/lr-0.01/seed-2 and 4 more" in " ".join(hover)
    assert any(
        tip == "adamw, batch 64, rate 0.01, seed 1: 525 steps; adamw/batch-64/lr-0.01/seed-1"
        for tip in hover
    )
    assert page.count('<button type="button">') == page.count('<th scope="col"')
    assert page.count("data-n=") > 100
    assert page.index("Fewest steps") < page.index("<figure>") < page.index("Where this comes")
    assert page.index("Where this comes") < page.index("0f3a0f3a0f3a…")
    assert "0f3a" * 4 not in page
    assert "torch 2.13" in page
    assert "162 finished runs" in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_the_trials_of_each_optimizer_are_counted_on_the_page(tmp_path: Path) -> None:
    record_study(tmp_path, {"adamw": STEPS["adamw"]})
    page = write_report(tmp_path).html.read_text()
    table = page[page.index("<h3>Trials</h3>") :]
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", table[: table.index("</table>")])
    assert cells[:6] == ["adamw", "81", "9", "3 to 3", "9", "9"]
    assert cells[6:8] == ["rate", "seeds 2 to 6"]
    assert "may take up to 64 trials, for all alike" in table


def test_every_picture_has_its_colours_from_the_page(tmp_path: Path) -> None:
    record_study(tmp_path, {"adamw": STEPS["adamw"], "sgd": STEPS["sgd"]})
    for draw in FIGURES:
        svg = themed(svg_of(drawn(tmp_path, draw), "x-"), "a picture")
        assert re.findall("#[0-9a-fA-F]{6}", svg) == []
        assert "var(--paper)" in svg
        assert 'aria-label="a picture"' in svg
        assert "DejaVu" not in svg


def test_every_marker_is_filled_with_its_own_colour(tmp_path: Path) -> None:
    # What is black has no fill in matplotlib's SVG, and would be black on dark paper.
    record_study(tmp_path, dict.fromkeys(KNOWN, STEPS["adamw"]))
    svg = themed(svg_of(drawn(tmp_path, steps_figure), "x-"), "a picture")
    for place in range(len(COLOURS)):
        assert f"fill: var(--c{place})" in svg


def data_of(line: Line2D) -> tuple[list[float], list[float]]:
    return np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()


def overlapping_texts(figure: Figure) -> list[tuple[str, str]]:
    figure.draw_without_rendering()
    shown = [
        (text.get_text(), text.get_window_extent())
        for text in figure.findobj(Text)
        if isinstance(text, Text) and text.get_visible() and text.get_text().strip()
    ]
    assert len(shown) > 10
    width, height = figure.bbox.width, figure.bbox.height
    beyond = [
        (text, "the edge")
        for text, box in shown
        if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height
    ]
    return beyond + [(one, two) for (one, a), (two, b) in combinations(shown, 2) if a.overlaps(b)]


@pytest.mark.parametrize("width", [WIDE, NARROW], ids=["wide", "phone"])
@pytest.mark.parametrize("draw", FIGURES, ids=["steps", "ratio", "rates", "basins"])
def test_no_two_texts_of_the_pictures_overlap(
    tmp_path: Path, draw: Callable[..., Picture], width: float
) -> None:
    record_study(tmp_path, STEPS)
    assert overlapping_texts(drawn(tmp_path, draw, width).figure) == []


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_a_panel_looks_as_matplotlib_would_draw_it(scale: str) -> None:
    images = []
    for kind in (Axes, PlainAxes):
        with paper_style():
            figure = Figure(figsize=(2.4, 1.6), dpi=80)
            upper, lower = figure.subplots(
                2, sharex=True, subplot_kw={"axes_class": kind}, gridspec_kw={"left": 0.3}
            )
            upper.set(xscale=scale, yscale=scale, xlim=(0.9, 130), ylim=(700, 2), ylabel="steps")
            for axis in (upper.xaxis, upper.yaxis):
                axis.set_major_locator(FixedLocator([1, 10, 60, 100, 1000]))
                axis.set_minor_locator(FixedLocator([1, 2, 20, 90, 500]))
                axis.set_major_formatter(FuncFormatter(plain))
                axis.set_minor_formatter(NullFormatter())
            lower.yaxis.set_major_locator(NullLocator())
            lower.set(ylim=(0, 1), xlabel="batch size")
            set_grid(upper)
            lower.set_title("lower", loc="left")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        images.append(np.asarray(canvas.buffer_rgba()))
    assert np.array_equal(*images)


def test_lines_are_named_where_they_end_and_by_a_legend_where_there_is_no_room(
    tmp_path: Path,
) -> None:
    record_study(tmp_path, {"sgd": STEPS["sgd"], "adamw": STEPS["adamw"]})
    beside, below = drawn(tmp_path, steps_figure).figure, drawn(tmp_path, steps_figure, NARROW)
    names = {text.get_text().strip(): text for text in beside.axes[0].texts}
    legends = [
        {text.get_text() for text in figure.legends[0].get_texts()}
        for figure in (beside, below.figure)
    ]
    assert set(names) == {"adamw", "sgd"} <= legends[1]
    assert not legends[0] & {"adamw", "sgd"}
    assert not below.figure.axes[0].texts
    for name, text in names.items():  # each led to by a line of its colour
        ends = [
            line for line in beside.axes[0].lines if data_of(line)[1][-1] == text.get_position()[1]
        ]
        assert [line.get_color() for line in ends] == [KNOWN[name].colour]


def lines_of(axes: Axes) -> list[tuple[list[float], list[float]]]:
    return [data_of(line) for line in axes.lines]


def test_the_steps_picture_draws_the_points_and_sets_misses_apart(tmp_path: Path) -> None:
    record(tmp_path / "a", 500)
    record(tmp_path / "b", 260, batch_size=128)
    record(tmp_path / "c", 140, batch_size=256)
    record(tmp_path / "d", None, batch_size=512)
    panel = drawn(tmp_path, steps_figure).figure.axes[0]
    assert any(
        x == [64, 128, 256] and y == pytest.approx([500, 260, 140]) for x, y in lines_of(panel)
    )
    (missed,) = (line for line in panel.lines if data_of(line)[0] == [512])
    assert missed.get_markerfacecolor() == "white"
    height = panel.transData.inverted().transform(
        missed.get_transform().transform((512, data_of(missed)[1][0]))
    )[1]
    assert height > 500


def test_the_rate_picture_hollows_the_edges_and_crosses_the_misses(tmp_path: Path) -> None:
    record(tmp_path / "a", 100, lr=0.01)
    for name, lr, steps in (("b", 0.01, 70), ("c", 0.02, 60), ("d", 0.04, None)):
        record(tmp_path / name, steps, batch_size=256, lr=lr)
    panel = drawn(tmp_path, rate_figure).figure.axes[0]
    solid, hollow = panel.lines[-2:]
    assert (data_of(hollow), hollow.get_markerfacecolor()) == (([64], [0.01]), "white")
    assert (data_of(solid), solid.get_markerfacecolor()) == (([256], [0.02]), KNOWN["adamw"].colour)
    (cross,) = (line for line in panel.lines if line.get_marker() == "x")
    assert data_of(cross) == ([256], [0.04])


def test_the_basins_show_every_trial_and_what_became_of_it(tmp_path: Path) -> None:
    record_study(tmp_path, {"adamw": STEPS["adamw"]})
    picture = drawn(tmp_path, basin_figure)
    assert sum(map(len, picture.tips.values())) == 9 * 9
    panel = picture.figure.axes[0]
    (cut,) = (line for line in panel.lines if line.get_marker() == "^")
    assert data_of(cut)[0] == pytest.approx([math.sqrt(2)], rel=1e-3)
    assert data_of(cut)[1] == [int(520 * 1.15)]
    assert cut.get_markerfacecolor() == "white"


def test_a_basin_of_rates_decades_apart_is_drawn_whole(tmp_path: Path) -> None:
    record(tmp_path / "a", 100, lr=1e-4)
    record(tmp_path / "b", 900, lr=1.0)
    record(tmp_path / "c", None, lr=100.0, status="diverged", steps=3)
    picture = drawn(tmp_path, basin_figure)
    assert overlapping_texts(picture.figure) == []
    assert svg_of(picture, "x-").count("<title>") == 3


def test_published_curves_are_drawn_on_request_with_their_source(tmp_path: Path) -> None:
    record_study(tmp_path, {"adamw": hyperbola(24, 1100)})
    found = references(["mlperf", "zhang"])
    assert len(found) == 7
    for reference in found:  # each meets its own asymptotes where it is moved to
        ends = reference.steps[0] * reference.batch_sizes[0], reference.steps[-1]
        assert all(0.5 < end < 2.5 for end in ends), reference.name
    assert main([str(tmp_path), "--reference", "mlperf"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert SOURCES["mlperf"] in page
    assert "LARS, ResNet-50 (mlperf)" in page
    assert SOURCES["zhang"] not in page
    figure = drawn(tmp_path, partial(steps_figure, published=found[:1])).figure
    steps = [y for x, y in lines_of(figure.axes[0]) if len(x) not in (2, 9, 120)]
    assert any(max(y) > 24 for y in steps)


def test_a_reference_that_there_is_not_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path / "a", 100)
    assert main([str(tmp_path), "--reference", "mine"]) == 2
    said = capsys.readouterr().err
    assert said == "largebatch report: --reference must be among mlperf, zhang, got 'mine'\n"
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(("low", "high"), [(11, 65), (0.9, 2.2), (1e-6, 1e6), (0.97, 1.04)])
def test_an_axis_has_several_round_labels_however_long_it_is(low: float, high: float) -> None:
    assert 3 <= len(round_numbers(low, high)) <= 8
    assert all(low <= tick <= high for tick in round_numbers(low, high))
