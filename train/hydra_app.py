"""Hydra as this command line uses it: options anywhere among the overrides, mistakes in one
sentence, the user's own files before the package's.
"""

import os
import re
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import wraps
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import hydra
from hydra._internal.hydra import Hydra
from hydra._internal.utils import (
    detect_calling_file_or_module_from_task_function,
    detect_task_name,
    get_args_parser,
)
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import env_override
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

import largebatch.conf.resolvers  # noqa: F401 — registers them
from largebatch.common.errors import ConfigError, format_config_error
from largebatch.common.user_code import errors_left_alone
from largebatch.conf.help_page import help_page
from largebatch.conf.user_configs import first, tell_replaced, unreadable_file
from largebatch.records.record import unwritable

_WITH_VALUE: Final = ("cfg", "package", "info", "config_path", "config_name", "experimental_rerun")
_OWN_CLASS: Final = re.compile(r"(task|model)=([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)")
_CONFIGS: Final = "pkg://largebatch.conf"
_ONE, _MANY = "hydra.mode=RUN", "hydra.mode=MULTIRUN"
_SETS_MODE: Final = re.compile(r"[+~]*hydra(\.mode|\.searchpath)?=")
_FLAGS: Final = ("hydra_help", "resolve", "run", "multirun", "shell_completion")


def import_from_here() -> None:
    """Let a user's own task and model be imported from where the command is given."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def run_hydra(task: Callable[[DictConfig], Any], command: str, arguments: Sequence[str]) -> None:
    """Let Hydra compose the configuration and call `task` on it."""
    import_from_here()
    options = parse_options(arguments)
    if options.help:
        print(help_page(command, options.overrides, options.config_dir))
        return
    # Else Hydra takes a sweep with a mistake in it for one run, and words it as one.
    shows = options.cfg or options.info or options.shell_completion
    options.multirun = options.multirun or (command == "sweep" and not shows)
    options.overrides = own_classes(options.overrides)
    sys.argv = [f"largebatch {command}", *_canonical(options), *options.overrides]
    begun = False

    @wraps(task)
    def begin(composed: DictConfig) -> Any:
        nonlocal begun
        begun = True
        return task(composed)

    many = is_many(options)
    entry = hydra.main(version_base="1.3", config_path=_CONFIGS, config_name="train")
    try:
        with first(options.config_dir), env_override(errors_left_alone()):
            tell_replaced(options.config_dir)
            if many is None:
                entry(begin)()
            else:
                compose_once(begin, options.overrides, many)
    # Before OSError: of a file of the configuration that is not there, Hydra's error is both.
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(format_config_error(error)) from error
    except OSError as error:
        if begun:
            raise
        raise ConfigError(unwritable(error)) from error
    except (YAMLError, UnicodeDecodeError) as error:
        if begun:
            raise
        raise ConfigError(unreadable_file(error, options.config_dir)) from error
    except (TypeError, ValueError) as error:
        # Hydra's own, before the task: batch=512, where batch.size=512 was meant, or batch=[1].
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if begun or not raised_in.endswith("hydra/_internal/defaults_list.py"):
            raise
        raise ConfigError(
            f"{_numbered_group(arguments)}: a group takes the name of a choice; a number goes to "
            "one of its keys, as in batch.size=512 or optim.lr=0.01"
        ) from error


def is_many(options: Namespace) -> bool | None:
    """Whether the command line is of many runs; None where only Hydra can tell: a file of the
    user's may set `hydra.mode`, and some options run nothing.
    """
    given = {name for name, value in vars(options).items() if value}
    words = {word for word in options.overrides if _SETS_MODE.match(word)}
    if given - {"overrides", "run", "multirun"} or words - {_ONE, _MANY} or len(words) > 1:
        return None
    if options.multirun and words == {_ONE}:
        return None  # Hydra warns of it
    return options.multirun or words == {_MANY}


def compose_once(task: Callable[[DictConfig], Any], overrides: list[str], many: bool) -> None:
    """Do as `hydra.main` where it is known whether there are many runs: it composes the whole
    configuration once more, to see whether a file says so.
    """
    word = _MANY if many else _ONE
    words = overrides if word in overrides else [*overrides, word]
    caller = detect_calling_file_or_module_from_task_function(task)
    name = detect_task_name(*caller)
    app = Hydra.create_main_hydra_file_or_module(*caller, _CONFIGS, name)
    try:
        (app.multirun if many else app.run)("train", task, words)
    finally:
        GlobalHydra.instance().clear()


def parse_options(arguments: Sequence[str]) -> Namespace:
    """Parse Hydra's options, wherever among the `overrides` they stand."""
    parser = get_args_parser()

    def refuse(message: str) -> None:
        wrong = re.findall(r"--?[\w-]+(?![\w=-])", message)
        near = get_close_matches(wrong[0], parser._option_string_actions, n=1) if wrong else []
        hint = f"did you mean {near[0]}?" if near else "keys are given as KEY=VALUE, without dashes"
        raise ConfigError(f"{message}: {hint}")

    parser.error = refuse  # type: ignore[method-assign, assignment] # its own prints and exits
    return parser.parse_intermixed_args(arguments)


def own_classes(words: Sequence[str]) -> list[str]:
    """Let a class's dotted name be a task or a model by itself, and its arguments plain keys.

    >>> own_classes(["task=my_project.MyTask", "task.size=8", "seed=1"])
    ['task=custom', 'task._target_=my_project.MyTask', '++task.size=8', 'seed=1']
    """
    named = {found[1] for word in words if (found := _OWN_CLASS.fullmatch(word))}
    spelled: list[str] = []
    for word in words:
        if found := _OWN_CLASS.fullmatch(word):
            spelled += [f"{found[1]}=custom", f"{found[1]}._target_={found[2]}"]
        elif word.partition(".")[0] in named and "=" in word:
            spelled.append(f"++{word}")
        else:
            spelled.append(word)
    return spelled


def _canonical(options: Namespace) -> list[str]:
    words = [f"--{name.replace('_', '-')}" for name in _FLAGS if getattr(options, name)]
    for name in _WITH_VALUE:
        if getattr(options, name) is not None:
            words.append(f"--{name.replace('_', '-')}={getattr(options, name)}")
    return words


def _numbered_group(arguments: Sequence[str]) -> str:
    groups = files("largebatch.conf")
    pairs = [word.partition("=") for word in arguments]
    found = [
        f"{name}={value}"
        for name, _, value in pairs
        if groups.joinpath(name.lstrip("+")).is_dir()
        and (not value[:1].isalpha() or value.lower() in ("true", "false"))
    ]
    return " ".join(found) or "GROUP=NUMBER"


again: list[str] = []
"""Of the sweep under way, if any: what to add to its command, so that it resumes in its folder."""


class Folders(Callback):
    """Removes the folders that Hydra made for a run which was refused; never one that was there."""

    def on_run_start(self, config: DictConfig, **more: Any) -> None:
        folder = Path(str(OmegaConf.select(config, "hydra.run.dir"))).absolute()
        self._new = [path for path in (folder, *folder.parents) if not path.exists()]

    def on_run_end(self, config: DictConfig, **more: Any) -> None:
        for path in self._new:
            try:
                path.rmdir()
            except OSError:  # in use
                return

    def on_multirun_start(self, config: DictConfig, **more: Any) -> None:
        as_given = str(config.hydra.sweep._get_node("dir")._value())
        again.append(f" with hydra.sweep.dir={config.hydra.sweep.dir}" if "${" in as_given else "")
