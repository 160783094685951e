"""Where a run may go on: in its own folder, from its last complete checkpoint, with the same words.

Imports no torch: a refusal takes no longer than any other.
"""

import json
from pathlib import Path
from typing import Any, Final, NamedTuple

from omegaconf import OmegaConf

from largebatch.conf.config import ConfigError
from largebatch.train.record import METRICS, check_unfinished

CHECKPOINTS: Final = "checkpoints"
STATE: Final = "state.json"

# What may differ between a run and its resumption: none of it decides the trajectory.
_FREE: Final = ("engine", "logger", "record", "checkpoint", "resume")


class Resumption(NamedTuple):
    """A run that is there, and where it goes on."""

    checkpoint: Path | None
    """None: it has left none, and begins again."""
    samples: int
    """Samples seen by then."""


def find_resumption(folder: Path, config: str) -> Resumption | None:
    """Where the run in `folder` goes on; None where there is none.

    Args:
        config: the resolved configuration, as YAML.

    Raises:
        ConfigError: the run has ended, or was made with another configuration.
    """
    if not (folder / METRICS).exists():
        return None
    check_unfinished(folder)
    if not (folder / ".hydra" / "config.yaml").exists():  # killed before it had begun
        return Resumption(None, 0)
    _check_same(folder, config)
    found = complete(folder)
    if not found:
        return Resumption(None, 0)
    state = json.loads((found[-1] / STATE).read_text(encoding="utf-8"))
    return Resumption(found[-1], int(state["progress"]["samples"]))


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of the run in `folder`, oldest first."""
    paths = (folder / CHECKPOINTS).glob("samples-*")
    return sorted(path for path in paths if (path / STATE).is_file())


def _check_same(folder: Path, config: str) -> None:
    before = _decisive(OmegaConf.load(folder / ".hydra" / "config.yaml"))
    now = _decisive(OmegaConf.create(config))
    changed = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
    if changed:
        told = ", ".join(f"{key}={before.get(key)} (now {now.get(key)})" for key in changed[:4])
        raise ConfigError(
            f"the run in {folder} was made with {told}: resume it with the same overrides, or "
            "choose another hydra.run.dir"
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
