"""`largebatch branch CHECKPOINT`: the branched critical batch size of a run, at one checkpoint.

Branches at multiples of the batch size go on from the checkpoint with the learning rate scaled, for
a window of samples; the largest batch whose smoothed loss is within a tolerance of every smaller
batch's is printed beside the gradient noise scale. The branches are a sweep: they run side by side,
or over an allocation (hydra/launcher=parsl), and the same command passes by what has ended.
"""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from largebatch.common.errors import ConfigError
from largebatch.common.text import printable, say
from largebatch.records.names import METRICS
from largebatch.records.outcomes import ExitCode
from largebatch.schedules import RULES
from largebatch.schedules.scaling import options_of
from largebatch.train.branch import report
from largebatch.train.branch.verdict import BranchVerdict, judge, read_noise, verdict_of
from largebatch.train.branch.words import Branching, branching_of, read_trunk
from largebatch.train.command import run_command

MULTIPLES: Final = "1,2,4,8,16,32"
SHARE: Final = 0.25
"""Of the window, at its end, over which losses are averaged."""


def main(arguments: list[str]) -> int:
    """Run `largebatch branch ARGUMENTS`; returns the exit code."""
    options, words = parser().parse_known_args(arguments)
    try:
        return branch(options, words)
    except (ConfigError, OSError) as error:
        say(printable(str(error)))
    return ExitCode.REFUSED


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "largebatch branch",
        usage="largebatch branch CHECKPOINT [OPTIONS] [OVERRIDES]",
        description=__doc__.partition("\n")[0] if __doc__ else None,
        epilog="OVERRIDES go to the branches beside the words of their run: engine=…, "
        "hydra/launcher=parsl, --config-dir=DIR. Exit codes: 0; 1 a branch failed; 2 refused; 130 "
        "interrupted, and the same command resumes.",
        allow_abbrev=False,
    )
    add = made.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="RUN/checkpoints/samples-N, or RUN")
    add("--multiples", default=MULTIPLES, metavar="LIST", help="of its batch (%(default)s)")
    add("--window", metavar="SAMPLES", help="of each branch (32 steps of the largest batch)")
    add("--tolerance", type=float, default=0.01, help="of the loss (%(default)s)")
    add(
        "--rule",
        choices=[name for name in RULES if "noise_scale" not in options_of(RULES[name])],
        help="of the learning rate (sqrt; linear for SGD and LARS; the run's own if it has one)",
    )
    add("--no-noise", action="store_true", help="do not measure the noise scale")
    add("--out", type=Path, metavar="DIR", help="for the branches (branches/RUN-samples-N)")
    return made


def branch(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Make the branches and judge them; returns the exit code.

    Raises:
        ConfigError: what is asked cannot be.
    """
    if not (math.isfinite(options.tolerance) and options.tolerance >= 0):
        raise ConfigError(f"--tolerance must be a number >= 0, got {options.tolerance}")
    trunk = read_trunk(options.checkpoint, words)
    asked = branching_of(
        trunk, _wholes("--multiples", options.multiples),
        None if options.window is None else _wholes("--window", options.window)[0], options.rule,
    )  # fmt: skip
    folder = (options.out or Path("branches") / trunk.name).absolute()
    code = run_command("sweep", ["hydra.mode=MULTIRUN", *asked.words(folder), *words])
    if code != 0:
        return code
    noise = None if options.no_noise else measured_noise(asked, folder, words)
    sizes = [*zip(asked.multiples, asked.batch_sizes, strict=True)]
    verdict = verdict_of(
        judge(folder, trunk.samples, asked.window, sizes, SHARE), trunk.samples, asked.window,
        asked.rule, options.tolerance, noise,
    )  # fmt: skip
    show(verdict, folder, trunk.name)
    return 0


def measured_noise(
    asked: Branching, folder: Path, words: Sequence[str]
) -> tuple[float, float, bool] | None:
    """The noise scale by the baseline, where its run measures it, else by one run more."""
    if asked.trunk.noise is not None:
        return read_noise(folder / f"batch-{asked.trunk.batch_size}")
    given = [word.partition("=")[2] for word in words if word.startswith("engine.nproc=")]
    ranks = int(given[-1]) if given and given[-1].isdecimal() else 1
    own = asked.noise_words(folder, ranks)
    if own is None or run_command("sweep", ["hydra.mode=MULTIRUN", *own, *words]) != 0:
        return None  # why is on stderr
    run = folder / "noise" / "run"
    return read_noise(run) if (run / METRICS).exists() else None


def show(verdict: BranchVerdict, folder: Path, name: str) -> None:
    """Print the table, and write it and the picture beside the branches."""
    from largebatch.common.figures import DPI

    print(report.table(verdict))
    report.write_csv(verdict, folder / "branches.csv")
    report.draw(verdict, f"Branches of {name}").savefig(folder / "branches.png", dpi=DPI)
    print(f"{folder / 'branches.csv'}, {folder / 'branches.png'}")


def _wholes(name: str, text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch(r"[0-9]+(e[0-9]{1,2})?", word) and float(word) >= 1 for word in words):
        raise ConfigError(f"{name} must be whole numbers of at least 1, as {MULTIPLES}, got {text}")
    return [int(float(word)) for word in words]
