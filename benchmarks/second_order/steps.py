"""Training steps that are alike but for the optimizer, and what each of them costs.

Every row steps a model of its own from the same start, over the same samples. Learning rates are
small, so that weights stay about where they are over the steps of a benchmark.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from largebatch.benchmarks import harness
from largebatch.benchmarks.contenders import REFERENCE
from largebatch.benchmarks.workloads import Decoding, Workload
from largebatch.distributed.ranks import Ranks
from largebatch.optim import KFAC, SOAP, Shampoo
from largebatch.train.data.sampler import Sampler
from largebatch.train.tasks import to_device

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LR: Final = 1e-5


# Of a model, the steps from roots to roots of a factor, and the ranks that share the work out.
Make = Callable[[nn.Module, int, "ProcessGroup | None"], Optimizer]
ROWS: Final[dict[str, Make]] = {
    REFERENCE: lambda model, interval, group: AdamW(model.parameters(), lr=LR, fused=True),
    "Shampoo": lambda model, interval, group: Shampoo(
        model.parameters(), LR, precondition_interval=interval, process_group=group
    ),
    "SOAP": lambda model, interval, group: SOAP(
        model.parameters(), LR, precondition_interval=interval, process_group=group
    ),
    "K-FAC": lambda model, interval, group: KFAC(
        model, LR, inverse_interval=interval, process_group=group
    ),
}


class SecondOrderStepper:
    """A model that one optimizer steps; under DDP, on this rank's share of the batch.

    A training step is `take`, `backward` and `step`, in this order.
    """

    def __init__(
        self, make: Make, interval: int, workload: Workload, ranks: Ranks, device: torch.device
    ) -> None:
        torch.manual_seed(0)
        self._task, model = workload.task(), workload.model().to(device)
        self._device, self._ranks = device, ranks
        self._share = workload.batch_size // ranks.size
        self._items = self._share * (workload.places if isinstance(workload, Decoding) else 1)
        self._sampler = Sampler(self._task.num_train, 0, self._task.replacement)
        self._position = 0
        self._model, group = model, None
        if ranks.size > 1:
            self._model, group = DistributedDataParallel(model), dist.group.WORLD
        self.optimizer = make(self._model, interval, group)

    def take(self) -> None:
        """The next batch, of no cost to the step."""
        first = self._position + self._ranks.rank * self._share
        indices = self._sampler.take(first, self._share)
        self._batch = to_device(self._task.train_batch(indices), self._device)
        self._position += self._share * self._ranks.size

    def backward(self) -> None:
        """From no gradient to that of the mean loss over all ranks' samples."""
        self.optimizer.zero_grad()
        if isinstance(self.optimizer, KFAC):
            self.optimizer.items(self._items)
        torch.autograd.backward(self._task.loss(self._model, self._batch))

    def step(self) -> None:
        self.optimizer.step()

    def state_bytes(self) -> dict[str, int]:
        """Of every tensor in `optimizer.state` on this rank, by parameter and key."""
        params: list[Tensor] = [*self._model.parameters()]
        places = {param: place for place, param in enumerate(params)}
        return {
            f"{places[param]}/{key}": value.numel() * value.element_size()
            for param, state in self.optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }


@dataclass
class StepSamples:
    """What was seen of one row, seconds where nothing else is said, one entry a round."""

    steps: list[float] = field(default_factory=list)
    """Of `optimizer.step()`."""
    work: list[float] = field(default_factory=list)
    """Of processor time in it, of all threads of this process."""
    wholes: list[float] = field(default_factory=list)
    """Of forward pass, backward pass and `optimizer.step()`."""
    early: list[float] = field(default_factory=list)
    """Of the steps before the first round."""
    traffic: list[tuple[int, int]] = field(default_factory=list)
    """Collectives and bytes of those steps, but for the first, which makes the state."""

    def __len__(self) -> int:
        return len(self.steps)


def run_rounds(
    steppers: dict[str, SecondOrderStepper],
    interval: int,
    device: torch.device,
    seconds: float,
    note: harness.Note,
) -> dict[str, StepSamples]:
    """Rounds over whole intervals, after one interval that is only part of `early`, by row."""
    samples = {name: StepSamples() for name in steppers}

    def of_rows(call: Callable[[SecondOrderStepper, StepSamples, torch.device], None]) -> Any:
        return {name: partial(call, each, samples[name], device) for name, each in steppers.items()}

    harness.run_rounds(
        of_rows(one_round),
        seconds,
        note,
        num_warm_up=max(harness.NUM_WARM_UP, interval),
        interval=interval,
        warm_up=of_rows(warm_up),
    )
    return samples


def warm_up(stepper: SecondOrderStepper, samples: StepSamples, device: torch.device) -> None:
    is_first = not samples.early
    stepper.take()
    stepper.backward()
    harness.wait_for_ranks()
    seen = harness.Traffic()
    with seen if dist.is_initialized() else nullcontext():  # it costs time in every operation
        samples.early.append(harness.timed(stepper.step, device))
    if not is_first:
        sent = sum(num_bytes for _, num_bytes, _ in seen.collectives)
        samples.traffic.append((len(seen.collectives), sent))


def one_round(stepper: SecondOrderStepper, samples: StepSamples, device: torch.device) -> None:
    stepper.take()
    backward, _ = harness.timed_on_ranks(stepper.backward, device)
    step, work = harness.timed_on_ranks(stepper.step, device)
    samples.work.append(work)
    samples.steps.append(step)
    samples.wholes.append(backward + step)
