"""One small model trained by a second-order optimizer on ranks that share it in several ways."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gloo_ranks import Outcome, one_thread
from parity_layouts import LAYOUTS, Network, like, local, shard_key, whole
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from largebatch.optim import SOAP, Mano, Muon, Shampoo, SOAPMuon, param_groups
from largebatch.optim.math.matrix_roots import RootError

NUM_STEPS = 10
BATCH_SIZE = 16  # samples, over all ranks

# Blocks of at most 6 cut most tensors, so that ranks own parts of the same ones. In the steps of a
# cell each block has its turn in a first interval and in a second, and a third has begun. The
# learning rate and all else are the defaults.
BLOCKS = {"block_size": 6, "precondition_interval": 4}
FAR_FROM_DEFAULT = {
    "block_size": 6,
    "betas": (0.0, 0.9),
    "factor_beta": 1.0,
    "grafting": "adagrad",
    "precondition_interval": 3,
    "refresh": "beside",
    "start_preconditioning_step": 3,
    "momentum": 0.5,
    "nesterov": True,
    "weight_decay": 0.1,
    "decay": "l2",
}
# Its matrices lie across shards, as those of a fused tensor and of a stack do.
MUON = {"ns_precision": "fp32", "weight_decay": 0.1, "lr": 0.003, "adamw_lr_ratio": 0.5}
SPLITS = {"qkv": 3, "cube": 3}
ROWS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "Shampoo": (Shampoo, BLOCKS),
    "Shampoo-1e-4": (Shampoo, BLOCKS | {"ridge": 1e-4}),
    "Shampoo-far": (Shampoo, FAR_FROM_DEFAULT),
    "Shampoo-one-sided": (Shampoo, BLOCKS | {"max_preconditioner_dim": 10}),
    "SOAP": (SOAP, BLOCKS),
    "SOAP-often": (SOAP, BLOCKS | {"precondition_interval": 1, "weight_decay": 0.1}),
    "Muon": (Muon, MUON),
    "Muon-sphere": (Muon, MUON | {"hyperball": True, "weight_decay": 0.0}),
    "SOAP-Muon": (SOAPMuon, MUON),
    "Mano": (Mano, {"weight_decay": 0.1, "lr": 0.003, "nesterov": True}),
}


class Model(Network):
    """With a tensor of three dimensions, the first of them too short for four ranks."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.cube = nn.Parameter((torch.randn(3, 7, 7) / 3).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        h = torch.einsum("bi,kij->bj", self.down(torch.tanh(self.up(h))), self.cube)
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        h = h + q * torch.sigmoid(k) + v
        return self.head(torch.tanh((h * self.frozen) @ self.kv)) * self.temperature


@dataclass(frozen=True)
class Cell:
    layout: str
    world_size: int
    row: str
    dtype: torch.dtype = torch.float32
    steps: int = NUM_STEPS

    def __str__(self) -> str:
        return f"{self.layout}/{self.world_size}/{self.row}/{self.dtype}/{self.steps}"

    @property
    def alone(self) -> "Cell":
        return Cell("one-process", 1, self.row, self.dtype, self.steps)


@dataclass
class Run:
    """A model spread as the cell says, trained through batches of which each rank has a part.

    "DDP+group" is DDP whose ranks share the work.
    """

    cell: Cell
    model: nn.Module = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.layout = LAYOUTS[self.cell.layout.removesuffix("+group")]
        self.model = Model(self.cell.dtype)
        self.model.unused.requires_grad_(False)  # torch wants state for every other parameter
        self.module = self.layout.spread(self.model)
        kind, options = ROWS[self.cell.row]
        if self.cell.layout.endswith("+group"):
            options = options | {"process_group": dist.group.WORLD}
        given: Any = self.model.named_parameters()
        if kind in (Muon, SOAPMuon, Mano):
            groups = param_groups(self.model, no_decay=(), no_adapt=(), norm_groups=SPLITS)
            given, options = self.model, options | {"groups": groups}
        self.optimizer = kind(given, **options)

    def backward(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(BATCH_SIZE, 8, dtype=torch.float64, generator=generator).to(self.cell.dtype)
        target = x.sin().sum(dim=1, keepdim=True)
        mine = self.layout.share()
        nn.functional.mse_loss(self.module(x[mine]), target[mine]).backward()

    def train(self, first: int, last: int) -> None:
        for number in range(first, last):
            self.backward(number)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter, and all state in the form in which it is saved."""
        tensors = {name: param.detach() for name, param in self.model.named_parameters()}
        names = [name for group in self.optimizer.param_groups for name in group["param_names"]]
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"{names[index]}/{key}": value for key, value in state.items()}
        return tensors

    def outcome(self, *, with_state: bool = False) -> Outcome:
        """What has come of it; tensors of the state that are sharded only where they are asked for,
        as each takes a collective to become whole."""
        tensors = self.tensors()
        stats = self.optimizer.layer_stats()
        return {
            "names": [*tensors],
            "tensors": {
                name: whole(tensor).clone()
                for name, tensor in tensors.items()
                if with_state or "/" not in name or not isinstance(tensor, DTensor)
            },
            "copies": {name: (shard_key(t), local(t).clone()) for name, t in tensors.items()},
            "stats": {name: torch.stack([*v.values()]).double() for name, v in stats.items()},
            "memory": sum(
                value.numel()
                for state in self.optimizer.state.values()
                for key, value in state.items()
                if key.startswith("block_")
            ),
        }


def train(cell: Cell) -> Outcome:
    run = Run(cell)
    with (
        mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as ways,
        mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as sums,
    ):
        run.train(0, cell.steps)
        calls = ways.call_count + sums.call_count
    return {**run.outcome(), "collectives": calls}


def train_alone(cell: Cell) -> Outcome:
    with one_thread():
        return train(cell.alone)


# One step from a common state ---------------------------------------------------------------------


@dataclass(frozen=True)
class CommonState:
    cell: Cell
    """What has trained alone for the cell's steps is loaded by the ranks, who take one more."""
    saved: Path

    def __str__(self) -> str:
        return f"common/{self.cell}"


def begin_alone(job: CommonState) -> Outcome:
    """Train alone, save weights and state, and take the step that the ranks will take."""
    with one_thread():
        run = Run(job.cell.alone)
        run.train(0, job.cell.steps)
        torch.save(checkpoint_of(run), job.saved)
        one_given_step(run)
        return run.outcome()


def go_on_together(job: CommonState) -> Outcome:
    """The state is whole tensors here, which every rank has."""
    saved, run = torch.load(job.saved), Run(job.cell)
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(run.model, saved["model"], options=options)
    set_optimizer_state_dict(run.model, run.optimizer, saved["optimizer"], options=options)
    one_given_step(run)
    return run.outcome()


def one_given_step(run: Run) -> None:
    """With a gradient of the same bits everywhere: in the null space of a factor SOAP makes steps
    of full length of the rounding in which gradients of other summation orders differ."""
    give_gradients(run, 99)
    run.optimizer.step()


# Training handed on -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Route:
    """Layouts and world sizes that train one after the other, so many steps each."""

    legs: tuple[tuple[str, int], ...]
    row: str
    given: bool = False
    """Steps with gradients of the same bits in all layouts, in place of training; see
    `one_given_step`."""
    leg_steps: int = 4

    def __str__(self) -> str:
        return "/".join((*(f"{layout}{size}" for layout, size in self.legs), self.row))

    def cell(self, leg: int) -> Cell:
        return Cell(*self.legs[leg], self.row, torch.float64, self.leg_steps * len(self.legs))


@dataclass(frozen=True)
class Leg:
    route: Route
    number: int
    folder: Path

    def __str__(self) -> str:
        return f"leg{self.number}/{self.route}"


def travel(leg: Leg) -> Outcome:
    """Take over what the leg before has saved, train on, and save for the next."""
    run, route = Run(leg.route.cell(leg.number)), leg.route
    if leg.number > 0:
        checkpoint = checkpoint_of(run)
        before = leg.folder / f"{leg.number - 1}"
        dcp.load(checkpoint, checkpoint_id=before, no_dist=not dist.is_initialized())
        set_model_state_dict(run.model, checkpoint["model"])
        set_optimizer_state_dict(run.model, run.optimizer, checkpoint["optimizer"])
    take_leg(run, route, leg.number)
    if leg.number + 1 < len(route.legs):
        dcp.save(checkpoint_of(run), checkpoint_id=leg.folder / f"{leg.number}")
        return {}
    return run.outcome(with_state=True)


def uninterrupted(route: Route) -> Outcome:
    run = Run(route.cell(0).alone)
    for number in range(len(route.legs)):
        take_leg(run, route, number)
    return run.outcome(with_state=True)


def take_leg(run: Run, route: Route, number: int) -> None:
    for step in range(number * route.leg_steps, (number + 1) * route.leg_steps):
        if route.given:
            give_gradients(run, step)
            run.optimizer.step()
            run.optimizer.zero_grad()
        else:
            run.train(step, step + 1)


def checkpoint_of(run: Run) -> Outcome:
    return {
        "model": get_model_state_dict(run.model),
        "optimizer": get_optimizer_state_dict(run.model, run.optimizer),
    }


# The forms of torch's state dicts ---------------------------------------------------------------


@dataclass(frozen=True)
class Forms:
    cell: Cell
    folder: Path

    def __str__(self) -> str:
        return f"forms/{self.cell}"


def change_form(job: Forms) -> Outcome:
    """State saved and loaded in each form that torch has; whether it came back as it was."""
    run = Run(job.cell)
    run.train(0, job.cell.steps)
    before = {name: local(tensor) for name, tensor in run.tensors().items() if "/" in name}

    def came_back(saved: Outcome, options: StateDictOptions) -> bool:
        fresh = Run(job.cell)
        set_optimizer_state_dict(fresh.model, fresh.optimizer, saved, options=options)
        after = {name: local(tensor) for name, tensor in fresh.tensors().items() if "/" in name}
        return after.keys() == before.keys() and all(
            torch.equal(after[name], before[name]) for name in before
        )

    flattened = StateDictOptions(flatten_optimizer_state_dict=True)
    saved = get_optimizer_state_dict(run.model, run.optimizer, options=flattened)
    dcp.save(saved, checkpoint_id=job.folder)
    fresh = Run(job.cell)
    loaded = get_optimizer_state_dict(fresh.model, fresh.optimizer, options=flattened)
    dcp.load(loaded, checkpoint_id=job.folder)
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    on_first = get_optimizer_state_dict(run.model, run.optimizer, options=full)
    names = {f"{n}/{key}" for n, state in on_first.get("state", {}).items() for key in state}
    broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    return {
        "flattened": came_back(loaded, flattened),
        "full": names == set(before) if dist.get_rank() == 0 else not names,
        "broadcast": came_back(on_first, broadcast),
    }


# Gradients that are missing or not finite ---------------------------------------------------------


@dataclass(frozen=True)
class Trouble:
    """Three steps with given gradients. In the middle one something is wrong on the last rank."""

    cell: Cell
    what: str
    """missing: it has no gradient of `kv`, `norm.bias`, `cube`, and no rank has of `down.weight`;
    inf: its gradients are not finite, and it alone has found so; skipped: no middle step."""

    def __str__(self) -> str:
        return f"{self.what}/{self.cell}"


MISSING_THERE = ("kv", "norm.bias", "cube")
MISSING_EVERYWHERE = "down.weight"


def stumble(job: Trouble) -> Outcome:
    run = Run(job.cell)
    together = dist.is_initialized()
    last = not together or dist.get_rank() == dist.get_world_size() - 1
    amp = job.what in ("inf", "skipped")
    for number in range(3):
        if number == 1 and job.what == "skipped":
            continue
        give_gradients(run, number, scale=8.0 if amp else 1.0)
        run.optimizer.grad_scale = torch.tensor(8.0) if amp else None
        run.optimizer.found_inf = torch.tensor([0.0]) if amp else None
        for name, param in run.model.named_parameters():
            if number != 1 or not param.requires_grad:
                continue
            if job.what == "missing" and name == MISSING_EVERYWHERE:
                param.grad = None
            elif job.what == "missing" and name in MISSING_THERE and last:
                lose(param, together)
            elif job.what == "inf" and last:
                local(param.grad).fill_(float("nan"))
        if number == 1 and job.what == "inf" and last:
            run.optimizer.found_inf.fill_(1.0)
        run.optimizer.step()
    return run.outcome(with_state=amp)


@dataclass(frozen=True)
class Failing:
    """The factors of one layer are not finite from the second step on."""

    cell: Cell

    def __str__(self) -> str:
        return f"failing/{self.cell}"


def fail(job: Failing) -> Outcome:
    """At which step the rank has raised, and what; it goes on until all have had the time to."""
    run, raised = Run(job.cell), []
    for number in range(job.cell.steps):
        give_gradients(run, number)
        if number >= 1:
            grad = run.model.get_parameter("up.weight").grad
            local(grad).fill_(float("nan"))
        try:
            run.optimizer.step()
        except RootError as error:
            raised.append((number, str(error)))
    return {"raised": raised}


def lose(param: Tensor, together: bool) -> None:
    """No gradient here; for one process, zeros where the last of four ranks has its rows."""
    if together:
        param.grad = None
        return
    param.grad = param.grad.clone()
    chunks = param.grad.chunk(4)
    if len(chunks) == 4:
        chunks[3].zero_()


def give_gradients(run: Run, number: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(number)
    for param in run.model.parameters():
        if param.requires_grad:
            shape, dtype = param.shape, torch.float64
            grad = torch.randn(shape, generator=generator, dtype=dtype) * scale
            param.grad = like(param, grad)


def work(job: Any) -> Outcome:
    match job:
        case CommonState():
            return go_on_together(job)
        case Leg():
            return travel(job)
        case Forms():
            return change_form(job)
        case Trouble():
            return stumble(job)
        case Failing():
            return fail(job)
        case Cell():
            return train(job)
    raise AssertionError(job)


def alone(work: Any, job: Any) -> Outcome:
    with one_thread():
        return work(job)
