"""Timing in interleaved rounds: A B C, A B C, …, so that what slows the machine slows them all.

A sample is one call of `optimizer.step()`, from an idle device to an idle device. Before each,
outside of what is timed, the gradients are written anew: some optimizers change them.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch.nn import Parameter

from largebatch.benchmarks.contenders import Contender
from largebatch.benchmarks.inventories import Inventory

NUM_WARM_UP: Final = 2  # the first step makes the state
FEWEST_ROUNDS: Final = 3
MEMORY_BYTES: Final = (
    2**28
)  # moved by one sample of the memory's speed, far more than a cache holds


@dataclass(frozen=True)
class Rounds:
    """Seconds of every sample: a list for each contender, one entry a round."""

    steps: dict[str, list[float]]
    scalings: list[float]
    """Of reading and writing MEMORY_BYTES / 2 in place, as optimizers write."""
    copies: list[float]
    """Of copying MEMORY_BYTES / 2. That a CPU first reads what it overwrites is not counted."""

    def __len__(self) -> int:
        return len(self.copies)


class Tensors:
    """Weights that all optimizers step in turn, and the gradients that each of them finds."""

    def __init__(self, inventory: Inventory, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(shape, generator=generator) for shape in inventory.shapes]
        self.params = [Parameter(0.02 * values.to(device)) for values in drawn]
        self._grads = [1e-3 * values.flip(0).to(device) for values in drawn]
        for param, grad in zip(self.params, self._grads, strict=True):
            param.grad = grad.clone()

    @torch.no_grad()
    def write_grads(self) -> None:
        for param, grad in zip(self.params, self._grads, strict=True):
            assert param.grad is not None
            param.grad.copy_(grad)


def run_rounds(
    inventory: Inventory,
    contenders: Sequence[Contender],
    device: torch.device,
    seconds: float,
    progress: Callable[[float, str], None],
) -> Rounds:
    """As many rounds as fit into `seconds`, warm-up included, but never less than FEWEST_ROUNDS.

    `progress(elapsed seconds, what runs)` is called before each contender.
    """
    began = time.perf_counter()
    tensors = Tensors(inventory, device)
    optimizers = {row.name: row.make(tensors.params) for row in contenders}
    memory = torch.ones(MEMORY_BYTES // 8, device=device)
    target = torch.ones_like(memory)

    def one_step(name: str, stage: str) -> float:
        progress(time.perf_counter() - began, f"{inventory.name}: {stage}, {name}")
        tensors.write_grads()
        return timed(optimizers[name].step, device)

    rounds = Rounds({name: [] for name in optimizers}, [], [])
    for _ in range(NUM_WARM_UP):
        for name in optimizers:
            one_step(name, "warm-up")
        timed(lambda: (memory.mul_(1.0), target.copy_(memory)), device)
    while len(rounds) < FEWEST_ROUNDS or time.perf_counter() - began < seconds:
        stage = f"round {len(rounds) + 1}"
        for name, samples in rounds.steps.items():
            samples.append(one_step(name, stage))
        rounds.scalings.append(timed(lambda: memory.mul_(1.0), device))
        rounds.copies.append(timed(lambda: target.copy_(memory), device))
    return rounds


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of `work`, what it left on the device's queue included."""
    wait_for(device)
    began = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - began


def wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
