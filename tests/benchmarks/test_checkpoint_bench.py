"""The benchmark of checkpoints measures real files, and its projection is a division."""

import json
from pathlib import Path

import pytest

from largebatch.benchmarks import checkpoint


def test_it_measures_and_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "disk").mkdir()
    words = ["--gigabytes", "0.003", "--seconds", "0.1", "--folder", str(tmp_path / "disk")]
    file = tmp_path / "record.json"
    assert checkpoint.main([*words, "--device", "cpu", "--json", str(file)]) == 0
    assert list((tmp_path / "disk").iterdir()) == []
    record = json.loads(file.read_text())
    assert record["bytes"] == pytest.approx(3e6, rel=0.05)
    seconds = record["seconds"]
    assert len(seconds) == 7
    for name, value in seconds.items():
        rate = record["gigabytes_per_second"][name]
        assert rate == pytest.approx(record["bytes"] / 1e9 / value)
    stall, until = (value for name, value in seconds.items() if "async" in name)
    assert 0 < stall < until
    by_place = {row["at"]: row["seconds"] for row in record["projection"]}
    assert next(t for at, t in by_place.items() if "1.4 TB/s" in at) == pytest.approx(
        12.14, abs=0.01
    )
    measured = next(t for at, t in by_place.items() if "as measured here" in at)
    assert measured == pytest.approx(17e12 / record["bytes"] * seconds["save, mode=sync"])
    assert "Projected, not measured: 17 TB" in capsys.readouterr().out


def test_what_cannot_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--gigabytes", "0"], ["--folder", str(tmp_path / "no")], ["--gigabytes", "900"]):
        with pytest.raises(SystemExit) as refused:
            checkpoint.main([*words, "--device", "cpu"])
        assert refused.value.code == 2
    assert "--folder must be a folder that exists" in capsys.readouterr().err
