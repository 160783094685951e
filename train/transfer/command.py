"""`largebatch coord`: do the rates of a small model hold on a wide one? A check in seconds.

Trains the configured run for a few steps at several widths, in this process on the CPU, and holds
what every layer puts out against the width. Without `scaling.base_width` it is the standard
parametrisation that is checked, which drifts.
"""

import json
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from largebatch.common.errors import ConfigError, refusing
from largebatch.common.numbers import real_number, whole_number
from largebatch.common.text import and_more, missing, say
from largebatch.conf.build import build
from largebatch.conf.config import typed
from largebatch.records.outcomes import ExitCode
from largebatch.train.hydra_app import run_hydra
from largebatch.train.transfer.coordinates import (
    Coordinates,
    coordinates,
    drifting,
    slope,
    widened,
)

USUAL: Final = (
    "task=text", "task.num_bytes=200_000", "task.sequence_length=32", "task.num_eval=64",
)  # fmt: skip
"""What is checked where no task is named: the small transformer, on little text."""


def main(arguments: list[str]) -> int:
    """Run `largebatch coord ARGUMENTS`; returns the exit code, 1 where a layer drifts."""
    parser = _parser()
    options, overrides = parser.parse_known_args(arguments)
    if {"-h", "--help"} & set(overrides):
        parser.print_help()
        print("\nOVERRIDES are those of largebatch train, whose --help lists them.")
        return 0
    usual = () if any(word.startswith("task=") for word in overrides) else USUAL
    code, refused = 0, []

    def check(composed: DictConfig) -> None:
        nonlocal code
        try:
            code = _check(composed, options)
        except ConfigError as error:  # Hydra prints around what its task raises
            refused.append(error)

    try:
        # The last word counts: Hydra makes the folder of a run, and there is none.
        run_hydra(check, "coord", [*usual, *overrides, "hydra.run.dir=."])
        for error in refused:
            raise error
    except ConfigError as error:
        say(error)
        return ExitCode.REFUSED
    return code


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "largebatch coord", usage="largebatch coord [OPTIONS] OVERRIDES", add_help=False,
        allow_abbrev=False,
        description="Check that layers change alike at every width; exit code 1 where one drifts.",
    )  # fmt: skip
    parser.add_argument(
        "--widths", default="32,64,128,256", metavar="N,N", help="(default: 32,64,128,256)"
    )
    parser.add_argument(
        "--key", default="dim", help="the key of model that is the width (default: dim)"
    )
    parser.add_argument("--steps", default="4", help="of training at each width (default: 4)")
    parser.add_argument("--samples", default="16", help="in a step's batch (default: 16)")
    parser.add_argument("--seeds", default="3", help="that are averaged (default: 3)")
    parser.add_argument(
        "--tolerance", default="0.25", metavar="X",
        help="most that the change of a layer may grow or fall: as width to this power, either "
        "way (default: 0.25)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument(
        "--picture", type=Path, default=Path("coord.png"), metavar="FILE",
        help="where to draw it, by its suffix as png, pdf or svg (default: coord.png)",
    )  # fmt: skip
    parser.add_argument("--no-picture", action="store_true", help="do not draw it")
    return parser


def _check(composed: DictConfig, options: Namespace) -> int:
    config = typed(composed)
    with refusing():
        widths = sorted({whole_number(w, "--widths", 1) for w in options.widths.split(",")})
        steps = whole_number(options.steps, "--steps", 1)
        samples = whole_number(options.samples, "--samples", 1)
        seeds = whole_number(options.seeds, "--seeds", 1)
        tolerance = real_number(options.tolerance, "--tolerance", above=0.0)
    if len(widths) < 2:
        raise ConfigError(f"--widths must be two or more, got {options.widths}: as in 32,64,128")
    for width in widths:
        widened(config, options.key, width)
    task = build(config.task, "task")
    found = [
        coordinates(
            config, task, key=options.key, width=width, steps=steps, samples=samples, seeds=seeds
        )
        for width in widths
    ]
    drifts = drifting(found, tolerance)
    print(json.dumps(described(found, drifts), indent=1) if options.json else table(found, drifts))
    if not options.no_picture:
        choice = HydraConfig.get().runtime.choices["optim"]
        base = config.scaling.base_width
        title = f"optim={choice}, " + (f"rates of width {base}" if base else "one rate for all")
        _save(found, tolerance, title, options.picture)
        if not options.json:
            print(f"picture: {os.path.relpath(options.picture)}")
    if not options.json:
        print(verdict(drifts, len(found[0].change), tolerance))
    return int(bool(drifts))


def verdict(drifts: Sequence[str], layers: int, tolerance: float) -> str:
    """In one sentence whether layers change alike."""
    if not drifts:
        return f"all {layers} layers change alike at every width (to width^{tolerance:g})"
    return f"{len(drifts)} of {layers} layers drift with width: {and_more(drifts, 4)}"


def described(found: Sequence[Coordinates], drifts: Sequence[str]) -> dict[str, Any]:
    """The numbers of a check, as `--json` prints them."""
    widths = [one.width for one in found]
    return {
        "widths": widths,
        "layers": {
            name: {
                "after": [one.after[name] for one in found],
                "change": [one.change[name] for one in found],
                "slope": slope(widths, [one.change[name] for one in found]),
                "drifts": name in drifts,
            }
            for name in found[0].change
        },
    }


def table(found: Sequence[Coordinates], drifts: Sequence[str]) -> str:
    """RMS of each layer's change at every width, and the power of width that it grows with."""
    widths = [one.width for one in found]
    rows = [["RMS of change in", *map(str, widths), "~ width^", ""]]
    for name in found[0].change:
        change = [one.change[name] for one in found]
        rows.append(
            [name, *(f"{value:.3g}" for value in change), f"{slope(widths, change):+.2f}",
             "drifts" if name in drifts else ""]
        )  # fmt: skip
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(size) if place == 0 else cell.rjust(size)
            for place, (cell, size) in enumerate(zip(row, sizes, strict=True))
        ).rstrip()
        for row in rows
    )


def _save(found: Sequence[Coordinates], tolerance: float, title: str, path: Path) -> None:
    try:
        from largebatch.common.figures import DPI
        from largebatch.train.transfer.picture import draw
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the picture needs {missing(error)}: pip install 'largebatch[train]', or --no-picture"
        ) from error
    try:
        draw(found, tolerance, title).savefig(path, dpi=DPI)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--picture {path}: {error}") from error
