"""What `--help` of train, sweep and plan prints: groups, keys, values and what each means.

The meanings are the comments of the YAML files, which are read as text. Imports no torch.
"""

import re
import textwrap
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Final

import yaml

from largebatch.records.outcomes import exit_code_help

WIDTH: Final = 100
"""Columns."""

_ELSEWHERE: Final = ("cluster", "study")
"""Groups that are not of a run: those of submit, and of sweep."""

_USES: Final = {
    "train": "largebatch train KEY=VALUE …             one run",
    "plan": "largebatch plan KEY=VALUE …              its schedule, printed and drawn",
    "sweep": "largebatch sweep KEY=VALUE,VALUE …       many runs, or a study (study=bytes)",
}
_SWEEPS: Final = """\
hydra.sweep.dir: sweeps/TIME            # of a study: studies/NAME; the same command resumes there
hydra.launcher.n_jobs: -1               # runs at a time; -1: a core each
hydra/launcher: cores                   # parsl: over an allocation; basic: here, one by one
hydra/sweeper: largebatch_runs          # optuna, where hydra-optuna-sweeper is installed"""
_SHARED: Final = "study/_fair.yaml"
_STUDY: Final = "bytes"
"""Whose keys stand for every study's."""


def help_page(command: str, overrides: Sequence[str], config_dir: str | None = None) -> str:
    """Return the page of a command.

    Args:
        overrides: of the command line; the keys shown are those of the choices they name.
        config_dir: the user's own files, before the package's.
    """
    conf = _Files(config_dir)
    named = dict(word.lstrip("+").split("=", 1) for word in overrides if "=" in word)
    chosen = conf.defaults("train.yaml")
    for group in ("study", "task", *named):  # a task brings its model
        if named.get(group) in conf.choices(group):
            chosen[group] = named[group]
        if group in chosen:
            brought = conf.defaults(f"{group}/{chosen[group]}.yaml")
            chosen |= {key: value for key, value in brought.items() if key not in named}
    parts = [_USES[command], ""]
    if command == "sweep":
        study = chosen["study"] if chosen["study"] != "none" else _STUDY
        parts += _part("Studies", [_listed("study", conf.choices("study"), chosen["study"])])
        parts += _part(f"Keys of study={study}", conf.keys(f"study/{study}.yaml"))
        parts += _part("Keys of every study, with their defaults", conf.keys(_SHARED))
        parts += _part("Keys of a sweep", _SWEEPS.splitlines())
    groups = [group for group in conf.groups() if group not in _ELSEWHERE]
    listed = [_listed(group, conf.choices(group), chosen.get(group)) for group in groups]
    parts += _part("Groups: GROUP=CHOICE, and the choice without your word", listed)
    parts += _part("Keys and defaults: KEY=VALUE", conf.keys("train.yaml"))
    for group in groups:
        keys = conf.keys(f"{group}/{chosen[group]}.yaml") if group in chosen else []
        if keys:
            parts += _part(f"{group}={chosen[group]}", keys)
    parts.append(exit_code_help())
    if command == "sweep":
        parts.append(
            "of a sweep: 0 all its runs have ended, whatever their outcome; 1 some failed; 2 some\n"
            "were refused; 130 interrupted, and the same command resumes it"
        )
    parts.append(
        "options: --cfg job (the whole configuration), --config-dir DIR (your own files), "
        "--hydra-help\n"
        'completion: eval "$(largebatch train --shell-completion install=bash)"'
    )
    return "\n".join(parts)


class _Files:
    """The package's configuration files, and the user's before them."""

    def __init__(self, config_dir: str | None) -> None:
        package = Path(str(files("largebatch.conf")))
        self._roots = [package] if config_dir is None else [Path(config_dir), package]

    def groups(self) -> list[str]:
        found = {
            path.name for root in self._roots for path in root.iterdir() if any(path.glob("*.yaml"))
        }
        return sorted(found)

    def choices(self, group: str) -> list[str]:
        return sorted({p.stem for root in self._roots for p in (root / group).glob("[!_]*.yaml")})

    def defaults(self, name: str) -> dict[str, str]:
        """Which choices the file brings, by their groups."""
        listed = (yaml.safe_load(self._text(name)) or {}).get("defaults", [])
        pairs = [pair for entry in listed if isinstance(entry, dict) for pair in entry.items()]
        words = [(key.split()[-1].lstrip("/"), str(value)) for key, value in pairs]
        return {group: value for group, value in words if not group.startswith("hydra")}

    def keys(self, name: str) -> list[str]:
        """The file's keys with their comments, without what is Hydra's."""
        text = self._text(name)
        lines = [line for line in _own(iter(text.splitlines())) if line.strip()]
        if name == "train.yaml" or text.startswith("# @package _global_"):
            return lines
        group = name.partition("/")[0]
        return [line if line[0] in " #" else f"{group}.{line}" for line in lines]

    def _text(self, name: str) -> str:
        for root in self._roots:
            if (root / name).is_file():
                return (root / name).read_text(encoding="utf-8")
        return ""


def _own(lines: Iterator[str]) -> Iterator[str]:
    """Lines of keys: without those under defaults and hydra, and without what makes the object."""
    left_out = False
    for line in lines:
        if line[:1].strip() and not line.startswith("#"):
            left_out = bool(re.match(r"(defaults|hydra):", line))
        if left_out or line.startswith("# @package"):
            continue
        if not re.match(r"\s*_(target|partial|recursive)_:", line):
            yield line


def _listed(group: str, choices: Sequence[str], chosen: str | None) -> str:
    named = f"{group}={chosen}" if chosen else group
    others = ", ".join(choice for choice in choices if choice != chosen)
    return f"{named:<24}# {'or ' if chosen else ''}{others}"


def _part(title: str, lines: Sequence[str]) -> list[str]:
    return [f"== {title} ==", *(piece for line in lines for piece in folded(line)), ""]


def folded(line: str, width: int = WIDTH) -> list[str]:
    """Fold a line's comment below itself.

    >>> folded("lr: 0.1  # a long comment", 20)
    ['lr: 0.1  # a long', '         # comment']
    """
    if len(line) <= width:
        return [line]
    head, mark, comment = line.partition("# ")
    if not mark or len(head) > width // 2:
        return textwrap.wrap(line, width, subsequent_indent="    ", break_long_words=False)
    room = width - len(head) - len(mark)
    first, *rest = textwrap.wrap(comment, room, break_long_words=False, break_on_hyphens=False)
    return [head + mark + first, *(" " * len(head) + mark + more for more in rest)]
