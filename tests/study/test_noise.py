"""The noise scale of a run, read from its lines and drawn."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection

from largebatch.study.report import main
from largebatch.study.single_runs.noise import noise_figure, read_noise

NAN = float("nan")


def write_run(folder: Path, lines: list[dict[str, Any]], cut: str = "") -> Path:
    folder.mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines) + cut
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def line(
    samples: int, batch: int, scale: float | None, error: float | None, resolved: bool, **more: Any
) -> dict[str, Any]:
    return {
        "samples": samples,
        "global_batch_size": batch,
        "noise_scale": scale,
        "noise_scale_error": error,
        "noise_resolved": resolved,
    } | more


LINES = [
    line(64, 64, 90.0, None, False),
    {"samples": 128, "global_batch_size": 64, "loss": 2.0},  # a step that was not finite
    line(192, 64, None, None, False, **{"noise_scale/a": None, "noise_scale/b": 7.0}),
    line(320, 128, 100.0, 300.0, True, **{"noise_scale/a": 50.0, "noise_scale/b": None}),
    line(448, 128, 200.0, 50.0, True, **{"noise_scale/a": 80.0, "noise_scale/b": 9.0}),
]
PRECONDITIONED = {"noise_scale_preconditioned": 4000.0, "noise_scale_preconditioned_error": 1000.0}


def drawn(axes: Axes, label: str) -> tuple[list[float], list[float]]:
    """Both coordinates of the one line of that label."""
    (found,) = (each for each in axes.get_lines() if each.get_label() == label)
    return list(found.get_xdata()), list(found.get_ydata())  # type: ignore[arg-type]


def test_lines_are_read_with_what_they_lack_left_open(tmp_path: Path) -> None:
    history = read_noise(write_run(tmp_path / "run", LINES, cut='{"samples": 512, "noise_sc'), [])
    assert history.samples.tolist() == [64, 192, 320, 448]
    assert history.batch_size.tolist() == [64, 64, 128, 128]
    np.testing.assert_array_equal(history.whole.scale, [90, NAN, 100, 200])
    np.testing.assert_array_equal(history.whole.error, [NAN, NAN, 300, 50])
    assert history.whole.resolved.tolist() == [False, False, True, True]
    assert history.preconditioned is None
    assert [*history.layers] == ["a", "b"]
    np.testing.assert_array_equal(history.layers["a"], [NAN, NAN, 50, 80])


def test_what_is_resolved_is_solid_with_its_band_and_the_batch_is_a_staircase(
    tmp_path: Path,
) -> None:
    axes = noise_figure(read_noise(write_run(tmp_path / "run", LINES), []), "run").axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    samples = [64, 192, 320, 448]
    assert drawn(axes, "_solid")[0] == samples
    np.testing.assert_array_equal(drawn(axes, "_solid")[1], [NAN, NAN, 100, 200])
    np.testing.assert_array_equal(drawn(axes, "_faint")[1], [90, NAN, 100, 200])
    assert drawn(axes, "_batch") == (samples, [64, 64, 128, 128])
    (batch,) = (each for each in axes.get_lines() if each.get_label() == "_batch")
    assert batch.get_drawstyle() == "steps-pre"  # a step's batch is that of the samples before it
    np.testing.assert_array_equal(drawn(axes, "_layer b")[1], [NAN, 7, NAN, 9])
    # 100 ± 300 as a ratio: 100 / 4 to 100 * 4; 200 ± 50: 200 / 1.25 to 200 * 1.25.
    (band,) = (each for each in axes.collections if isinstance(each, PolyCollection))
    (path,) = band.get_paths()
    assert {tuple(point) for point in np.asarray(path.vertices).tolist()} == {
        (320.0, 25.0), (320.0, 400.0), (448.0, 160.0), (448.0, 250.0)
    }  # fmt: skip
    low, high = axes.get_ylim()
    assert low < 9  # layers are within the picture where the whole is resolved,
    assert low > 7 / 1.5  # and elsewhere do not stretch it
    assert 400 < high < 1000


def test_the_preconditioned_scale_is_a_curve_of_its_own(tmp_path: Path) -> None:
    lines = [LINES[0], LINES[3] | PRECONDITIONED | {"noise_preconditioned_resolved": True},
             LINES[4] | PRECONDITIONED | {"noise_preconditioned_resolved": False}]  # fmt: skip
    history = read_noise(write_run(tmp_path / "run", lines), [])
    assert history.preconditioned is not None
    np.testing.assert_array_equal(history.preconditioned.scale, [NAN, 4000, 4000])
    assert history.preconditioned.resolved.tolist() == [False, True, False]
    figure = noise_figure(history, "run")
    solid = [each for each in figure.axes[0].get_lines() if each.get_label() == "_solid"]
    np.testing.assert_array_equal([*map(list, (each.get_ydata() for each in solid))],
                                  [[NAN, 4000, NAN], [NAN, 100, 200]])  # fmt: skip
    (legend,) = figure.legends
    assert "Noise scale, preconditioned" in [text.get_text() for text in legend.get_texts()]


def test_many_layers_are_named_by_the_first_and_the_last(tmp_path: Path) -> None:
    layers = {f"noise_scale/{n}.weight": 10.0 + n for n in range(20)}
    run = write_run(tmp_path / "run", [line(64 * n, 64, 9.0, 1.0, True) | layers for n in (1, 2)])
    figure = noise_figure(read_noise(run, []), "run")
    (legend,) = figure.legends
    named = [text.get_text() for text in legend.get_texts() if "weight" in text.get_text()]
    assert named == ["0.weight (first layer)", "19.weight (last)"]
    lines = [each.get_label() for each in figure.axes[0].get_lines()]
    assert sum(str(label).startswith("_layer ") for label in lines) == 20


@pytest.mark.parametrize("lines", [LINES, [LINES[0]], [LINES[2]]], ids=["run", "one", "open"])
def test_the_report_of_one_run_draws_it(
    lines: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", lines)
    assert main([str(run), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert told.endswith(f"noise: {tmp_path / 'out' / 'noise.png'}\n")
    assert (tmp_path / "out" / "noise.png").read_bytes().startswith(b"\x89PNG")
    assert not (run / "noise.png").exists()


def test_trust_ratios_and_noise_are_two_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", [each | {"trust_ratio/a": 0.5} for each in LINES])
    assert main([str(run)]) == 0
    told = capsys.readouterr().out
    assert "layers.png" in told
    assert "noise.png" in told


def test_a_run_without_noise_says_how_to_record_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [{"samples": 64, "loss": 2.0}])
    with pytest.raises(ValueError, match=r"noise\.small=auto"):
        read_noise(run, [])
