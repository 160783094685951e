"""What a study's `protocol` asks: steps to a target, or the loss at a budget; asked alike."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any
from typing import Protocol as TypingProtocol

from largebatch.common.errors import ConfigError, refusing
from largebatch.conf.sweep_config import LOSS, StudyConfig
from largebatch.schedules import WSD
from largebatch.study.decisions import Decisions
from largebatch.study.protocol.loss_protocol import LossJob, LossPlace, LossProtocol
from largebatch.study.protocol.protocol import Place as StepsPlace
from largebatch.study.protocol.protocol import Protocol, StudyJob
from largebatch.study.protocol.search import Result, Search

Job = StudyJob | LossJob
Place = StepsPlace | LossPlace


class Question(TypingProtocol):
    """Asked for jobs and told their results, until it is done."""

    study: StudyConfig

    def ask(self) -> Sequence[Job]:
        """Every job that can run now."""

    def tell(self, job: Any, result: Result) -> None:
        """The result of a job."""

    @property
    def places(self) -> Sequence[Place]:
        """The points of the study."""

    @property
    def searches(self) -> Mapping[Any, Search]:
        """Of every place, as far as opened."""

    def cost(self, place: Any) -> float:
        """What a point costs, beside others."""

    def decisions(self) -> Decisions:
        """What is decided so far, for the report."""


def question_of(
    study: StudyConfig,
    optimizers: Mapping[str, Mapping[str, Any]],
    budget_samples: int,
    curve: Mapping[str, Any],
) -> Question:
    """The protocol that a study names, told nothing yet.

    Args:
        budget_samples: the most that a run to a target may take.
        curve: the configuration of the learning rate's curve.

    Raises:
        ConfigError: it cannot be asked so.
    """
    if study.protocol != LOSS:
        return Protocol(study, optimizers, budget_samples)
    with refusing():
        return LossProtocol(study, optimizers, _wsd(curve))


def _wsd(curve: Mapping[str, Any]) -> WSD:
    """The curve that a configuration describes, which need not be one's own: nothing is called that
    it names.
    """
    target = str(curve.get("_target_"))
    if target.rpartition(".")[2] != WSD.__name__:
        raise ConfigError(
            f"study.protocol={LOSS} branches where a decay begins, which lr=wsd knows, got "
            f"lr._target_={target}"
        )
    known = {declared.name for declared in fields(WSD)}
    return WSD(**{key: value for key, value in curve.items() if key in known})
