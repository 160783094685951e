"""K-FAC on a small network of every kind of layer, spread over ranks in several ways."""

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gloo_ranks import Outcome, one_thread
from parity_layouts import LAYOUTS, Network, like, whole
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.functional import cross_entropy, linear

from largebatch.optim import KFAC
from largebatch.optim.math.matrix_roots import RootError
from largebatch.optim.sharding.layout import local

NUM_STEPS = 8
BATCH_SIZE = 16  # samples, over all ranks
CONTEXT = 6

FACTORS = ("factor_in", "factor_out")
ROWS: dict[str, dict[str, Any]] = {
    # But for the interval: in the steps of a cell each layer has several turns.
    "defaults": {"inverse_interval": 3},
    "ridge": {"inverse_interval": 3, "ridge": 1e-4},
    "eigen": {
        "form": "factored_eigen",
        "damping": 1e-4,
        "graft": "sgd",
        "weight_decay": 0.1,
        "inverse_interval": 3,
    },
    "exact": {"form": "exact", "inverse_interval": 1, "kl_clip": 1e-3, "rule": "sgd"},
    "diagonal": {
        **{"max_factor_size": 8, "factor_interval": 2, "inverse_interval": 3},
        "refresh": "beside",
    },
}


class Model(nn.Module):
    """(samples, CONTEXT) indices below 11 to 3 logits; few of its sizes divide by 2, 3 or 4."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 5)
        self.conv = nn.Conv1d(5, 6, 3, padding="same")
        self.grouped = nn.Conv1d(6, 9, 2, groups=3, stride=2)
        self.norm = nn.LayerNorm(9)
        self.over_positions = nn.Linear(9, 7)
        self.head = nn.Linear(7, 3, bias=False)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(self.embedding(x).mT))
        h = self.norm(torch.tanh(self.grouped(h)).mT)  # (samples, 3, 9)
        return self.head(torch.tanh(self.over_positions(h)).mean(dim=1))


def data(number: int, repeated: int = 1) -> tuple[Tensor, Tensor]:
    """A step's batch; the label follows from the sum of the inputs."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randint(0, 11, (BATCH_SIZE, CONTEXT), generator=generator)
    return x.repeat(repeated, 1), (x.sum(dim=1) % 3).repeat(repeated)


@dataclass(frozen=True)
class Cell:
    layout: str
    world_size: int
    row: str
    dtype: torch.dtype = torch.float32
    passes: tuple[int, ...] = ()
    """Sizes of the micro-batches into which a rank's share is cut; (): one."""

    def __str__(self) -> str:
        return "/".join(map(str, (self.layout, self.world_size, self.row, self.dtype, self.passes)))

    @property
    def alone(self) -> "Cell":
        return Cell("one-process", 1, self.row, self.dtype)


@dataclass
class Run:
    cell: Cell
    options: dict[str, Any] = field(default_factory=dict)
    network: type["Model"] = Model
    model: nn.Module = field(init=False)
    optimizer: KFAC = field(init=False)

    def __post_init__(self) -> None:
        layout = LAYOUTS[self.cell.layout]
        self.model = self.network(self.cell.dtype)
        self.module = layout.spread(self.model)
        options = {"lr": 0.02, **ROWS[self.cell.row], **self.options}
        if self.cell.layout != "DDP":
            self.optimizer = KFAC(self.model, **options)
        elif self.cell.row == "eigen":  # which knows its group
            self.optimizer = KFAC(self.module, **options)
        else:
            self.optimizer = KFAC(self.model, process_group=dist.group.WORLD, **options)

    def micro_batches(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        mine = LAYOUTS[self.cell.layout].share()
        x, y = x[mine], y[mine]
        sizes = self.cell.passes or (len(x),)
        assert sum(sizes) == len(x)
        yield from zip(x.split(sizes), y.split(sizes), strict=True)

    def backward(self, x: Tensor, y: Tensor) -> None:
        """Passes scaled such that the average over ranks is the mean over all samples."""
        for part_x, part_y in self.micro_batches(x, y):
            share = len(part_x) / len(x) * self.cell.world_size
            (cross_entropy(self.module(part_x), part_y) * share).backward()

    def train(self, first: int, last: int) -> None:
        for number in range(first, last):
            self.backward(*data(number))
            self.optimizer.step()
            self.optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """Copies of every parameter, and of all state in the form in which it is saved; whole."""
        return {name: whole(tensor).clone() for name, tensor in self.parts().items()}

    def parts(self) -> dict[str, Tensor]:
        """The same themselves, as this rank has them."""
        tensors = {name: param.detach() for name, param in self.model.named_parameters()}
        names = [name for group in self.optimizer.param_groups for name in group["param_names"]]
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"{names[index]}/{key}": value for key, value in state.items()}
        return tensors

    def outcome(self) -> Outcome:
        stats, tensors = self.optimizer.layer_stats(), self.parts()
        return {
            "names": [*tensors],
            "weights": {name: whole(t).clone() for name, t in tensors.items() if "/" not in name},
            "stats": {name: torch.stack([*v.values()]).double() for name, v in stats.items()},
            "memory": sum(
                state[key].numel()
                for state in self.optimizer.state.values()
                for key in FACTORS
                if key in state
            ),
        }


def train(cell: Cell) -> Outcome:
    run = Run(cell)
    counts = []
    for number in range(NUM_STEPS):
        run.backward(*data(number))
        with (
            mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as ways,
            mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as sums,
        ):
            run.optimizer.step()
        counts.append(ways.call_count + sums.call_count)
        run.optimizer.zero_grad()
    return {**run.outcome(), "collectives": counts}


def train_alone(cell: Cell) -> Outcome:
    with one_thread():
        return train(cell.alone)


@dataclass(frozen=True)
class Repetition:
    """One step on the same data repeated, and split in several ways."""

    cell: Cell
    repeated: int

    def __str__(self) -> str:
        return f"{self.cell}/{self.repeated}"


def preconditioned(job: Repetition) -> Outcome:
    """The preconditioned gradient of every layer: what the rule "sgd" has in its empty buffer.

    In FP32 it is the gradient of the data unrepeated that is preconditioned: autograd's own of
    2,048 equal samples differs by 1e-5 from that of 16, as the rounding of equal summands adds up.
    """
    run = Run(job.cell, {"rule": "sgd", "graft": "none"})
    run.backward(*data(0, job.repeated))
    if job.cell.dtype == torch.float32:
        alone, (x, y) = Model(job.cell.dtype), data(0)
        cross_entropy(alone(x), y).backward()
        for param, other in zip(run.model.parameters(), alone.parameters(), strict=True):
            param.grad = like(param, other.grad)
    run.optimizer.step()
    buffers = {
        name: run.optimizer.state[param]["momentum_buffer"]
        for name, param in run.model.named_parameters()
        if "norm" not in name
    }
    return {name: whole(buffer) for name, buffer in buffers.items()}


@dataclass(frozen=True)
class Leg:
    """A part of a training that goes on in another layout and world size."""

    cell: Cell
    first: int
    last: int
    loads: Path | None
    saves: Path | None

    def __str__(self) -> str:
        return f"{self.cell}/{self.first}-{self.last}"


def travel(leg: Leg) -> Outcome:
    run = Run(leg.cell)
    if leg.loads is not None:
        saved = checkpoint_of(run)
        dcp.load(saved, checkpoint_id=leg.loads, no_dist=not dist.is_initialized())
        set_model_state_dict(run.model, saved["model"])
        set_optimizer_state_dict(run.model, run.optimizer, saved["optimizer"])
    run.train(leg.first, leg.last)
    if leg.saves is None:
        return run.outcome()
    dcp.save(checkpoint_of(run), checkpoint_id=leg.saves, no_dist=not dist.is_initialized())
    return {}


def checkpoint_of(run: Run) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(run.model),
        "optimizer": get_optimizer_state_dict(run.model, run.optimizer),
    }


def skipped(cell: Cell) -> Outcome:
    """Of three steps the second is not finite, as one rank alone says. What is left of it?"""
    run = Run(cell)
    last = cell.world_size - 1
    unchanged = True
    for number, bad in enumerate((False, True, False)):
        before = {n: local(t).clone() for n, t in run.parts().items()} if bad else {}
        run.backward(*data(number))
        sees = not dist.is_initialized() or dist.get_rank() == last
        if bad:
            for param in run.model.parameters():
                param.grad.mul_(float("nan"))
        run.optimizer.found_inf = torch.full((), float(bad and sees))
        run.optimizer.grad_scale = torch.ones(())
        run.optimizer.step()
        run.optimizer.zero_grad()
        if bad:
            after = {name: local(tensor) for name, tensor in run.parts().items()}
            unchanged = before.keys() == after.keys()
            unchanged &= all(torch.equal(before[name], after[name]) for name in before)
    return {**run.outcome(), "unchanged": unchanged}


def fisher_pass(cell: Cell) -> Outcome:
    """Three steps with the true Fisher, its labels given so that they are alike on all ranks."""
    run = Run(cell, {"fisher": "true"})
    for number in range(3):
        x, y = data(number)
        for part_x, part_y in run.micro_batches(x, y):
            share = len(part_x) / len(x) * cell.world_size
            logits = run.module(part_x)
            run.optimizer.fisher_backward(cross_entropy(logits, (part_y + 1) % 3) * share)
            (cross_entropy(logits, part_y) * share).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    return run.outcome()


@dataclass(frozen=True)
class Refused:
    """What is said to plain parameters without a group, and to tensor parallelism."""

    cell: Cell


@dataclass(frozen=True)
class Tied:
    """The last rank alone uses a layer's weight without its module too."""

    cell: Cell


@dataclass(frozen=True)
class Failing:
    """The factors of one layer are not finite where they lie, from the second step on."""

    cell: Cell


@dataclass(frozen=True)
class Task:
    """A job, and what does it."""

    work: Callable[[Any], Outcome]
    job: Any

    @property
    def world_size(self) -> int:
        return getattr(self.job, "cell", self.job).world_size

    def __str__(self) -> str:
        return f"{self.work.__name__} {self.job}"


def do(task: Task) -> Outcome:
    return task.work(task.job)


def say(job: Refused | Tied | Failing) -> Outcome:
    match job:
        case Refused():
            return refused(job.cell)
        case Tied():
            return tied(job.cell)
        case Failing():
            return fail(job.cell)


def refused(cell: Cell) -> Outcome:
    said = {}
    try:
        KFAC(Model(cell.dtype), lr=0.1)
    except ValueError as error:
        said["plain"] = str(error)
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    KFAC(Model(cell.dtype), lr=0.1, process_group=alone)
    model = LAYOUTS["TP"].spread(Network(cell.dtype))
    optimizer = KFAC(model, lr=0.1, process_group=alone)
    try:
        model(torch.zeros(2, 8, dtype=cell.dtype))
    except RuntimeError as error:
        said["parallel"] = str(error)
    del optimizer
    return said


class Again(Model):
    """Uses a weight by hand."""

    by_hand = True

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if not self.by_hand:
            return out
        return out + linear(self.embedding(x), self.embedding.weight).mean() * 0.1


def tied(cell: Cell) -> Outcome:
    """Which layers have curvature, what was warned, and whether a run goes on from what it saved as
    if it had not."""
    run = Run(cell, network=Again)
    run.model.by_hand = dist.get_rank() + 1 == dist.get_world_size()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train(0, 2)
    saved = copy.deepcopy(run.optimizer.state_dict())
    begun = [param.detach().clone() for param in run.model.parameters()]
    run.train(2, 4)
    wanted = [local(param.detach()).clone() for param in run.model.parameters()]
    watched = run.module if cell.layout == "DDP" else run.model
    run.optimizer = KFAC(watched, lr=0.02, **ROWS[cell.row])
    run.optimizer.load_state_dict(saved)
    with torch.no_grad():
        for param, value in zip(run.model.parameters(), begun, strict=True):
            param.copy_(value)
    run.train(2, 4)
    pairs = zip(run.model.parameters(), wanted, strict=True)
    return {
        "curved": sorted(run.optimizer.layer_stats()),
        "warned": [str(w.message) for w in caught if "fallback" in str(w.message)],
        "goes on": all(torch.equal(local(param.detach()), value) for param, value in pairs),
    }


def fail(cell: Cell) -> Outcome:
    """At which step the rank has raised, and what; it goes on until all have had the time to."""
    run, raised = Run(cell), []
    weight = run.model.get_parameter("over_positions.weight")
    for number in range(8):
        run.backward(*data(number))
        if number >= 1:
            run.optimizer.state[weight]["factor_in"].fill_(float("nan"))
        try:
            run.optimizer.step()
        except RootError as error:
            raised.append((number, str(error)))
        run.optimizer.zero_grad()
    return {"raised": raised}
