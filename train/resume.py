"""Where a run may go on: in its own folder, from its last good checkpoint, with the same words.

Imports no torch: a refusal takes no longer than any other.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from omegaconf import OmegaConf

from largebatch.conf.errors import ConfigError
from largebatch.train.checkpoint_files import CHECKPOINTS, UNIVERSAL, listed, problem, read_state
from largebatch.train.owner import Owner
from largebatch.train.record import METRICS, check_unfinished, claim

# What may differ between a run and its resumption: none of it decides the trajectory.
_FREE: Final = ("engine", "logger", "record", "checkpoint", "resume", "throughput")


@dataclass(frozen=True)
class Resumption:
    """A run that is there, and where it goes on."""

    checkpoint: Path | None
    """None: it has left none, and begins again."""
    samples: int
    """Samples seen by then."""
    owner: Owner | None = None
    """This process's hold on the folder, on rank 0; the run's record takes it over."""

    def release(self) -> None:
        """Let go of the folder: there is to be no run after all."""
        if self.owner is not None:
            self.owner.release()


def find_resumption(folder: Path, config: str, world: int | None = None) -> Resumption | None:
    """Where the run in `folder` goes on; None where there is none. From now on, or until the
    resumption is released, the folder is this process's.

    Args:
        config: the resolved configuration, as YAML.
        world: ranks of the run to come; None: whether a checkpoint fits them is not asked.

    Raises:
        ConfigError: the run has ended, or was made with another configuration, another process is
            at work on it, or it has left checkpoints and none can be read.
    """
    if not (folder / METRICS).exists():
        return None
    owner = claim(folder, world or 1)
    try:
        check_same(folder, config)
        check_unfinished(folder)
        if not (folder / ".hydra" / "config.yaml").exists():  # killed before it had begun
            return Resumption(None, 0, owner)
        verify = OmegaConf.create(config).checkpoint.verify
        checkpoint = last_good(folder, verify)
        if checkpoint is None:
            return Resumption(None, 0, owner)
        state = read_state(checkpoint)
        _check_world(checkpoint, state.get("saved_by", {}), world, verify)
        return Resumption(checkpoint, int(state["progress"]["samples"]), owner)
    except BaseException:
        owner.release()
        raise


def last_good(folder: Path, verify: str = "auto") -> Path | None:
    """The last checkpoint that is whole; None where the run has left none at all. Each that is
    passed by is told on stderr.

    Raises:
        ConfigError: there are some, and all are broken: to begin from the start is the user's to
            decide.
    """
    broken: list[str] = []
    for checkpoint in reversed(listed(folder)):
        what = problem(checkpoint, verify)
        if what is None:
            for told in broken:
                print(
                    f"largebatch: passed by {told}; going on from {checkpoint.name}",
                    file=sys.stderr,
                )
            return checkpoint
        broken.append(f"{checkpoint.name}: {what}")
    if broken:
        raise ConfigError(
            f"none of the {len(broken)} checkpoint(s) in {folder / CHECKPOINTS} is whole "
            f"({'; '.join(broken[:3])}): restore one, or delete that folder to begin from the start"
        )
    return None


def _check_world(checkpoint: Path, saved: dict[str, Any], world: int | None, verify: str) -> None:
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


def check_same(folder: Path, config: str) -> None:
    """Refuse a folder whose run was made with another configuration; `config` is YAML, resolved.

    Raises:
        ConfigError: naming the folder, the keys and the way out.
    """
    if not (folder / ".hydra" / "config.yaml").exists():
        return
    before = _decisive(OmegaConf.load(folder / ".hydra" / "config.yaml"))
    now = _decisive(OmegaConf.create(config))
    changed = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
    if changed:
        told = ", ".join(f"{key}={before.get(key)} (now {now.get(key)})" for key in changed[:4])
        raise ConfigError(
            f"the run in {folder} was made with {told}: resume it with the same overrides, or "
            "choose another hydra.run.dir (of a sweep: hydra.sweep.dir)"
        )


def _decisive(config: Any) -> dict[str, Any]:
    """Every value that decides a trajectory, by its key with dots."""
    flat: dict[str, Any] = {}

    def flatten(node: Any, prefix: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                flatten(value, f"{prefix}.{key}" if prefix else str(key))
        else:
            flat[prefix] = node

    flatten(OmegaConf.to_container(config, resolve=True), "")
    return {key: value for key, value in flat.items() if key.split(".")[0] not in _FREE}
