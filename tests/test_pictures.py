"""`make pictures`: what README and docs show is what the command makes from what is committed."""

import csv
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from matplotlib.image import imread

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FITTED = sorted(path.parent.name for path in (ROOT / "docs" / "studies").glob("*/fits.csv"))
MOST_APART = 0.01
"""Of two pictures' values from 0 to 1, on average: fonts of another version shift a few pixels."""


@pytest.fixture(scope="module")
def pictures() -> Iterable[ModuleType]:
    """The module of the command."""
    sys.path.insert(0, str(ROOT / "docs" / "site"))
    try:
        import pictures

        yield pictures
    finally:
        sys.path.pop(0)


def unmade(page: str, made: Iterable[str]) -> set[str]:
    """Pictures that a page shows and the command does not make."""
    shown = re.findall(r"!\[[^]]*\]\(([^)\s]+)\)", page)
    return {Path(name).stem for name in shown} - set(made)


def test_every_picture_of_the_pages_is_made_by_the_command(pictures: ModuleType) -> None:
    made = set(pictures.PICTURES)
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    assert set().union(*(unmade(text, made) for text in texts)) == set()
    assert made == {path.stem for path in (ROOT / "docs").glob("*.png")}
    assert set().union(*(unmade(text, ()) for text in texts)) == made  # and each is shown
    assert unmade("![by hand](docs/copied.png)", made) == {"copied"}


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "docs").glob("*.png")))
def test_a_picture_is_as_the_command_makes_it(
    name: str, pictures: ModuleType, tmp_path: Path
) -> None:
    kept_at = ROOT / "docs" / f"{name}.png"
    pictures.PICTURES[name](tmp_path / kept_at.name)
    drawn, kept = (imread(file)[..., :3] for file in (tmp_path / kept_at.name, kept_at))
    assert drawn.shape == kept.shape
    assert np.abs(drawn - kept).mean() < MOST_APART


@pytest.mark.parametrize("study", FITTED)
def test_tables_read_back_say_what_was_fitted(study: str, pictures: ModuleType) -> None:
    folder = ROOT / "docs" / "studies" / study
    section = pictures.tables.read_section(folder)
    with (folder / "fits.csv").open(newline="", encoding="utf-8") as file:
        fits = {row["optimizer"]: row for row in csv.DictReader(file)}
    assert section.names[: len(fits)] == list(fits)
    for name, row in fits.items():
        b_crit = section.estimates[name].b_crit
        told = [float(row[key]) for key in ("b_crit", "b_crit_low", "b_crit_high")]
        assert [b_crit.value, b_crit.low, b_crit.high] == pytest.approx(told, rel=1e-4)
