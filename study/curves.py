"""From runs to curves: which runs belong together, and what a curve is called.

A curve is one optimizer in one configuration: its runs differ in batch size, seed, and the keys
that were searched, and in nothing else. Runs that differ in anything more are curves of their own,
named by what differs. Runs of several tasks, targets or data are sections, each read by itself.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from largebatch.common.mappings import flattened
from largebatch.records.target import Target
from largebatch.study.decisions import Decisions
from largebatch.study.reading import RunSummary

_NO_PART_IN_A_CURVE: Final = (
    "seed", "objective", "study", "mode", "resume", "branch_from", "stop_at",
    "stop_before_walltime", "logger",
    "record", "checkpoint", "throughput", "batch.size", "optim.lr", "scaling",
    "target.give_up_samples",
)  # fmt: skip
"""Keys of a configuration that no curve is told apart by: roles of their own, and what changes no
update."""

_TUNED: Final = {
    "momentum": ("optim.momentum", "optim.betas.0"),
    "beta2": ("optim.betas.1",),
    "damping": ("optim.damping",),
    "weight_decay": ("optim.weight_decay",),
}


@dataclass(frozen=True)
class StudyCurve:
    """The runs of one optimizer in one configuration.

    Attributes:
        name: the optimizer, and what tells its curves apart where it has several.
        tuned: keys beside the rate that were searched.
    """

    name: str
    optimizer: str
    tuned: tuple[str, ...]
    runs: list[RunSummary]


@dataclass(frozen=True)
class Section:
    """The curves of one task, target and data set."""

    task: str
    target: Target
    data_hash: str | None
    curves: list[StudyCurve]

    @property
    def runs(self) -> list[RunSummary]:
        """Of all curves."""
        return [run for curve in self.curves for run in curve.runs]

    @property
    def title(self) -> str:
        """What was measured."""
        evaluation = "evaluation " if self.target.metric == "loss" else ""
        return f"{self.task}: steps to {evaluation}{self.target}"


def sections_of(
    runs: Sequence[RunSummary], decisions: Decisions, problems: list[str]
) -> list[Section]:
    """The sections that the conclusive runs make up, in order of task; others are noted."""
    groups: dict[tuple[str, Target, str | None], list[RunSummary]] = defaultdict(list)
    aimless = [run for run in runs if run.target is None]
    if aimless:
        problems.append(f"{len(aimless)} run(s) have no target and were left out")
    for run in runs:
        if run.target is not None:
            groups[run.task, run.target, run.data_hash].append(run)
    silent = sum(not run.config for run in runs)
    if silent:
        problems.append(
            f"{silent} run(s) do not record their configuration: where they differ in more than "
            "optimizer, batch size, learning rate and seed, it is not seen"
        )
    order = sorted(groups, key=lambda key: (key[0], key[1], key[2] or ""))
    return [Section(*key, curves_of(groups[key], decisions)) for key in order]


def curves_of(runs: Sequence[RunSummary], decisions: Decisions) -> list[StudyCurve]:
    """The curves of runs of one task, in order of name."""
    by_optimizer: dict[str, list[RunSummary]] = defaultdict(list)
    for run in runs:
        by_optimizer[run.optimizer].append(run)
    curves = []
    for optimizer, own in by_optimizer.items():
        tuned = decisions.tuned.get(optimizer, ())
        kinds: dict[str, tuple[dict[str, Any], list[RunSummary]]] = {}
        for run in own:
            identity = _identity(run, tuned)
            kinds.setdefault(json.dumps(identity, sort_keys=True), (identity, []))[1].append(run)
        told = differences([identity for identity, _ in kinds.values()])
        for words, (_, members) in zip(told, kinds.values(), strict=True):
            name = " ".join([optimizer, *(f"{_short(path)}={words[path]}" for path in words)])
            curves.append(StudyCurve(name, optimizer, tuned, members))
    return sorted(curves, key=lambda curve: curve.name)


def tuned_value(run: RunSummary, name: str) -> float | None:
    """The value of a tuned key in a run's configuration."""
    optim = run.config.get("optim")
    flat = leaves(optim, "optim.") if isinstance(optim, Mapping) else {}
    for path in _TUNED[name]:
        if isinstance(flat.get(path), int | float):
            return float(flat[path])
    return None


def leaves(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return the leaves of a configuration by their full names; betas by place.

    >>> leaves({"optim": {"lr": 0.1, "betas": [0.9, 0.99]}, "clip_norm": None})
    {'optim.lr': 0.1, 'optim.betas.0': 0.9, 'optim.betas.1': 0.99, 'clip_norm': None}
    """
    found: dict[str, Any] = {}
    for path, value in flattened(config, above).items():
        if isinstance(value, list) and path.rpartition(".")[2] == "betas":
            found |= {f"{path}.{place}": entry for place, entry in enumerate(value)}
        else:
            found[path] = value
    return found


def _identity(run: RunSummary, tuned: Sequence[str]) -> dict[str, Any]:
    """What tells the curve of a run from others of its optimizer."""
    searched = {path for name in tuned for path in _TUNED[name]}
    return {
        path: value
        for path, value in sorted(leaves(run.config).items())
        if path not in searched and not _has_no_part(path)
    }


@cache  # a study has thousands of runs and a hundred keys
def _has_no_part(path: str) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in _NO_PART_IN_A_CURVE)


def differences(identities: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Of each mapping the entries in which not all are alike, as text, in the order of their keys.

    An entry is left out where one before it tells the same mappings apart.

    >>> differences([{"a": 1, "b": 0.5, "c": 0}, {"a": 2, "b": 0.1, "c": 0}])
    [{'a': '1'}, {'a': '2'}]
    """
    paths = dict.fromkeys(path for identity in identities for path in identity)
    differing = [
        path
        for path in paths
        if len({json.dumps(identity.get(path), sort_keys=True) for identity in identities}) > 1
    ]
    shown = [path for path in differing if not _follows(path, differing, identities)]
    return [{path: _text(one.get(path)) for path in shown} for one in identities]


def _follows(path: str, paths: Sequence[str], identities: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an earlier path already tells the curves apart as this one does."""
    for other in paths[: paths.index(path)]:
        pairs = Counter(
            (json.dumps(one.get(other)), json.dumps(one.get(path))) for one in identities
        )
        if len(pairs) == len({first for first, _ in pairs}):
            return True
    return False


def _short(path: str) -> str:
    return path.removeprefix("optim.")


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "null" if value is None else str(value)
