"""Where a run resumes: in its own folder, from its last good checkpoint, with the same overrides.

Imports no torch: a refusal takes no longer than any other.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from omegaconf import OmegaConf

from largebatch.common.errors import ConfigError
from largebatch.common.text import say
from largebatch.conf.config import BudgetConfig
from largebatch.conf.engine_config import engine_target
from largebatch.conf.specs import convert
from largebatch.records.checkpoints import listed
from largebatch.records.configuration import read_yaml
from largebatch.records.fields import RecordError
from largebatch.records.lock import RunLock
from largebatch.records.names import CHECKPOINTS, CONFIG, METRICS
from largebatch.records.record import RunEnded, check_unfinished, claim, kept_lines
from largebatch.schedules import Plan
from largebatch.train.checkpoints.files import UNIVERSAL, problem, read_state

_BUDGET: Final = ("budget.samples", "budget.tokens")

_PLACES: Final = 1024
"""At which the plans of two budgets are compared, evenly spaced."""

# What may differ between a run and its resumption: none of it decides the trajectory.
_FREE: Final = (
    "engine", "logger", "record", "checkpoint", "resume", "throughput", "stop_at",
    "stop_before_walltime",
)  # fmt: skip


@dataclass(frozen=True)
class Resumption:
    """A run that is there, and where it is resumed."""

    checkpoint: Path | None
    """None: it has left none, and begins again."""
    samples: int
    """Samples seen by then."""
    lock: RunLock | None = None
    """This process's hold on the folder, on rank 0; the run's record takes it over."""
    hole: str | None = None
    """What is missing of its record, in words."""

    def release(self) -> None:
        """Let go of the folder: there is to be no run after all."""
        if self.lock is not None:
            self.lock.release()


def find_resumption(
    folder: Path, config: str, world: int | None = None, plan: Plan | None = None
) -> Resumption | None:
    """Where the run in `folder` is resumed; None where there is none. From now on, or until the
    resumption is released, the folder is this process's.

    Args:
        config: the resolved configuration, as YAML.
        world: ranks of the run to come; None: whether a checkpoint fits them is not asked.
        plan: of the run to come; None: it has the budget that it had.
    """
    if not (folder / METRICS).exists() and not listed(folder):
        return None
    if not (folder / CONFIG).exists():
        check_unfinished(folder)
    check_complete(folder)
    lock = claim(folder, world or 1)
    try:
        if not (folder / CONFIG).exists():  # killed before it had begun
            return Resumption(None, 0, lock)
        before = check_same(folder, config)
        _check_ended(folder, plan, may_grow=True)
        verify = OmegaConf.create(config).checkpoint.verify
        checkpoint = last_good(folder, verify)
        if checkpoint is None:
            _check_ended(folder, plan, may_grow=False)
            return Resumption(None, 0, lock)
        state = read_state(checkpoint)
        check_world(checkpoint, state.get("saved_by", {}), world, verify)
        samples = int(state["progress"]["samples"])
        if plan is not None:
            had = int(state.get("budget_samples", before))
            check_past(plan, had, samples, state.get("plan", {}))
            if plan.budget_samples != had:
                _check_round(checkpoint, OmegaConf.create(config).outer, state["progress"]["steps"])
        return Resumption(checkpoint, samples, lock, _hole(folder, state))
    except BaseException:
        lock.release()
        raise


def _check_ended(folder: Path, plan: Plan | None, may_grow: bool) -> None:
    """Refuse a run that has ended, but for one whose budget grows: by `RunEnded` where the plan has
    the same budget, so that a sweep may pass it by.
    """
    budget = 0 if plan is None else plan.budget_samples
    try:
        check_unfinished(folder, budget if may_grow else 0)
    except RunEnded as error:
        had = error.summary.get("budget_samples", budget)
        if had == budget or plan is None:
            raise
        raise ConfigError(f"{error} (it had budget.samples={had})") from error


def _check_round(checkpoint: Path, outer: Any, steps: int) -> None:
    """Refuse to lengthen a run whose last outer step came early, at the end of its budget."""
    if outer.kind is not None and steps % outer.interval:
        raise ConfigError(
            f"{checkpoint} was made by an outer step after {steps % outer.interval} of "
            f"outer.interval={outer.interval} inner steps, where the budget ended, and a longer "
            "run has none there: move it away to go on from the checkpoint before it, or begin "
            "another run with hydra.run.dir=…"
        )


def check_complete(folder: Path) -> None:
    """Refuse a run whose record was left behind: it is not begun again unasked."""
    checkpoints = listed(folder)
    missing = [name for name in (CONFIG, METRICS) if not (folder / name).exists()]
    if checkpoints and missing:
        what = f"{len(checkpoints)} checkpoint(s)"
    elif CONFIG in missing and (folder / METRICS).stat().st_size > 0:
        what = "the lines of a run"
    else:
        return
    ways = {
        CONFIG: "copy .hydra too (`cp -r RUN/* …` leaves it behind, `cp -r RUN/. …` does not)",
        METRICS: f"restore {METRICS}, or make an empty one to go on without its lines",
    }
    raise ConfigError(
        f"{folder} holds {what} and lacks {' and '.join(missing)}, so nothing is resumed and "
        f"nothing begun again: {', and '.join(ways[name] for name in missing)}; or choose another "
        "hydra.run.dir"
    )


def _hole(folder: Path, state: Mapping[str, Any]) -> str | None:
    """Say which steps before the checkpoint have lost their lines, on stderr too."""
    progress = state["progress"]
    kept, wanted = kept_lines(folder, progress["samples"]), state.get("recorded_steps", 0)
    if kept.step >= wanted:
        return None
    hole = (
        f"{METRICS} ends after step {kept.step}, and the checkpoint is of step "
        f"{progress['steps']}: the lines in between are lost, and these steps are not made again"
    )
    say(f"{folder}: {hole}")
    return hole


def last_good(folder: Path, verify: str = "auto") -> Path | None:
    """The last checkpoint that is whole; None where the run has left none at all. Each that is
    passed by is reported on stderr.

    Raises:
        ConfigError: there are some, and all are broken: to begin from the start is the user's to
            decide.
    """
    broken: list[str] = []
    for checkpoint in reversed(listed(folder)):
        what = problem(checkpoint, verify)
        if what is None:
            for reason in broken:
                say(f"passed by {reason}; going on from {checkpoint.name}")
            return checkpoint
        broken.append(f"{checkpoint.name}: {what}")
    if broken:
        raise ConfigError(
            f"none of the {len(broken)} checkpoint(s) in {folder / CHECKPOINTS} is whole "
            f"({'; '.join(broken[:3])}): restore one, or delete that folder to begin from the start"
        )
    return None


def check_world(checkpoint: Path, saved: dict[str, Any], world: int | None, verify: str) -> None:
    """Refuse early what only a world of the same size can read."""
    if not saved.get("zero_stage") or world in (None, saved["world"]):
        return
    universal = checkpoint / UNIVERSAL
    what = problem(universal, verify) if universal.exists() else None
    if what is not None:
        raise ConfigError(
            f"{universal} is broken ({what}): delete it, and convert the checkpoint again with "
            f"`largebatch checkpoint universal {checkpoint}`"
        )
    if not universal.exists():
        raise ConfigError(
            f"{checkpoint} was saved by ZeRO-{saved['zero_stage']} on {saved['world']} rank(s), "
            f"and there are {world} now: convert it with `largebatch checkpoint universal "
            f"{checkpoint}`, or start {saved['world']}"
        )


def check_same(folder: Path, config: str) -> int:
    """Refuse a folder whose run was made with another configuration, but for a larger budget.

    Args:
        config: the resolved configuration, as YAML.

    Returns:
        The budget that the run began with, in samples; 0 where it does not say.
    """
    if not (folder / CONFIG).exists():
        return 0
    before, now = decisive(recorded(folder)), decisive(OmegaConf.create(config))
    known = {key.split(".")[0] for key in before}
    # What is null, or a group whose kind is, says nothing: it may be one that there was not yet.
    off = {key.split(".")[0] for key, value in now.items() if key.endswith(".kind") and not value}
    now = {key: value for key, value in now.items() if key.split(".")[0] not in off - known}
    asked = {key.split(".")[0] for key, value in now.items() if value is not None}
    if missing := sorted(asked - known):
        raise ConfigError(
            f"{folder / CONFIG} has no {', '.join(missing[:4])}: it is not whole, or another "
            "version has written it; restore it, or choose another hydra.run.dir"
        )
    changed = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
    if _budget(now) >= _budget(before):
        changed = [key for key in changed if key not in _BUDGET]
    if changed:
        other = ", ".join(f"{key}={before.get(key)} (now {now.get(key)})" for key in changed[:4])
        raise ConfigError(
            f"the run in {folder} was made with {other}: resume it with the same overrides, or "
            "choose another hydra.run.dir (of a sweep: hydra.sweep.dir)"
        )
    return _budget(before)


def _budget(values: Mapping[str, Any]) -> int:
    """The budget in samples, however it is given; 0 where it is none."""
    samples, tokens = (values.get(key) for key in _BUDGET)
    per = values.get("budget.tokens_per_sample", 1)
    budget = {"samples": samples, "tokens": tokens, "tokens_per_sample": per}
    try:
        convert(budget, BudgetConfig)
        return BudgetConfig(**budget).samples
    except ValueError:
        return 0


def recorded(folder: Path) -> Any:
    """The configuration in the record, as data: nothing is resolved, imported or called."""
    try:
        return read_yaml(folder / CONFIG)
    except RecordError as error:
        raise ConfigError(f"{error}: restore it, or choose another hydra.run.dir") from error


def decisive(config: Any) -> dict[str, Any]:
    """Every value that decides a trajectory, by its key with dots."""
    flat: dict[str, Any] = {}

    def flatten(node: Any, prefix: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                flatten(value, f"{prefix}.{key}" if prefix else str(key))
        else:
            flat[prefix] = node

    flatten(OmegaConf.to_container(config), "")
    if "engine._target_" in flat:
        flat["engine._target_"] = engine_target(str(flat["engine._target_"]))
    return {key: value for key, value in flat.items() if key.split(".")[0] not in _FREE}


def check_past(plan: Plan, before: int, samples: int, decided: Mapping[str, Any]) -> None:
    """Refuse a budget under which the batch sizes or learning rates until now would have been
    others: a curve over the whole budget is another curve over a larger one.

    Args:
        before: the budget until now, in samples.
        samples: that the run has seen.
        decided: by then, by a ramp that follows the run.
    """
    if plan.budget_samples == before:
        return
    now = deepcopy(plan)  # `decided` goes into its ramp
    now.load_state_dict(decided)
    then, same = replace(now, budget_samples=before), 0
    for place in range(_PLACES + 1):
        seen = max(0, samples - 1) * place // _PLACES
        one, other = then.at(seen), now.at(seen)
        if one != other:
            break
        same = seen
    else:
        return
    what, was, would = next(
        (name, old, new)
        for name, old, new in zip(one._fields, one, other, strict=True)
        if old != new
    )
    earlier = f"; checkpoints of up to {same} samples can be lengthened" if same > 0 else ""
    raise ConfigError(
        f"budget.samples={plan.budget_samples} was {before}, and the schedule depends on it: after "
        f"{seen} samples {what} was {was}, and would be {would}. Keep the budget, or begin another "
        "run with hydra.run.dir=…; what can be lengthened is a run whose schedule until now does "
        "not depend on its budget (lr=constant, lr=inverse_sqrt, or lr=wsd before its decay"
        f"{earlier})"
    )
