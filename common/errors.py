"""Errors of a configuration that cannot be run, worded for users. Imports no torch."""

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, Final

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, ValidationError

from largebatch.common.mappings import flattened


class ConfigError(ValueError):
    """The user's configuration cannot be run; the message is one sentence for them."""


@contextmanager
def refusing() -> Iterator[None]:
    """Turn a ValueError within it, which says what is wrong with the user's values, into a
    ConfigError.
    """
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


class RanksEnded(RuntimeError):
    """A fault has ended all ranks of the run. The rank at fault has reported it.

    Args:
        message: in one sentence, with the rank where it is not rank 0.
        code: every rank's exit code.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message, code)
        self.code = code

    def __str__(self) -> str:
        return str(self.args[0])


class RanksRefused(RanksEnded, ConfigError):
    """The fault is the user's configuration."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message, code)


class RunFailed(Exception):
    """One run of a sweep has no result.

    Args:
        folder: of the run, as shown to the user.
        refused: it was not begun, as its configuration cannot be run.
    """

    def __init__(self, folder: str, why: str, refused: bool = False) -> None:
        super().__init__(folder, why, refused)
        self.folder, self.why, self.refused = folder, why, refused

    def __str__(self) -> str:
        return f"{self.folder} {'refused' if self.refused else 'failed'}: {self.why}"


class SweepFailed(Exception):
    """Some runs of a sweep have no result. All have been tried, and each failure was reported.

    Attributes:
        refused: one of them was not begun, as its configuration cannot be run.
    """

    def __init__(self, failures: Sequence[BaseException], num_runs: int) -> None:
        num_refused = sum(getattr(error, "refused", False) for error in failures)
        counts = {"failed": len(failures) - num_refused, "refused": num_refused}
        parts = [f"{count} {ended}" for ended, count in counts.items() if count]
        super().__init__(f"of {num_runs} run(s) {' and '.join(parts)}")
        self.refused = num_refused > 0


_PLAIN: Final = r"[\w./-]"
"""Letters of a value that neither Hydra nor a shell takes for anything else."""


def format_config_error(error: BaseException) -> str:
    """An error of Hydra's or OmegaConf's in one line, with the key it is about."""
    # Hydra wraps what a target raised; the innermost says what is wrong.
    while error.__cause__ is not None and not hasattr(error, "override"):
        error = error.__cause__
    if isinstance(error, ConfigError):
        return str(error)
    for explain in (
        _no_such_choice, _no_such_key, _unreadable, _several_values, _not_deleted, _other_kind,
    ):  # fmt: skip
        if (known := explain(error)) is not None:
            return known
    key = getattr(error, "full_key", None)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # OmegaConf appends where it was, a line each: the key is enough.
    kept = [
        line for line in lines if not re.match(r"(full_key|object_type|reference_type):?", line)
    ]
    text = " ".join(kept) or type(error).__name__
    whole = re.fullmatch(r"Merge error: \w+ is not a subclass of (\w+)Config\. value: (.*)", text)
    if whole is not None:
        name, above = whole[1].lower(), getattr(error, "parent_node", None) or {}
        keys = ", ".join(f"{name}.{below}" for below in above.get(name) or ())
        return f"{name} takes no value itself, got {whole[2]}: give {keys or 'one of its keys'}"
    lacking = re.search(r"Interpolation key '([^']+)' not found", text)
    if lacking is not None and key:
        group = key.partition(".")[0]
        return (
            f"{key} is taken from {lacking[1]}, which is not there: give {key} a value, or choose "
            f"another {group}, such as {group}=custom for your own"
        )
    return f"{key}: {text}" if key and key not in text else text


def _no_such_choice(error: BaseException) -> str | None:
    """Of Hydra's `MissingConfigException`, which would list where it looked."""
    group, _, choice = (getattr(error, "missing_cfg_file", None) or "").rpartition("/")
    options = getattr(error, "options", None)
    if choice and not group:
        return f"--config-name must be a file of yours with --config-dir, got {choice!r}"
    if not group or not options:
        return None
    choices = ", ".join(name for name in options if not name.startswith("_"))
    return f"{group} must be one of {choices}, or a file of yours with --config-dir, got {choice!r}"


_COUNTED_OTHERWISE: Final = {
    "budget.epochs": "give budget.samples, epochs times the task's num_train (`largebatch plan` "
    "prints the steps)",
    "target.accuracy": "a metric of the task is aimed at by target.metric=accuracy "
    "target.value=0.97, say",
    "evaluation.every": "evaluations lie on a grid that grows: give evaluation.growth, 1 evaluates "
    "after every step",
}
"""Keys that other tools have."""
_FEW_PLACES: Final = 3


def _no_such_key(error: BaseException) -> str | None:
    """Of a key that the configuration, or a group of it, does not have: with the nearest it has."""
    if not isinstance(error, (ConfigAttributeError, ConfigKeyError)) or error.full_key is None:
        return None
    if error.full_key in _COUNTED_OTHERWISE:
        return f"there is no key {error.full_key}: {_COUNTED_OTHERWISE[error.full_key]}"
    above, _, key = error.full_key.rpartition(".")
    siblings = [str(name) for name in error.parent_node or () if str(name)[:1] != "_"]
    near = get_close_matches(key, siblings, n=1)
    elsewhere = _elsewhere(error.full_key, error.parent_node)
    if elsewhere:
        hint = f"did you mean {' or '.join(elsewhere)}?"
    elif near:
        hint = f"did you mean {f'{above}.{near[0]}' if above else near[0]}?"
    elif above:
        hint = f"{above} has {', '.join(siblings) or 'none'}"
    else:
        hint = "--help lists keys, and groups, whose keys are there once GROUP=CHOICE is given"
    return f"there is no key {error.full_key}: {hint}"


def _elsewhere(full_key: str, node: Any) -> list[str]:
    """Where a key is that was given without its section, or in one: `nproc`, `target_loss` and
    `engine.precision` for `engine.nproc`, `target.loss` and `precision`.
    """
    whole: Any = {} if node is None else OmegaConf.to_container(node._get_root(), resolve=False)
    paths = [path for path in flattened(whole) if not path.startswith("hydra.")]
    above, _, key = full_key.rpartition(".")
    if above:
        return [path for path in paths if path == key]
    found = [p for p in paths if key in (p.rpartition(".")[2], p.replace(".", "_"))]
    return found if len(found) <= _FEW_PLACES else []


def _unreadable(error: BaseException) -> str | None:
    """Explain a word that Hydra's grammar has no place for, with the line to type."""
    word = getattr(error, "override", None)
    if not isinstance(word, str):
        return None
    key, equals, value = word.partition("=")
    if not equals:
        return f"{word!r} is not KEY=VALUE, without spaces and dashes, as in optim.lr=0.01"
    start = f"{word!r} cannot be read"
    if re.search(r"^\s*,|,\s*(,|$)", value):
        least = ",".join(part.strip() for part in value.split(",") if part.strip())
        return f"{start}: a value is missing beside a comma; type {key}={least}"
    for opened, closed in ("[]", "{}", "()"):
        begins = re.match(r"\w+\(" if opened == "(" else re.escape(opened), value)
        if begins and value.count(opened) != value.count(closed):
            return f"{start}: {value} has a bracket without its other half"
    if value[:1] == "~":
        line = _shell_word(f"{key}={hydra_word(os.path.expanduser(value))}")
        return f"{start}, as the shell leaves this ~ alone: type {line}"
    mark = next((letter for letter in value if not re.match(_PLAIN, letter, re.ASCII)), "")
    line = _shell_word(f"{key}={hydra_word(value)}")
    return f"{start}: a value with {mark!r} in it goes into quotes, for Hydra and the shell: {line}"


def _shell_word(word: str) -> str:
    """Return `word` as a shell takes it, in the quotes that are easier to read."""
    quoted = shlex.quote(word)
    return (
        f'"{word}"' if quoted != word and "'" in word and not set('"$`\\!') & set(word) else quoted
    )


def hydra_word(value: str) -> str:
    """Return `value` as Hydra's grammar reads it back, in quotes where it needs them."""
    if re.fullmatch(f"(?:{_PLAIN})+", value, re.ASCII):
        return value
    # A backslash is itself in there unless a quote follows it.
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value) + "'"


def _several_values(error: BaseException) -> str | None:
    """Explain Hydra's answer to A=1,2 where one run is asked for."""
    found = re.match(r"Ambiguous value for argument '([^=]+)=(.*)'\n", str(error))
    if found is None:
        return None
    key, values = found.groups()
    return (
        f"{key}={values} are values of a sweep, not of one run, nor of --cfg: use largebatch "
        f"sweep, or {key}=[{values}] where a list is meant"
    )


def _not_deleted(error: BaseException) -> str | None:
    """Explain ~KEY where Hydra sees no key, as its value is null."""
    found = re.match(r"Could not delete from config\. '(.+)' does not exist", str(error))
    return (
        None
        if found is None
        else (
            f"~{found[1]} takes nothing away: {found[1]} is null, or no key of this configuration"
        )
    )


def _other_kind(error: BaseException) -> str | None:
    """Explain one value in the place of a list or of a group, and a list in that of one value."""
    if not isinstance(error, ValidationError) or not error.full_key:
        return None
    key, value, meant = error.full_key, error.value, error.child_node
    if isinstance(meant, ListConfig) and not isinstance(value, list | tuple | ListConfig):
        parts = ",".join(filter(None, re.split(r"[;:,\s]+", str(value))))
        return f"{key} must be a list, such as {key}=[{parts}], got {value!r}"
    if isinstance(meant, DictConfig) and not isinstance(value, dict | DictConfig):
        return f"{key} holds keys of its own, {key}.NAME=…, and is no value itself, got {value!r}"
    if isinstance(value, list | ListConfig) and not isinstance(meant, ListConfig | DictConfig):
        return f"{key} must be one value, got the list {value}"
    return None
