"""Whether a resumed run has the data that it began with."""

from pathlib import Path
from typing import Any

from largebatch.common.errors import ConfigError
from largebatch.train.checkpoints.files import read_state
from largebatch.train.tasks import Task


def data_of(task: Task) -> dict[str, Any]:
    """What tells a task's data from others: its counts, and the hash that it gives, if any. Words
    and paths are left out: they may change with the machine.
    """
    counts = {"num_train": task.num_train, "num_eval": task.num_eval}
    return counts | {"data_hash": dict(task.provenance()).get("data_hash")}


def check_data(checkpoint: Path, task: Task) -> None:
    """Refuse other data than that of the checkpoint: from there on the order would mean other
    samples, some of them seen before and some never.
    """
    before = read_state(checkpoint).get("data")
    if not isinstance(before, dict):
        return
    changed = [
        f"{name} was {before[name]!s:.12} and is {value!s:.12}"
        for name, value in data_of(task).items()
        if before.get(name) is not None and value is not None and before[name] != value
    ]
    if changed:
        raise ConfigError(
            f"the data is not what {checkpoint} was trained on ({'; '.join(changed)}): restore it, "
            "or begin a run with the new data in a folder of its own (hydra.run.dir=…)"
        )
