"""The loop's body never asks the device for a number; its one reading comes a step late."""

import math
from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from largebatch.distributed.ranks import Ranks
from largebatch.optim import LAMB, LARS
from largebatch.records.step_record import StepRecord
from largebatch.records.target import Target
from largebatch.schedules import Constant, ConstantBatch, Plan
from largebatch.train.data.sampler import Sampler
from largebatch.train.engines.ddp import DDP
from largebatch.train.evaluation import Evaluation, EvaluationGrid
from largebatch.train.loop import Loop
from largebatch.train.models import MLP
from largebatch.train.noise.gradient_noise import GradientNoise
from largebatch.train.parts import Parts
from largebatch.train.progress import Evaluated, crossing
from largebatch.train.reporting.async_metrics import AsyncMetrics
from largebatch.train.reporting.reporter import NullReporter
from largebatch.train.stop_signal import Stopping
from largebatch.train.tasks.digits import Digits

ASKS = ("_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero")


class NoQuestions(TorchDispatchMode):
    """Raises where the host would have to wait for a tensor's value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ASKS:
            raise AssertionError(f"the host waits for {func}")
        return func(*args, **(kwargs or {}))


def test_the_check_itself_sees_a_question() -> None:
    with NoQuestions(), pytest.raises(AssertionError, match="the host waits"):
        bool(torch.ones(()) > 0)


class Kept(NullReporter):
    """Keeps every record."""

    def __init__(self, lines: list[dict[str, Any]]) -> None:
        self.lines = lines

    def line(self, record: StepRecord) -> None:
        self.lines.append({**record})


def make_loop(optimizer: type[Optimizer], lines: list[dict[str, Any]], steps: int = 6) -> Loop:
    torch.manual_seed(0)
    engine = DDP(MLP(64, 8, 10), Ranks(), torch.device("cpu"), micro_batch_size=16)
    task = Digits()
    return Loop(
        plan=Plan(
            ramp=ConstantBatch(size=32),
            curve=Constant(),
            budget_samples=32 * steps,
            base_lr=0.01,
            base_batch=32,
        ),
        parts=Parts(
            task,
            engine,
            optimizer(list(engine.model.named_parameters()), lr=1.0),  # type: ignore[call-arg]
        ),
        sampler=Sampler(task.num_train, 0, False),
        ranks=Ranks(),
        evaluation=Evaluation(lambda: Evaluated(math.nan), EvaluationGrid(1.0, due_at=10**9)),
        reporter=Kept(lines),
    )


@pytest.mark.parametrize("optimizer", [LARS, LAMB, torch.optim.SGD, torch.optim.AdamW])
def test_a_step_of_the_loop_asks_the_device_nothing(optimizer: type[Optimizer]) -> None:
    loop = make_loop(optimizer, [])
    for point in list(loop.plan)[:3]:
        batch = loop.take(point)
        optimized = optimizer in (LARS, LAMB)
        with NoQuestions():
            loss = loop.parts.engine.forward_backward(loop.parts.task, batch, point.batch_size)
            numbers = loop.measure(point, loss)
            if optimized:  # torch's own SGD and AdamW read their CPU step counters
                loop.send_off(point, numbers | loop.update(point.lr))
        if not optimized:
            loop.send_off(point, numbers | loop.update(point.lr))
        loop.advance(point)


@pytest.mark.parametrize("source", ["micro_batch", "example"])
def test_measuring_the_noise_scale_asks_the_device_nothing(source: str) -> None:
    loop = make_loop(LAMB, [])
    preconditioned = loop.parts.optimizer if source == "micro_batch" else None
    loop.parts.noise = GradientNoise(
        loop.parts.engine.small_gradients(source), 1000, by_layer=True, optimizer=preconditioned
    )
    loop.run()  # the second moment is there from now on
    point = loop.plan.at(0)
    loop.take(point)  # its random order of the samples is the host's
    with NoQuestions():
        loop.parts.noise.begin(0)
        batch = loop.parts.task.train_batch(loop.sampler.take(0, 32))
        loss = loop.parts.engine.forward_backward(loop.parts.task, batch, point.batch_size)
        numbers = loop.measure(point, loss)
        numbers |= loop.update(point.lr)
        loop.send_off(point, numbers)
    assert ("noise/small_preconditioned" in numbers.reduced) == (source == "micro_batch")


def test_readings_are_one_step_late_and_complete() -> None:
    readings = AsyncMetrics()
    assert readings.flush() is None
    first = torch.tensor([1.0, 2.0])
    assert readings.push({"step": 1}, ("loss", "grad_norm"), first, None) is None
    readings.annotate(eval_loss=9.0)
    line = readings.push({"step": 2}, ("loss", "grad_norm"), first + 2, None)
    assert line == {"step": 1, "eval_loss": 9.0, "loss": 1.0, "grad_norm": 2.0}
    assert readings.flush() == {"step": 2, "loss": 3.0, "grad_norm": 4.0}
    assert readings.flush() is None


def test_layer_wise_optimizers_record_their_trust_ratios() -> None:
    lines: list[dict[str, Any]] = []
    make_loop(LAMB, lines).run()
    for line in lines:
        assert 0 < line["trust_ratio_min"] <= line["trust_ratio_median"] <= line["trust_ratio_max"]
    lines.clear()
    make_loop(torch.optim.SGD, lines).run()
    assert "trust_ratio_min" not in lines[0]


def test_the_learning_rate_of_the_plan_is_the_one_that_is_used() -> None:
    loop = make_loop(torch.optim.SGD, [], steps=1)
    weights = [p.detach().clone() for p in loop.parts.engine.model.parameters()]
    torch.manual_seed(0)
    twin = MLP(64, 8, 10)
    batch = loop.parts.task.train_batch(loop.sampler.take(0, 32))
    torch.autograd.backward(loop.parts.task.loss(twin, batch))
    loop.run()
    moved = zip(loop.parts.engine.model.parameters(), weights, twin.parameters(), strict=True)
    for now, before, other in moved:
        assert other.grad is not None
        torch.testing.assert_close(now.detach(), before - 0.01 * other.grad)


def evaluated(losses: dict[int, float], within: float | None, target: float) -> list[int]:
    """The steps that a run is evaluated at whose training loss falls by 0.1 a step from 3."""
    asked: list[int] = []
    loop = make_loop(torch.optim.SGD, [], steps=20)

    def find() -> Evaluated:
        asked.append(loop.progress.steps)
        return Evaluated(losses.get(loop.progress.steps, 9.0))

    loop.evaluation = Evaluation(find, EvaluationGrid(1.0), within)
    loop.stopping = Stopping(target=Target("loss", target))
    take = loop.progress.take_loss

    def take_loss(loss: float) -> None:
        del loss
        take(3.0 - 0.1 * len(taken))
        taken.append(1)

    taken: list[int] = []
    loop.progress.take_loss = take_loss  # type: ignore[method-assign]
    loop.run()
    return asked


def test_a_run_is_evaluated_where_its_running_loss_is_near_the_target_and_at_its_end() -> None:
    everywhere = evaluated({}, None, target=2.0)
    assert everywhere == list(range(1, 21))
    near = evaluated({}, 0.5, target=2.0)
    running, expected = 3.0, []
    for step in range(1, 20):
        # What is known after a step is the loss of the one before.
        if step > 1:
            running += min(1.0, 10 / step) * (3.0 - 0.1 * (step - 2) - running)
        if step == 1 or running <= 2.5:
            expected.append(step)
    assert near == [*expected, 20]
    assert near[1] == 7  # an average with the losses at the start would say 13
    assert len(near) == 15


@pytest.mark.parametrize("target", [Target("loss", 2.0), Target("accuracy", 0.95333333, "max")])
def test_the_crossing_of_the_target_is_interpolated_between_evaluations(target: Target) -> None:
    loop = make_loop(torch.optim.SGD, [], steps=20)
    found = {4: (2.4, 0.9), 8: (1.8, 0.98)}

    def find() -> Evaluated:
        loss, accuracy = found[loop.progress.steps]
        return Evaluated(loss, {"accuracy": accuracy})

    loop.evaluation = Evaluation(find, EvaluationGrid(2.0, due_at=4))
    loop.stopping = Stopping(target=target)
    progress = loop.run()
    assert (progress.status, progress.steps) == ("reached", 8)
    # Log steps against the loss: two thirds of the way from 4 to 8.
    assert progress.crossed_at == pytest.approx(4 * 2 ** (2 / 3))


@pytest.mark.parametrize(
    ("before", "crossed_at"),
    [((None, None), 10.0), ((5, math.inf), 10.0), ((5, 2.2), 10 / 2**0.5), ((5, 1.9), 10.0)],
)
def test_a_crossing_without_an_evaluation_before_it_is_where_it_was_found(
    before: tuple[int | None, float | None], crossed_at: float
) -> None:
    assert crossing(*before, 10, 1.8, 2.0) == pytest.approx(crossed_at)
