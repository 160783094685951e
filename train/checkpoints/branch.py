"""Where a run branches from: another run's checkpoint, whose weights, optimizer state and samples
seen it takes over, in a folder of its own.

What gives these their meaning must be the trunk's: task, model, optimizer, seed. What comes after
is the branch's own: learning rate and its curve, batch, scaling rule, budget, target. Imports no
torch.
"""

from pathlib import Path
from typing import Any, Final

from largebatch.common.errors import ConfigError
from largebatch.common.text import say
from largebatch.records.checkpoints import is_name, listed
from largebatch.records.fields import RecordError
from largebatch.records.names import CHECKPOINTS, CONFIG
from largebatch.train.checkpoints.files import problem, read_state
from largebatch.train.checkpoints.resume import check_world, decisive, recorded

_SHARED: Final = ("task", "model", "optim", "seed", "precision")
_OWN: Final = ("optim.lr",)


def find_branch(name: str, begun_in: Path, config: Any, world: int) -> Path:
    """Find the checkpoint that `branch_from` names: itself, or the last whole one of a run.

    Args:
        begun_in: what a relative path is relative to.
        config: the resolved configuration of the branch.
        world: its ranks.

    Raises:
        ConfigError: there is none, it is broken, or it is of another task, model, optimizer, seed
            or precision.
    """
    given = begun_in / name
    checkpoint = given if is_name(given.name) and given.is_dir() else _last_whole(given)
    try:
        what = problem(checkpoint, config.checkpoint.verify)
        if what is not None:
            raise ValueError(f"it is broken: {what}")
        state = read_state(checkpoint)
    except (OSError, ValueError) as error:
        raise ConfigError(f"branch_from={name}: {error}: name another checkpoint") from error
    check_world(checkpoint, state.get("saved_by", {}), world, config.checkpoint.verify)
    _check_shared(checkpoint, config)
    return checkpoint


def _last_whole(run: Path) -> Path:
    checkpoints = listed(run)
    if not checkpoints:
        raise ConfigError(
            f"branch_from={run} has no checkpoints: name a run that was trained with "
            f"checkpoint.every_samples, or one of its {CHECKPOINTS}/samples-…"
        )
    for checkpoint in reversed(checkpoints):
        what = problem(checkpoint)
        if what is None:
            return checkpoint
        say(f"passed by {checkpoint.name}: {what}")
    raise ConfigError(f"branch_from={run}: none of its {len(checkpoints)} checkpoint(s) is whole")


def _check_shared(checkpoint: Path, config: Any) -> None:
    """Refuse a trunk whose samples, weights or optimizer state are not those of this run's parts.

    A checkpoint that was copied without its run does not say what made it; then the tensors alone
    decide whether it fits.
    """
    run = checkpoint.parents[1]
    if not (run / CONFIG).exists():
        return
    try:
        trunk = decisive(recorded(run))
    except RecordError as error:
        raise ConfigError(str(error)) from error
    own = decisive(config)

    def shared(key: str) -> bool:
        return key not in _OWN and key.split(".")[0] in _SHARED

    changed = [k for k in sorted(trunk | own) if shared(k) and trunk.get(k) != own.get(k)]
    if changed:
        other = ", ".join(f"{key}={trunk.get(key)} (now {own.get(key)})" for key in changed[:4])
        raise ConfigError(
            f"{checkpoint} is of a run with {other}: a branch shares {', '.join(_SHARED)} with its "
            "trunk, the learning rate aside"
        )
