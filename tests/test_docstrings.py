"""What docstrings show of an optimizer, a schedule or a fit is what comes out."""

import doctest
import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
WITH_EXAMPLES = [
    ".".join(("largebatch", *path.relative_to(ROOT).with_suffix("").parts))
    for folder in ("common", "optim", "records", "schedules", "study", "train")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


def test_the_main_public_names_have_examples() -> None:
    names = ("factory", "groups", "kfac", "lamb", "lars", "mano", "muon", "shampoo", "soap",
             "soap_muon")  # fmt: skip
    expected = {f"largebatch.optim.{name}" for name in names}
    expected |= {f"largebatch.schedules.{name}" for name in ("curves", "plan", "ramps", "scaling")}
    expected |= {f"largebatch.study.{name}" for name in ("fit", "statistics.intervals")}
    assert expected <= set(WITH_EXAMPLES)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_print_what_they_say(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a run leaves its record there
    found = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch})
    assert found.attempted > 0
    assert found.failed == 0
