"""`largebatch bench loop`: both loops make the same run."""

import pytest
import torch

from largebatch.benchmarks import loop
from largebatch.benchmarks.workloads import Bytewise


@pytest.mark.parametrize("optimizer", loop.OPTIMIZERS)
def test_the_bare_loop_takes_the_steps_of_the_loop(optimizer: str) -> None:
    workload, make, device = Bytewise(16), loop.OPTIMIZERS[optimizer], torch.device("cpu")
    ended = []
    for call in (loop.bare, loop.looped):
        parts = loop.parts_of(workload, make, device)
        with call(parts, workload.batch_size, 5, None) as steps:
            steps()
        ended.append(parts.engine.model.state_dict())
    bare, looped = ended
    assert all(torch.equal(bare[name], looped[name]) for name in bare)
    first = workload.model().state_dict()
    assert not any(torch.equal(bare[name], first[name]) for name in bare)


def test_each_kind_of_loop_is_timed() -> None:
    make = loop.OPTIMIZERS["LAMB"]
    rows = loop.rows_of(Bytewise(16), make, 3, torch.device("cpu"), 0.0, lambda *_: None)
    assert list(rows) == ["bare", "loop", "bare, evaluated", "loop, evaluated"]
    assert rows["bare"]["ratio"] == 1.0
    assert rows["bare, evaluated"]["added_seconds"] == 0.0
