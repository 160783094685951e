"""`make pictures`: every picture of README and docs, from what is committed beside it.

Curves come from the tables in docs/studies/, a plan from the command that its page shows; all are
drawn by what draws them for users. `python docs/site/pictures.py FOLDER` writes them elsewhere.
"""

import json
import re
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ramps
import tables

from largebatch.benchmarks import transfer
from largebatch.common.figures import paper_style
from largebatch.study.final_loss.figures import final_loss_figure
from largebatch.study.page.axes import WIDE
from largebatch.study.page.figures import steps_figure
from largebatch.study.page.styles import curve_styles
from largebatch.study.page.svg import write_png
from largebatch.study.section_study import Study
from largebatch.train.plan import command as plan_command

DOCS = Path(__file__).resolve().parents[1]
STUDIES = DOCS / "studies"


def draw_steps(study: str, path: Path) -> None:
    """Steps to target against batch size."""
    section = tables.read_section(STUDIES / study)
    styles = curve_styles((one.name, one.optimizer) for one in section.section.curves)
    with paper_style():
        write_png(steps_figure(Study([], [section], []), section, styles, WIDE), path)


def draw_losses(study: str, path: Path) -> None:
    """Final losses against batch size."""
    section = tables.read_losses(STUDIES / study)
    with paper_style():
        write_png(final_loss_figure(section, curve_styles(section.curves), WIDE), path)


def draw_plan(page: str, path: Path) -> None:
    """The plan whose command stands above the picture on a page."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.search(
        rf"```sh\n(largebatch plan [^`]*)```\n\n!\[[^]]*\]\({re.escape(path.name)}\)", text
    )
    assert found is not None, f"{page} has no `largebatch plan` above {path.name}"
    _, _, *words = shlex.split(found[1].replace("\\\n", ""))
    assert plan_command.main([*words, "--picture", str(path)]) == 0


def draw_transfer(path: Path) -> None:
    """Loss against rate at two widths."""
    record = json.loads((STUDIES / "transfer" / "transfer.json").read_text(encoding="utf-8"))
    transfer.draw(record, path)


PICTURES: dict[str, Callable[[Path], None]] = {
    "autoencoder": partial(draw_steps, "autoencoder"),
    "curve": partial(draw_steps, "bytes"),
    "final_loss": partial(draw_losses, "bytes_decay"),
    "plan": partial(draw_plan, "schedules.md"),
    "ramp": partial(ramps.draw, STUDIES / "ramps"),
    "second_order": partial(draw_steps, "second_order"),
    "text": partial(draw_steps, "text"),
    "transfer": draw_transfer,
    "tutorial": partial(draw_steps, "tutorial"),
}
"""By name, what draws it into a file."""


def draw_all(folder: Path) -> None:
    for name, draw in PICTURES.items():
        draw(folder / f"{name}.png")


if __name__ == "__main__":
    draw_all(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS)
