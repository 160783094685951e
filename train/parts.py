"""What a run is made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer

from largebatch.train.engines.base import Engine
from largebatch.train.noise.gradient_noise import GradientNoise
from largebatch.train.reporting.sites import NoSites
from largebatch.train.tasks import Task
from largebatch.train.weights.average import WeightAverage
from largebatch.train.weights.outer import OuterSteps


@dataclass
class Parts:
    """What a run is made of, and what the summary says of that.

    Attributes:
        noise, average, outer, sites: the noise scale's, that of the weights, outer steps of them,
            of modules; as asked for.
        data: the task's provenance.
        groups: what tells the optimizer's groups from one another.
    """

    task: Task
    engine: Engine
    optimizer: Optimizer
    noise: GradientNoise | None = None
    average: WeightAverage | None = None
    outer: OuterSteps | None = None
    num_parameters: int = 0
    data: Mapping[str, str] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    sites: NoSites = field(default_factory=NoSites)
