"""What runs recorded step by step, from `metrics.jsonl`, and what each is called beside others.

A run may still live: its lines so far are read, and nothing else is asked of it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from largebatch.common.text import shown
from largebatch.records import RecordError, printable
from largebatch.records.columns import read_columns
from largebatch.records.configuration import read_yaml
from largebatch.records.fields import (
    Check,
    Fields,
    flag,
    mapping,
    number,
    one_of,
    text,
    within,
)
from largebatch.records.names import CONFIG, EVALUATED, METRICS, SUMMARY
from largebatch.records.reading import find_fields
from largebatch.records.summary import status
from largebatch.records.target import DIRECTIONS, Target, direction_of
from largebatch.study.curves import differences, leaves

Series = NDArray[np.float64]

COUNTED: Final = within(0, 2**53)
SCALE: Final = within(-1e30, 1e30)
"""What a picture can hold."""
READ: Final[Mapping[str, Check[Any]]] = {
    "step": COUNTED, "samples": COUNTED, "global_batch_size": COUNTED, "seconds": COUNTED,
    "loss": SCALE, "eval_loss": SCALE, "lr": SCALE, "grad_norm": SCALE,
    "noise_scale": SCALE, "noise_resolved": flag, "samples_per_second": SCALE,
    "trust_ratio_min": SCALE, "trust_ratio_median": SCALE, "trust_ratio_max": SCALE,
}  # fmt: skip
_NO_PART_IN_A_NAME: Final = (
    "optim._target_", "optim._partial_", "objective", "study", "logger", "record", "checkpoint",
    "throughput", "resume", "stop_at", "stop_before_walltime",
)  # fmt: skip


@dataclass(frozen=True)
class RunHistory:
    """A run's lines as columns, and what it says of itself.

    Attributes:
        columns: by field, a number for each line, NaN where it has none; `samples` ascend.
        status: of its summary; "running" where there is none.
        optimizer: by name; the last part of its class where the run has no summary.
        identity: its configuration, flat.
    """

    folder: Path
    columns: Mapping[str, Series]
    status: str
    optimizer: str
    target: Target | None
    provenance: Mapping[str, Any]
    identity: Mapping[str, Any]

    def has(self, key: str) -> bool:
        """Whether any line has a number for `key`."""
        return key in self.columns and bool(np.isfinite(self.columns[key]).any())

    @property
    def metrics(self) -> list[str]:
        """Names of the task's metrics that it was evaluated by, in order."""
        found = (key for key in self.columns if key.startswith(EVALUATED) and self.has(key))
        return sorted(key.removeprefix(EVALUATED) for key in found if key != "eval_loss")

    def last(self, key: str) -> float | None:
        """The last number recorded for `key`."""
        if not self.has(key):
            return None
        column = self.columns[key]
        return float(column[np.isfinite(column)][-1])


def is_run(folder: Path) -> bool:
    """Whether the folder is that of one run rather than of many."""
    return (folder / METRICS).is_file()


def read_history(folder: Path, problems: list[str]) -> RunHistory:
    """Read what a run recorded; what is damaged is noted.

    Raises:
        ValueError: no line says how many samples it had seen.
    """
    columns = {
        key: np.array(column)
        for key, column in read_columns(folder / METRICS, check_of, problems).items()
    }
    samples = columns.get("samples", np.empty(0))
    shown_lines = increasing(samples)
    if not shown_lines.any():
        raise ValueError(
            f"{printable(folder / METRICS)} holds no line with samples: nothing is drawn before a "
            "run's first step"
        )
    summary = find_fields(folder / SUMMARY, problems)
    summary = summary or Fields({}, printable(folder / SUMMARY), problems)
    config = summary.find("config", mapping) or _config(folder, problems)
    identity = leaves(config)
    kind = str(identity.get("optim._target_", "optimizer")).rpartition(".")[2].lower()
    return RunHistory(
        folder=folder,
        columns={key: column[shown_lines] for key, column in columns.items()},
        status=summary.find("status", status) or "running",
        optimizer=printable(summary.find("optimizer", text) or kind),
        target=_target(Fields(identity, summary.where, problems)),
        provenance=summary.find("provenance", mapping) or {},
        identity=identity,
    )


def check_of(key: str) -> Check[Any] | None:
    """By what check a field of a line is taken; None: it is not drawn."""
    is_metric = key.startswith(EVALUATED) and key.isidentifier()
    return READ.get(key, SCALE if is_metric else None)


def _target(identity: Fields) -> Target | None:
    """What a configuration aims at."""
    metric = identity.find("target.metric", text)
    value = identity.find("target.loss" if metric is None else "target.value", number)
    if value is None:
        return None
    if metric is None or metric == "loss":
        return Target("loss", value)
    direction = identity.find("target.direction", one_of(*DIRECTIONS)) or direction_of(metric)
    return None if direction is None else Target(metric, value, direction)


def names_of(histories: Sequence[RunHistory]) -> list[str]:
    """Name runs by what they differ in; by their folders where that does not tell them apart.

    The optimizer stands first, the seed last.
    """
    if len(histories) == 1:
        return [_folder_name(histories[0])]
    told = differences([_told_by(history) for history in histories])
    names = [
        " ".join(
            value if key == "optimizer" else f"{key.removeprefix('optim.')}={value}"
            for key, value in words.items()
        )
        for words in told
    ]
    often = Counter(names)
    return [
        printable(name) if name and often[name] == 1
        else f"{printable(name)} {_folder_name(history)}".strip()
        for name, history in zip(names, histories, strict=True)
    ]  # fmt: skip


def increasing(samples: Series) -> NDArray[np.bool_]:
    """The lines whose samples are more than those of all lines before: others have no place on an
    axis.
    """
    known = np.where(np.isnan(samples), -np.inf, samples)
    before = np.maximum.accumulate(np.concatenate([[0.0], known]))[:-1]
    return known > before


def _told_by(history: RunHistory) -> dict[str, Any]:
    """What may name a run: the optimizer first, then its configuration, the seed last."""
    entries = sorted(
        (path, value)
        for path, value in history.identity.items()
        if path != "seed"
        and not any(path == name or path.startswith(f"{name}.") for name in _NO_PART_IN_A_NAME)
    )
    seed = {"seed": history.identity["seed"]} if "seed" in history.identity else {}
    return {"optimizer": history.optimizer, **dict(entries), **seed}


def _folder_name(history: RunHistory) -> str:
    return printable(history.folder.resolve().name)


def _config(folder: Path, problems: list[str]) -> Mapping[str, Any]:
    """The configuration of a run without a summary, as Hydra left it."""
    from omegaconf import OmegaConf

    try:
        plain = OmegaConf.to_container(read_yaml(folder / CONFIG))
    except FileNotFoundError:
        return {}
    except (OSError, RecordError) as error:
        problems.append(str(error))
        return {}
    if not isinstance(plain, Mapping):
        problems.append(f"{printable(folder / CONFIG)} holds {shown(plain)}, and no configuration")
        return {}
    return {str(key): value for key, value in plain.items()}
