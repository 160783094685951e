"""`largebatch train`: one run, on one rank or many. Imports torch only once the configuration
holds.

Rank 0 composes the configuration, owns the folder and decides; the others take from it the resolved
configuration and the folder. (Left alone, every rank's `hydra.main` would make its own.)
"""

import os
import sys
from pathlib import Path
from typing import Any, Final

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from largebatch.conf.errors import ConfigError, RunFailed, SweepFailed
from largebatch.records.summary import objective
from largebatch.train.folders import again
from largebatch.train.hydra_app import import_from_here, run_hydra
from largebatch.train.order import Order, prepare
from largebatch.train.ranks import Ranks, die_with_parent, find_ranks, started_ranks
from largebatch.train.record import RunEnded
from largebatch.train.sweeps import failure_of, shown_folder, told
from largebatch.train.user_code import of_user

FAILED: Final = 1
REFUSED: Final = 2
MISSED: Final = 3
INTERRUPTED: Final = 130
EXIT_CODES: Final = {
    "reached": 0,
    "exhausted": 0,
    "failed": 1,
    "diverged": 4,
    "interrupted": INTERRUPTED,
}

_outcome: list[dict[str, Any] | ConfigError] = []
"""What the run came to: Hydra's main returns nothing, and prints around what a task raises."""


def main(arguments: list[str]) -> int:
    """Run `largebatch train ARGUMENTS`; returns the exit code."""
    try:
        import_from_here()
        ranks = find_ranks()
        if not ranks.is_first:
            return follow(ranks)
    except ConfigError as error:
        print(f"largebatch: {error}", file=sys.stderr)
        return REFUSED
    return run_command("train", arguments)


def run_command(command: str, arguments: list[str]) -> int:
    """Run the runs that `arguments` ask for; returns the exit code."""
    _outcome.clear()
    again.clear()
    try:
        run_hydra(task, command, arguments)
        for outcome in _outcome:
            if isinstance(outcome, ConfigError):
                raise outcome
            return exit_code(outcome)
    except ConfigError as error:
        print(f"largebatch: {error}", file=sys.stderr)
        return REFUSED
    except (RunFailed, SweepFailed) as error:  # of which each run has been told by itself
        more = "" if error.refused else f"; the same command{again[0]} makes those again"
        print(f"largebatch: {error}{more}", file=sys.stderr)
        return REFUSED if error.refused else FAILED
    except KeyboardInterrupt:
        if not again:  # no sweep
            raise
        print(
            f"largebatch: interrupted; the same command{again[0]} goes on from here",
            file=sys.stderr,
        )
        return INTERRUPTED
    except Exception as error:
        return failed(error)
    return 0  # --help, --cfg and their like; a sweep all of whose runs have ended


def failed(error: Exception) -> int:
    """Show an error within the user's own code by their frames alone; returns the exit code.

    Raises:
        Exception: `error`, where it is another one, or the whole trace is asked for.
    """
    told = of_user(error)
    if told is None:
        raise error
    print(told, file=sys.stderr)
    return EXIT_CODES["failed"]


def task(composed: DictConfig) -> float | None:
    """Hydra's task: a run by itself, or one of a sweep, which returns what a sweeper makes small.

    A trial that a sweep's launcher has started is by itself: its summary and its exit code are what
    the launcher reads.
    """
    settings = HydraConfig.get()
    trial = settings.runtime.choices.get("hydra/sweeper") == "largebatch_trial"
    if settings.mode == RunMode.RUN or trial:
        single_run(composed)
        return None
    try:
        summary = job(composed)
    except Exception as error:
        raise told(failure_of(error)) from None
    if summary["status"] == "failed":  # a search of mode=lr_find that found nothing
        raise told(RunFailed(shown_folder(), summary["error"]))
    if summary["status"] == "interrupted":
        raise KeyboardInterrupt
    return objective(summary)


def single_run(composed: DictConfig) -> None:
    """Note the summary, or why the run was refused."""
    from largebatch.train import lr_results
    from largebatch.train.display import outcome

    try:
        summary = job(composed, display=True)
    except ConfigError as error:
        _outcome.append(error)
    else:
        _outcome.append(summary)
        folder = Path(shown_folder())
        print(outcome(summary, folder))
        if "lr_find" in summary:
            print(lr_results.told(summary, folder))


def job(composed: DictConfig, display: bool = False) -> dict[str, Any]:
    """One run of a composed configuration; returns its summary. Sweeps call it in worker processes.

    Raises:
        ConfigError: before anything is written.
    """
    die_with_parent()
    ranks = find_ranks()
    try:
        order = prepare(composed, ranks)
    except ConfigError as error:
        if ranks.size > 1:
            train(ranks, None)
        elif isinstance(error, RunEnded) and not display:
            return error.summary  # a sweep that goes on with resume=auto passes it by
        raise
    try:
        if order.config.engine.nproc == 1:
            summary = train(ranks, order, display)
        else:
            with started_ranks(order.config.engine.nproc) as ranks:
                summary = train(ranks, order, display)
    finally:
        if order.resumption is not None:
            order.resumption.release()
    assert summary is not None
    if not display and order.config.study is None:  # a study has a display of its own
        from largebatch.train.display import outcome

        print(outcome(summary, Path(shown_folder())), flush=True)
    if "error" in summary and display:  # a search that found nothing; other errors are raised
        print(f"largebatch: {summary['error']}", file=sys.stderr)
    return summary


def follow(ranks: Ranks) -> int:
    """A rank other than the first: do as it says, and leave it the word.

    How the run has ended is rank 0's to say, with its exit code, when its record is written:
    launchers end all ranks, rank 0 too, as soon as one leaves with another code than 0.
    """
    die_with_parent()
    try:
        summary = train(ranks, None)
    except ConfigError:
        return REFUSED
    except Exception as error:
        return failed(error)
    return REFUSED if summary is None else 0


def train(ranks: Ranks, order: Order | None, display: bool = False) -> dict[str, Any] | None:
    """Train as rank 0 orders; returns the summary, or None where it ordered nothing."""
    from largebatch.train.display import Display
    from largebatch.train.ranks import meet, pick_device, process_group, set_threads, tell
    from largebatch.train.run import run
    from largebatch.train.stacks import answering

    store = meet(ranks)
    order = tell(store, ranks, order)
    if order is None:
        return None
    if order.current is not None:
        os.chdir(order.current)
    set_threads(ranks)
    try:
        device = pick_device(order.config.engine.device, ranks, order.config.engine.ipex)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    group = process_group(store, ranks, device, always=order.config.engine.needs_group)
    with answering(order.folder, ranks.rank, ranks.size), group:
        if not display:
            return run(order, ranks, device)
        with Display(order) as shown:
            return run(order, ranks, device, shown)


def exit_code(summary: dict[str, Any]) -> int:
    """The exit code of a run that ended as `summary` says."""
    if summary["status"] == "exhausted" and summary["target_loss"] is not None:
        return MISSED
    if summary["status"] == "interrupted" and "signal" in summary:
        return 128 + int(summary["signal"])
    return EXIT_CODES[summary["status"]]
