"""`largebatch plan`: the schedule of the run that `largebatch train` would make, without making it.

Imports no torch, touches no data, model or run folder; matplotlib only to draw.
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
from largebatch.common.text import missing, say
from largebatch.conf.config import TrainConfig, typed
from largebatch.distributed.ranks import find_ranks
from largebatch.records.outcomes import ExitCode
from largebatch.schedules import Plan, PlannedStage, whole_number
from largebatch.train.hydra_app import run_hydra
from largebatch.train.run_spec import make_plan

MOST_ROWS: Final = 40
MOVES: Final = ("betas", "eps", "weight_decay")


def main(arguments: list[str]) -> int:
    """Run `largebatch plan ARGUMENTS`; returns the exit code."""
    parser = _parser()
    options, overrides = parser.parse_known_args(arguments)
    if {"-h", "--help"} & set(overrides):
        parser.print_help()
        print("\nOVERRIDES are those of largebatch train:\n")
    refused: list[ConfigError] = []

    def show(composed: DictConfig) -> None:
        try:
            _show(composed, options)
        except ConfigError as error:  # Hydra prints around what its task raises
            refused.append(error)

    try:
        # The last word counts: Hydra makes the folder of a run, and there is none.
        run_hydra(show, "plan", [*overrides, "hydra.run.dir=."])
        for error in refused:
            raise error
    except ConfigError as error:
        say(error)
        return ExitCode.REFUSED
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "largebatch plan", usage="largebatch plan [OPTIONS] OVERRIDES", add_help=False,
        allow_abbrev=False, description="Print and draw a run's schedule without training.",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument(
        "--picture", type=Path, default=Path("plan.png"), metavar="FILE",
        help="where to draw it, by its suffix as png, pdf or svg (default: plan.png)",
    )  # fmt: skip
    parser.add_argument("--no-picture", action="store_true", help="do not draw it")
    parser.add_argument("--ranks", metavar="N", help="ranks to plan for (default: engine.nproc)")
    return parser


def _show(composed: DictConfig, options: Namespace) -> None:
    config = typed(composed)
    if config.study is not None:
        raise ConfigError("a study is many runs, each with a plan of its own: leave study out")
    plan, ranks = make_plan(config), max(find_ranks().size, config.engine.nproc)
    if options.ranks is not None:
        with refusing():
            ranks = whole_number(options.ranks, "--ranks", 1)
    description = describe(plan, config, ranks)
    if options.json:
        print(json.dumps(description, indent=1))
    else:
        print(table(description))
    if not options.no_picture:
        try:
            from largebatch.train.plan.picture import draw
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"the picture needs {missing(error)}: pip install 'largebatch[train]', or "
                "--no-picture"
            ) from error
        choices = HydraConfig.get().runtime.choices
        decide = ("optim", "batch", "lr", "scaling") if config.mode is None else ("mode", "optim")
        title = ", ".join(f"{name}={choices[name]}" for name in decide)
        _save(draw(plan, title), options.picture)
        if not options.json:
            print(f"picture: {os.path.relpath(options.picture)}")


def _save(figure: Any, path: Path) -> None:
    from largebatch.common.figures import DPI

    try:
        figure.savefig(path, dpi=DPI)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--picture {path}: {error}") from error


def describe(plan: Plan, config: TrainConfig, ranks: int) -> dict[str, Any]:
    """The plan in plain numbers, as `--json` prints it."""
    with refusing():
        splits = {
            split.global_batch_size: split
            for split in plan.splits(ranks, config.engine.known_micro_batch_size)
        }

    def row(stage: PlannedStage) -> dict[str, Any]:
        split = splits[stage.batch_size]
        moves = {name: getattr(stage.hyper, name) for name in MOVES}
        return {
            "samples": stage.samples,
            "tokens": stage.samples * plan.tokens_per_sample,
            "step": stage.step,
            "num_steps": stage.num_steps,
            "batch_size": stage.batch_size,
            "micro_batch_size": split.micro_batch_size,
            "gradient_accumulation_steps": split.gradient_accumulation_steps,
            "lr": stage.lr,
            "last_lr": stage.last_lr,
        } | {name: value for name, value in moves.items() if value is not None}

    return {
        "stages": [row(stage) for stage in plan.stages()],
        "totals": plan.totals()._asdict(),
        "data_parallel_size": ranks,
        "decided_during_the_run": plan.is_open,
    }


def table(description: dict[str, Any]) -> str:
    """The description as lines for people."""
    stages, totals = description["stages"], description["totals"]
    moving = [name for name in MOVES if len({str(stage.get(name)) for stage in stages}) > 1]
    heads = ["samples", "step", "batch", "micro x accum", "steps", "lr", "to", *moving]
    rows = [
        [
            f"{stage['samples']:,}",
            f"{stage['step']:,}",
            f"{stage['batch_size']:,}",
            f"{stage['micro_batch_size']} x {stage['gradient_accumulation_steps']}",
            f"{stage['num_steps']:,}",
            f"{stage['lr']:.4g}",
            f"{stage['last_lr']:.4g}",
            *(_short(stage.get(name)) for name in moving),
        ]
        for stage in stages
    ]
    ranks = description["data_parallel_size"]
    lines = [*_aligned(heads, rows), "", _summary(stages, totals)]
    if ranks > 1:
        lines.append(f"{ranks} ranks, each batch = ranks x micro x accum")
    if description["decided_during_the_run"]:
        lines.append("later batch sizes are decided during the run; these totals are without them")
    return "\n".join(lines)


def _summary(stages: Sequence[dict[str, Any]], totals: dict[str, int]) -> str:
    text = f"{totals['steps']:,} steps, {totals['samples']:,} samples"
    if totals["tokens"] != totals["samples"]:
        text += f", {totals['tokens']:,} tokens"
    if totals["steps_saved"]:
        alone = totals["steps"] + totals["steps_saved"]
        share, first = totals["steps_saved"] / alone, stages[0]["batch_size"]
        text += f"; {share:.0%} fewer steps than the {alone:,} of a constant {first:,}"
    return text


def _aligned(heads: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in [heads, *rows]
    ]
    left_out = len(rows) - MOST_ROWS
    if left_out > 0:
        half = MOST_ROWS // 2
        lines[1 + half : -half] = [f"… {left_out} more stages; --json has them all …"]
    return lines


def _short(value: Any) -> str:
    if isinstance(value, Sequence):
        return ", ".join(map(_short, value))
    return f"{value:.4g}"
