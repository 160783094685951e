"""`largebatch train`: one run, on one rank or many. Imports torch only once the configuration
holds.

Rank 0 composes the configuration, owns the folder and decides; the others take from it the resolved
configuration and the folder. (Left alone, every rank's `hydra.main` would make its own.)
"""

import os
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from largebatch.conf.errors import ConfigError, sentence
from largebatch.train.order import Order, prepare
from largebatch.train.ranks import Ranks, die_with_parent, find_ranks, started_ranks
from largebatch.train.record import RunEnded
from largebatch.train.user_code import keep_request, of_user

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
    _outcome.clear()
    try:
        ranks = find_ranks()
        if not ranks.is_first:
            return follow(ranks)
        run_hydra(single_run, "train", arguments)
        for outcome in _outcome:
            if isinstance(outcome, ConfigError):
                raise outcome
            return exit_code(outcome)
    except ConfigError as error:
        print(f"largebatch: {error}", file=sys.stderr)
        return REFUSED
    except Exception as error:
        return failed(error)
    return 0  # --help, --cfg and their like


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


def run_hydra(task: Callable[[DictConfig], Any], command: str, arguments: list[str]) -> None:
    """Let Hydra compose the configuration and call `task` on it.

    Raises:
        ConfigError: in place of what Hydra would print over many lines.
    """
    # A user's own task and model are imported from where the command is given.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    keep_request()
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [f"largebatch {command}", *arguments]
    entry = hydra.main(version_base="1.3", config_path="pkg://largebatch.conf", config_name="train")
    try:
        entry(task)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(sentence(error)) from error
    except ValueError as error:
        # Hydra's own, before the task: batch=512, where batch.size=512 was meant.
        if not str(error).startswith("Config group override must be"):
            raise
        raise ConfigError(
            f"{_numbered_group(arguments)}: a group takes the name of a choice; a number goes to "
            "one of its keys, as in batch.size=512 or optim.lr=0.01"
        ) from error


def _numbered_group(arguments: list[str]) -> str:
    groups = files("largebatch.conf")
    pairs = [word.partition("=") for word in arguments]
    found = [
        f"{name}={value}"
        for name, _, value in pairs
        if groups.joinpath(name.lstrip("+")).is_dir() and not value[:1].isalpha()
    ]
    return " ".join(found) or "GROUP=NUMBER"


def single_run(composed: DictConfig) -> None:
    """Hydra's task of `largebatch train`: note the summary, or why the run was refused."""
    from largebatch.train.display import outcome
    from largebatch.train.lr_results import told

    try:
        summary = job(composed, display=True)
    except ConfigError as error:
        _outcome.append(error)
    else:
        _outcome.append(summary)
        folder = Path(os.path.relpath(HydraConfig.get().runtime.output_dir))
        print(outcome(summary, folder))
        if "lr_find" in summary:
            print(told(summary, folder))


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

        print(outcome(summary, Path(os.path.relpath(order.folder))), flush=True)
    if "error" in summary:  # a sweep that found nothing; other errors are raised
        of_many = "" if display else f"{os.path.relpath(order.folder)}: "
        print(f"largebatch: {of_many}{summary['error']}", file=sys.stderr)
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
