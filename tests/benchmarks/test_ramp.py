"""The comparison of ramps is one of real runs, and its table says what they took."""

import json
from pathlib import Path

import pytest

from largebatch.benchmarks import ramp


@pytest.mark.matrix
def test_the_comparison_runs_and_tells_what_its_runs_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ramp, "SIZES", (256,))
    monkeypatch.setattr(ramp, "RATES", (0.016,))
    monkeypatch.setattr(ramp, "EXCHANGE_RATES", (1000,))
    quick = ("target.loss=2.6", "hydra.launcher.n_jobs=1")
    monkeypatch.setattr(ramp, "COMMON", (*ramp.COMMON, *quick))
    assert ramp.main(["--seeds", "1", "--folder", "here"]) == 0
    rows = capsys.readouterr().out.splitlines()
    for kind, name in (("constant", "constant 256"), ("ramp", "sqrt_noise, r = 1000")):
        folder = tmp_path / "here" / kind / "0"
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["status"] == "reached"
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        wanted = (summary["steps_to_target"], summary["samples_to_target"], last["noise_scale"])
        (row,) = [row for row in rows if row.startswith(name)]
        told = row[24:].replace(",", "").split()
        assert [float(word) for word in told[1:4]] == pytest.approx(wanted, rel=0.02)
    assert (tmp_path / "here" / "ramp.png").stat().st_size > 10_000
    assert ramp.main(["--seeds", "1", "--folder", "here"]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_ramp_is_held_against_constants_that_take_as_many_samples() -> None:
    def setting(name: str, steps: int, samples: int) -> ramp.Setting:
        return ramp.Setting(name, 0.016, [ramp.Run(Path(), steps, samples, 1000.0)])

    constants = [setting("128", 200, 30_000), setting("1024", 50, 60_000)]
    ramps = [setting("100", 180, 29_000), setting("1000", 100, 32_000), setting("9", 40, 80_000)]
    lines = ramp.table(constants, ramps).splitlines()
    assert lines[-2].endswith("r = 1000: -50% steps, +7% samples")
    assert lines[-1].endswith("r = 1000: +100% steps, -47% samples")
