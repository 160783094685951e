"""A made-up world to run studies in: what a training run would come to, in no time."""

import math
from collections.abc import Callable

import pytest

from largebatch.study.page.html import Drawn
from largebatch.study.protocol.search import Result

Simulate = Callable[[str, int, float, int, int], Result]


@pytest.fixture(scope="session")
def simulate() -> Simulate:
    """The result of a run of (optimizer, batch size, learning rate, seed, steps to give up at).

    Steps follow S_min + E_min / B at the best learning rate, which grows as the square root of the
    batch size, and more where the rate is off; from 8 times the best it diverges. `hopeless` never
    reaches its target.
    """

    def run(optimizer: str, batch_size: int, lr: float, seed: int, give_up_steps: int) -> Result:
        shift = {"sgd": 8.0, "lamb": 0.5}.get(optimizer, 1.0)
        octaves = math.log2(lr / (0.02 * shift * math.sqrt(batch_size / 64)))
        if octaves >= 3:
            return Result(None, math.inf)
        noise = 1 + 0.04 * ((3 * seed + round(10 * abs(octaves))) % 5)
        steps = (30 + 6400 / batch_size) * (1 + 0.3 * octaves**2) * noise
        if optimizer == "hopeless" or steps > give_up_steps:
            return Result(None, 2.5)
        return Result(steps, 2.19 - 0.001 / (1 + abs(octaves)))

    return run


@pytest.fixture
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without pictures, which take nearly all of their time; but for tests marked drawn."""
    if request.node.get_closest_marker("drawn"):
        return

    def draw(*_: object) -> dict[str, Drawn]:
        return dict.fromkeys(("curve", "learning_rate", "basins"), Drawn("", ""))

    monkeypatch.setattr("largebatch.study.report._draw", draw)
