"""What a user is told of a configuration that cannot be run. Imports no torch."""

import re
from difflib import get_close_matches

from omegaconf.errors import ConfigAttributeError, ConfigKeyError


class ConfigError(ValueError):
    """The user's configuration cannot be run; the message is one sentence for them."""


def sentence(error: BaseException) -> str:
    """An error of Hydra's or OmegaConf's in one line, with the key it is about."""
    # Hydra wraps what a target raised; the innermost says what is wrong.
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, ConfigError):
        return str(error)
    if (known := _no_such_choice(error) or _no_such_key(error)) is not None:
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
    return f"{key}: {text}" if key and key not in text else text


def _no_such_choice(error: BaseException) -> str | None:
    """Of Hydra's `MissingConfigException`, which would list where it looked."""
    group, _, choice = (getattr(error, "missing_cfg_file", None) or "").rpartition("/")
    options = getattr(error, "options", None)
    if not group or not options:
        return None
    return (
        f"{group} must be one of {', '.join(options)}, or a file of yours with --config-dir, "
        f"got {choice!r}"
    )


def _no_such_key(error: BaseException) -> str | None:
    """Of a key that the configuration, or a group of it, does not have: with the nearest it has."""
    if not isinstance(error, (ConfigAttributeError, ConfigKeyError)) or error.full_key is None:
        return None
    above, _, key = error.full_key.rpartition(".")
    siblings = [str(name) for name in error.parent_node or ()]
    near = get_close_matches(key, siblings, n=1)
    if near:
        hint = f"did you mean {f'{above}.{near[0]}' if above else near[0]}?"
    elif above:
        hint = f"{above} has {', '.join(siblings) or 'none'}"
    else:
        hint = "--help lists keys, and groups, whose keys are there once GROUP=CHOICE is given"
    return f"there is no key {error.full_key}: {hint}"
