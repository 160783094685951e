"""`largebatch train`: one run, on one rank or many. Imports torch only once the configuration
holds.

Rank 0 composes the configuration, owns the folder and decides; the others take from it the resolved
configuration and the folder. (Left alone, every rank's `hydra.main` would make its own.)
"""

import os
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Final, cast

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from largebatch.common.errors import ConfigError, RanksEnded, RunFailed, SweepFailed, refusing
from largebatch.common.loading import load
from largebatch.common.text import say, terminal_width, wrapped
from largebatch.common.user_code import of_user
from largebatch.distributed.ranks import Ranks, die_with_parent
from largebatch.distributed.team import Team, find_team, started_team
from largebatch.records.outcomes import STATUS_CODES, ExitCode
from largebatch.records.record import RunEnded
from largebatch.records.summary import SummaryRecord, aimed_at, in_words, objective
from largebatch.train.hydra_app import again, import_from_here, parse_options, run_hydra
from largebatch.train.run_spec import RunSpec, received_spec, resolve_run
from largebatch.train.sweeps import failure_of, line_of, reported, shown_folder

_TRIAL: Final = "largebatch_trial"
"""The sweeper of one run of a sweep, in processes that the sweep's launcher has started."""

_outcome: list[SummaryRecord | Exception] = []
"""What the run came to: Hydra's main returns nothing, and prints around what a task raises."""


def main(arguments: list[str]) -> int:
    """Run `largebatch train ARGUMENTS`; returns the exit code."""
    return run_command("train", arguments)


def run_command(command: str, arguments: list[str]) -> int:
    """Run the runs that `arguments` ask for; returns the exit code."""
    _outcome.clear()
    again.clear()
    try:
        import_from_here()
        with find_team() as team:
            return lead(team, command, arguments) if team.ranks.is_first else follow(team)
    except RanksEnded as ended:  # already reported
        return ended.code
    except ConfigError as error:
        say(error)
        return ExitCode.REFUSED
    except (RunFailed, SweepFailed) as error:  # each run has been reported by itself
        more = "" if error.refused else f"; the same command{again[0]} makes those again"
        say(f"{error}{more}")
        return ExitCode.REFUSED if error.refused else ExitCode.FAILED
    except KeyboardInterrupt:
        if not again:  # no sweep
            raise
        say(f"interrupted; the same command{again[0]} resumes from here")
        return ExitCode.INTERRUPTED
    except Exception as error:
        return failed(error)


def lead(team: Team, command: str, arguments: list[str]) -> int:
    """Compose the configuration as rank 0, and train; returns the exit code."""
    if team.ranks.size > 1:
        check_single(team.ranks, command, arguments)
    run_hydra(task, command, arguments)
    for outcome in _outcome:
        if isinstance(outcome, Exception):
            raise outcome
        return exit_code(outcome)
    return 0  # --help, --cfg and their like; a sweep all of whose runs have ended


def check_single(ranks: Ranks, command: str, arguments: list[str]) -> None:
    """Refuse a sweep by ranks that a launcher has started: they are for one run."""
    options = parse_options(arguments)
    words = [word.lstrip("+") for word in options.overrides]
    if f"hydra/sweeper={_TRIAL}" in words:  # one run, whose ranks a sweep has started
        return
    if command == "sweep" or options.multirun or "hydra.mode=MULTIRUN" in words:
        raise ConfigError(
            f"{ranks.launcher} has started {ranks.size} ranks for one run, and a sweep is many: "
            "use `largebatch sweep …` without a launcher, with hydra/launcher=parsl for the nodes "
            "of a job, or engine.nproc for several ranks a run"
        )


def failed(error: Exception) -> int:
    """Show an error within the user's own code by their frames alone; returns the exit code.

    Raises:
        Exception: `error`, where it is another one, or the whole trace is asked for.
    """
    trace = of_user(error)
    if trace is None:
        raise error
    print(trace, file=sys.stderr)
    return ExitCode.FAILED


def task(composed: DictConfig) -> float | None:
    """Hydra's task: a run by itself, or one of a sweep, which returns what a sweeper makes small.

    A trial that a sweep's launcher has started is by itself: its summary and its exit code are what
    the launcher reads.
    """
    settings = HydraConfig.get()
    trial = settings.runtime.choices.get("hydra/sweeper") == _TRIAL
    if settings.mode == RunMode.RUN or trial:
        single_run(composed)
        return None
    try:
        summary = job(composed)
    except Exception as error:
        raise reported(failure_of(error)) from None
    if summary["status"] == "failed":  # a search of mode=lr_find that found nothing
        raise reported(RunFailed(shown_folder(), summary["error"]))
    if summary["status"] == "interrupted":
        raise KeyboardInterrupt
    return objective(summary)


def single_run(composed: DictConfig) -> None:
    """Note the summary, or why there is none."""
    from largebatch.train.lr_find import results as lr_results

    try:
        summary = job(composed, display=True)
    except Exception as error:
        _outcome.append(error)
    else:
        _outcome.append(summary)
        folder = Path(shown_folder())
        print(wrapped(in_words(summary, folder), terminal_width(sys.stdout)))
        if "lr_find" in summary:
            print(lr_results.format_outcome(summary, folder))
        if summary["status"] == "interrupted":
            say(to_resume(summary, folder))


def to_resume(summary: SummaryRecord, folder: Path) -> str:
    """How an interrupted run is resumed, or another one could be."""
    saving = summary["config"]["checkpoint"]
    if saving["every_samples"] is None and saving["every_minutes"] is None:
        return (
            "no weights were saved; a run with checkpoint.every_samples=1e6 (or every_minutes) and "
            "resume=auto is resumed by its own command"
        )
    return f"the same command with hydra.run.dir={folder} resume=auto resumes from here"


def job(composed: DictConfig, display: bool = False) -> SummaryRecord:
    """One run of a composed configuration; returns its summary. Sweeps call it in workers."""
    team = find_team()
    die_with_parent()
    try:
        spec = resolve_run(composed, team.ranks)
    except RunEnded as ended:
        if display or team.ranks.size > 1:
            raise
        return cast(SummaryRecord, ended.summary)  # a sweep that is resumed passes it by
    except OSError as error:  # a folder where a file belongs, a disk that does not answer
        raise ConfigError(
            f"{error.filename} cannot be used: {error.strerror}: mend it, or choose another "
            "hydra.run.dir (of a sweep: hydra.sweep.dir)"
        ) from error
    with ExitStack() as stack:
        if spec.resumption is not None:
            stack.callback(spec.resumption.release)
        if spec.config.engine.nproc > 1:
            team = stack.enter_context(started_team(spec.config.engine.nproc))
        summary = train(team, spec, display)
    if not display and spec.config.study is None:  # a study has a display of its own
        print(line_of(summary), flush=True)
    if "error" in summary and display:  # a search that found nothing; other errors are raised
        say(summary["error"])
    return summary


def follow(team: Team) -> int:
    """A rank other than the first: do as it says, and leave it the word.

    How the run has ended is rank 0's to say, with its exit code, when its record is written:
    launchers end all ranks, rank 0 too, as soon as one leaves with another code than 0.
    """
    die_with_parent()
    train(team, None)
    return 0


def train(team: Team, spec: RunSpec | None, display: bool = False) -> SummaryRecord:
    """Train as rank 0 orders; returns the summary."""
    load("largebatch.train.run")  # while rank 0 still composes
    from largebatch.optim.base import without_dynamo

    spec = told(team, spec)
    with nullcontext() if spec.config.engine.compile else without_dynamo():
        return train_as_told(team, spec, display)


def told(team: Team, spec: RunSpec | None) -> RunSpec:
    """Rank 0's order, on every rank."""
    words = team.tell(None if spec is None else spec.words)
    return spec or received_spec(words)


def train_as_told(team: Team, spec: RunSpec, display: bool = False) -> SummaryRecord:
    """Train by an order that every rank has; returns the summary."""
    from largebatch.distributed.rank_dump import answering
    from largebatch.distributed.ranks import pick_device, process_group, set_threads
    from largebatch.train.reporting.display import Display
    from largebatch.train.run import run

    ranks = team.ranks
    if spec.current is not None:
        os.chdir(spec.current)
    set_threads(ranks)
    with refusing():
        device = pick_device(spec.config.engine.device, ranks, spec.config.engine.ipex)
    always = spec.config.engine.needs_group
    group = process_group(team.store, ranks, device, always=always)
    with answering(spec.folder, ranks.rank, ranks.size), group, team.telling():
        if not display:
            return run(spec, team, device)
        with Display(spec) as shown:
            return run(spec, team, device, shown)


def exit_code(summary: SummaryRecord) -> int:
    """The exit code of a run that ended as `summary` says."""
    if summary["status"] == "exhausted" and aimed_at(summary) is not None:
        return ExitCode.MISSED
    if summary["status"] == "interrupted" and "signal" in summary:
        return 128 + int(summary["signal"])
    return STATUS_CODES[summary["status"]]
