"""How far a study is, from its folder alone: the protocol asks again and is told what is there."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from largebatch.common.files import lock
from largebatch.conf.config import BudgetConfig, in_samples
from largebatch.conf.specs import typed_as
from largebatch.conf.sweep_config import StudyConfig
from largebatch.records import read_fields
from largebatch.records.fields import mapping, number
from largebatch.records.names import METRICS, SUMMARY
from largebatch.study.decisions import STUDY
from largebatch.study.protocol.conduct import LOCK, finished
from largebatch.study.protocol.progress import StudyProgress
from largebatch.study.protocol.questions import Job, Question, question_of


@dataclass
class OptimizerStatus:
    """Of one optimizer: points and runs. `wanted` runs are asked for now; more may follow."""

    optimizer: str
    points: int = 0
    points_done: int = 0
    done: int = 0
    running: int = 0
    wanted: int = 0
    seconds: float = 0.0


@dataclass
class StudyStatus:
    """Of a whole study.

    Attributes:
        fraction: of its cost that is behind it, a guess.
        is_running: a process conducts it now.
    """

    rows: list[OptimizerStatus]
    fraction: float
    is_running: bool

    @property
    def done(self) -> int:
        return sum(row.done for row in self.rows)

    @property
    def seconds(self) -> float:
        """That its runs took, side by side or not."""
        return sum(row.seconds for row in self.rows)

    @property
    def seconds_left(self) -> float | None:
        """That runs will take still, at the pace so far; None where there is no telling."""
        if self.fraction < 0.02 or self.fraction == 1.0:
            return None
        return self.seconds * (1 / self.fraction - 1)


def read_status(folder: Path) -> StudyStatus:
    """Read how far the study in `folder` is.

    Raises:
        FileNotFoundError: there is none.
        RecordError: its `study.json` cannot be read.
    """
    protocol = read_protocol(folder)
    rows = {name: OptimizerStatus(name) for name in protocol.study.optimizers}
    waiting: list[Job] = []
    while jobs := protocol.ask():
        for job in jobs:
            result = finished(folder, job)
            if result is None:
                waiting.append(job)
            else:
                protocol.tell(job, result)
                rows[job.optimizer].done += 1
                rows[job.optimizer].seconds += _seconds(folder / job.folder)
    for job in waiting:
        run = folder / job.folder
        under_way = (run / METRICS).exists() and not (run / SUMMARY).exists()
        rows[job.optimizer].running += under_way
        rows[job.optimizer].wanted += not under_way
    for place in protocol.places:
        rows[place[0]].points += 1
        search = protocol.searches.get(place)
        rows[place[0]].points_done += search is not None and search.done
    return StudyStatus(
        list(rows.values()), StudyProgress(protocol, folder).fraction(), _is_locked(folder)
    )


def read_protocol(folder: Path) -> Question:
    """The protocol of the study in `folder`, told nothing yet.

    Raises:
        FileNotFoundError: there is none.
        RecordError: its `study.json` cannot be read.
    """
    record = read_fields(folder / STUDY)
    study = typed_as(StudyConfig, OmegaConf.create(record.take("study", mapping)))
    config = record.inside("config")
    given = config.take("budget", mapping)  # as it was written: 2e6, tokens
    budget = typed_as(BudgetConfig, OmegaConf.create(given))
    names = [f"optim={name}" for name in study.optimizers]
    optimizers = {name.removeprefix("optim="): record.take(name, mapping) for name in names}
    curve = in_samples(config.find("lr", mapping) or {}, "lr", budget.tokens_per_sample)
    return question_of(study, optimizers, budget.samples, curve)


def _seconds(run: Path) -> float:
    return read_fields(run / SUMMARY).find("seconds", number) or 0.0


def _is_locked(folder: Path) -> bool:
    """Whether a process conducts the study now."""
    try:
        with (folder / LOCK).open() as handle:
            return lock(handle.fileno()) is False
    except OSError:
        return False
