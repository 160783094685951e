"""What all trackers share: under which name a number goes, and what a run is called there."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol

from largebatch.records.names import EVALUATED

_SECTIONS: Final = {
    "loss": "train", "samples_per_second": "train", "step_seconds": "train", "mfu": "train",
    "hfu": "train", "tflops_per_device": "train", "eval_loss": "eval", "lr": "optim",
    "global_batch_size": "optim", "grad_sq_norm": "noise", "grad_trace": "noise",
    "skipped": "optim", "overflow": "optim", "loss_scale": "optim",
}  # fmt: skip
_NAMES: Final = {"eval_loss": "loss", "global_batch_size": "batch_size"}
_PREFIXES: Final = {
    EVALUATED: "eval",
    "noise": "noise",
    "grad_norm": "optim",
    "trust_ratio": "optim",
}


class Logger(Protocol):
    """What takes a run's lines."""

    def log(self, line: Mapping[str, Any]) -> None:
        """One recorded line."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run's summary, however the run ended."""


@dataclass(frozen=True)
class Labels:
    """What a run is found and grouped by in a tracker.

    Attributes:
        name: what sets it apart in its sweep, or its folder.
        group: the sweep or study that it belongs to.
        lr: its peak, at `batch_size` samples.
        commit: of the code; None where it is not known.
    """

    name: str
    group: str | None
    optimizer: str
    task: str
    model: str
    batch_size: int
    lr: float
    seed: int
    commit: str | None

    def flat(self) -> dict[str, Any]:
        """What runs are grouped and filtered by."""
        return {key: value for key, value in asdict(self).items() if key not in ("name", "group")}


def sectioned(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line that move, by section and name; without what is not finite.

    >>> sectioned({"samples": 64, "loss": 2.5, "eval_loss": None, "lr": 0.1, "skipped": False})
    {'train/loss': 2.5, 'optim/lr': 0.1, 'optim/skipped': 0.0}
    >>> sectioned({"eval_loss": 2.5, "eval_accuracy": 0.5})
    {'eval/loss': 2.5, 'eval/accuracy': 0.5}
    >>> sectioned({"noise_scale": 9.0, "trust_ratio/net.0.weight": 0.5, "data_parallel_size": 2})
    {'noise/noise_scale': 9.0, 'optim/trust_ratio/net.0.weight': 0.5}
    """
    found = {}
    for key, value in line.items():
        section = _SECTIONS.get(key)
        if section is None:
            section = next((name for start, name in _PREFIXES.items() if key.startswith(start)), "")
        if section and isinstance(value, int | float) and math.isfinite(value):
            name = _NAMES.get(key, key.removeprefix(EVALUATED))
            found[f"{section}/{name}"] = float(value)
    return found
