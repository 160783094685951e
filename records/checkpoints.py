"""The complete checkpoints in a run's folder, by their names: `checkpoints/samples-N`."""

import os
import re
from pathlib import Path

from largebatch.common.errors import ConfigError
from largebatch.records.names import CHECKPOINTS


def is_name(name: str) -> bool:
    """Say whether a folder of this name is a checkpoint."""
    return re.fullmatch(r"samples-[0-9]{1,18}", name) is not None


def samples_of(checkpoint: Path) -> int:
    """Return how many samples a checkpoint had seen, by its name."""
    return int(checkpoint.name.removeprefix("samples-"))


def listed(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first; whether they are whole is another question.

    One listing of one folder, whatever the number of ranks; only rank 0 asks.

    Raises:
        ConfigError: they are elsewhere, and that is not here: not mounted, or gone.
    """
    try:
        names = os.listdir(run / CHECKPOINTS)
    except FileNotFoundError:
        if (run / CHECKPOINTS).is_symlink():
            raise ConfigError(
                f"{run / CHECKPOINTS} leads to {os.readlink(run / CHECKPOINTS)}, which is not "
                "here: mount it, or delete the link to do without these checkpoints"
            ) from None
        return []
    return sorted((run / CHECKPOINTS / name for name in names if is_name(name)), key=samples_of)
