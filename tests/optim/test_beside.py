"""Roots, bases and inverses that are made beside the steps: what the references do not show."""

import copy
import itertools
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from largebatch.optim import KFAC, SOAP, Shampoo
from largebatch.optim.math import decompositions
from largebatch.optim.math.decompositions import Beside, Decomposition
from largebatch.optim.math.matrix_roots import LEFT, Root, RootError, inverse_root

CPU = torch.device("cpu")
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "Shampoo": lambda model, **o: Shampoo(model.parameters(), precondition_interval=3, **o),
    "SOAP": lambda model, **o: SOAP(model.parameters(), precondition_interval=3, **o),
    "KFAC": lambda model, **o: KFAC(model, inverse_interval=3, **o),
}
# At an interval of 3: those at once are taken in steps 1 to 3, and what a step of these asks for
# comes into use in the next of them.
REFRESHES = (4, 7, 10, 13)
either = pytest.mark.parametrize("name", OPTIMIZERS)


@pytest.fixture(autouse=True)
def nothing_under_way() -> None:
    """What another test's last step has asked for would count as this one's."""
    for thread in threading.enumerate():
        if thread.name == "decompositions":
            thread.join()


class Trial:
    def __init__(self, name: str, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(5, 4, bias=False)
        self.optimizer = OPTIMIZERS[name](self.model, lr=0.1, refresh="beside", **options)

    def train(self, first: int, last: int) -> None:
        """Steps `first` to `last`, both included."""
        for step in range(first, last + 1):
            x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            self.model(x).tanh().square().sum(dim=1).mean().backward()
            self.optimizer.step()

    def weight(self) -> Tensor:
        return self.model.weight.detach().clone()


@either
def test_steps_wait_for_the_host_where_its_results_come_into_use(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Trial(name)
    go, made, calls = threading.Event(), decompositions._made, itertools.count()

    def holding_the_third(sent: Any) -> Any:
        """The first two are asked for in the first of the refreshes, and the next in the second."""
        if next(calls) == 2:
            go.wait()
        return made(sent)

    monkeypatch.setattr(decompositions, "_made", holding_the_third)
    held.train(1, REFRESHES[2] - 1)
    refresh = threading.Thread(target=held.train, args=(REFRESHES[2], REFRESHES[2]), daemon=True)
    refresh.start()
    refresh.join(0.5)
    waits = refresh.is_alive()
    go.set()
    refresh.join()
    assert waits
    held.train(REFRESHES[2] + 1, REFRESHES[3])
    free = Trial(name)
    free.train(1, REFRESHES[3])
    assert torch.equal(held.weight(), free.weight())


@either
def test_a_state_that_is_loaded_asks_again(name: str) -> None:
    whole, resumed = Trial(name), Trial(name)
    whole.train(1, REFRESHES[1] + 1)
    saved = copy.deepcopy(whole.optimizer.state_dict())
    resumed.train(1, 5)  # with something under way that is not what is loaded
    resumed.model.load_state_dict(whole.model.state_dict())
    resumed.optimizer.load_state_dict(saved)
    for trial in (whole, resumed):
        trial.train(REFRESHES[1] + 2, REFRESHES[3])
    assert torch.equal(resumed.weight(), whole.weight())


@either
def test_what_fails_leaves_the_last_good_one(name: str) -> None:
    trial = Trial(name)
    trial.train(1, REFRESHES[1])
    saved = trial.optimizer.state_dict()
    (asked,) = [key for key in saved["state"][0] if key.endswith(("asked_0", "asked_in"))]
    saved["state"][0][asked].fill_(torch.nan)
    trial.optimizer.load_state_dict(saved)
    trial.train(REFRESHES[1] + 1, REFRESHES[2] - 1)
    assert not trial.optimizer.failures.total
    trial.train(REFRESHES[2], REFRESHES[3])
    assert trial.optimizer.failures.total.total() == 1
    assert bool(trial.weight().isfinite().all())


@either
def test_another_word_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="refresh must be one of 'in_step', 'beside', got 'late'"):
        OPTIMIZERS[name](nn.Linear(2, 2), lr=0.1, refresh="late")


def of(matrix: Tensor, compute: Callable[..., Any]) -> list[Decomposition[Any]]:
    return [Decomposition(compute, lambda: [matrix], matrix.device)]


def test_a_thread_changes_no_setting_of_the_process() -> None:
    """A forward pass that lasts as long would multiply in another precision."""
    seen: list[tuple[str, str, torch.dtype]] = []
    inner = torch.get_float32_matmul_precision

    def root(matrix: Tensor) -> Root:
        found = inverse_root(matrix, 4.0)
        seen.append((threading.current_thread().name, inner(), matrix.dtype))
        return found

    matrix = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    torch.set_float32_matmul_precision("medium")
    changes: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_float32_matmul_precision", changes.append)
        beside = Beside()
        beside.begin("one", of(matrix, root))
        (outcome,) = beside.take("one", of(matrix, root))
    torch.set_float32_matmul_precision("highest")
    ((thread, precision, dtype),) = seen
    assert thread.startswith("decompositions")
    assert (precision, dtype, changes) == ("medium", torch.float64, [])
    assert outcome().matrix.dtype == torch.float32
    expected = inverse_root(matrix.double(), 4.0).matrix
    torch.testing.assert_close(outcome().matrix, expected.float(), rtol=0, atol=0)


@pytest.mark.parametrize("scale", [0.0, 1e-37])
def test_what_fp32_takes_for_zero_is_zero(scale: float) -> None:
    matrix = scale * torch.ones(2, 2)
    (outcome,) = Beside().take("one", of(matrix, lambda m: inverse_root(m, 2.0)))
    assert torch.equal(outcome().matrix, torch.eye(2))


def test_numbers_that_fp32_does_not_hold_are_a_failure() -> None:
    matrix = 1e-35 * torch.eye(2)
    (outcome,) = Beside().take("one", of(matrix, lambda m: inverse_root(m, 0.5)))
    with pytest.raises(RootError) as caught:
        outcome()
    assert caught.value.reason == LEFT


def test_a_process_that_ends_leaves_unmade_what_has_not_begun() -> None:
    """A job that is told to stop has no time for it."""
    program = """
import time, torch
from largebatch.optim.math.decompositions import Beside, Decomposition
from largebatch.optim.math.matrix_roots import Root
def compute(matrix):
    print("made", flush=True)
    time.sleep(0.5)
    return Root(matrix, matrix[0, 0])
beside, matrix = Beside(), torch.eye(2)
for number in range(40):
    beside.begin(number, [Decomposition(compute, lambda: [matrix], matrix.device)])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert 0 <= done.stdout.count("made") <= 3
