"""Curves that others have published, to hold a study's against.

Their tasks, samples and targets are not the study's: each is moved so that its critical batch size
and its fewest steps are those of the study's first curve. What is left to compare is the bend.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from largebatch.study.statistics.published import MLPERF, ZHANG_BATCH_SIZES, ZHANG_STEPS
from largebatch.study.statistics.solver import fit_many


@dataclass(frozen=True)
class Reference:
    """Published steps over batch sizes, each over its own critical batch size and fewest steps."""

    name: str
    batch_sizes: Sequence[float]
    steps: Sequence[float]


SOURCES: Final = {
    "mlperf": "MLPerf reference convergence points, mlcommons/logging at 7bbf792: epochs of LARS "
    "on ResNet-50, samples of LAMB on BERT",
    "zhang": "Zhang et al. 2024, arXiv:2410.21676: AdamW on language models of 85M to 1.2B "
    "parameters",
}

_STEPS: Final[Mapping[str, Mapping[str, Mapping[int, float]]]] = {
    "mlperf": MLPERF,
    "zhang": {
        f"AdamW, {model}": dict(zip(ZHANG_BATCH_SIZES, steps, strict=True))
        for model, steps in ZHANG_STEPS.items()
    },
}


def references(names: Sequence[str]) -> list[Reference]:
    """The published curves of `names`.

    Raises:
        ValueError: a name that there is none of.
    """
    unknown = [name for name in names if name not in SOURCES]
    if unknown:
        raise ValueError(f"--reference must be among {', '.join(SOURCES)}, got {unknown[0]!r}")
    return [
        _reference(f"{label} ({source})", steps)
        for source in names
        for label, steps in _STEPS[source].items()
    ]


def _reference(name: str, steps: Mapping[int, float]) -> Reference:
    fit = fit_many(list(steps), [list(steps.values())], shape=None)
    b_crit, s_min = float(fit.b_crit[0]), float(fit.s_min[0])
    return Reference(
        name, [size / b_crit for size in steps], [taken / s_min for taken in steps.values()]
    )
