"""The start of many ranks is measured as far as one machine can, and says what it is not."""

import json
from pathlib import Path

import pytest

from largebatch.benchmarks.init import main


def test_every_measurement_has_its_floor_and_its_limits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "record.json"
    arguments = ["--clients", "6", "--ranks", "3", "--fake", "12", "24576", "--json", str(record)]
    assert main(arguments) == 0
    told = json.loads(record.read_text(encoding="utf-8"))
    (store,), (gloo,), fake = told["store"], told["gloo"], told["fake"]
    assert (store["clients"], gloo["ranks"]) == (6, 3)
    assert [row["ranks"] for row in fake] == [12, 24_576]
    for row in (store, gloo, *fake):
        assert all(value > 0 for value in row.values())
    # The work of one rank grows with the world.
    assert fake[1]["numbers_seconds"] > fake[0]["numbers_seconds"]
    assert fake[1]["mesh_seconds"] > fake[0]["mesh_seconds"]
    printed = capsys.readouterr().out
    assert printed.count("Not in it:") == 3
    assert "24,576" in printed


@pytest.mark.parametrize(
    "arguments", [["--clients", "1"], ["--clients", "100000000"], ["--ranks", "300"]]
)
def test_numbers_that_this_machine_cannot_hold_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert f"{arguments[0]} takes 2 to" in capsys.readouterr().err
