"""What the oracles of the variants share: a layer as they take it, and a norm.

An oracle takes the layers, and for each step the learning rate and the layers' gradients; it yields
the layers' weights after each step.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Steps = Iterable[tuple[float, Sequence[Array]]]
Trajectory = Iterator[list[Array]]
Oracle = Callable[..., Trajectory]


@dataclass(frozen=True)
class Layer:
    weight: Array
    weight_decay: float = 0.0
    adapt: bool = True
    """False: ratio 1 in every oracle. No source has that switch."""


def norm(values: Array) -> float:
    return math.sqrt(float(np.vdot(values, values)))
