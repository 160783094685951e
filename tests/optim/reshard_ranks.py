"""Training handed from one layout and world size to the next through a checkpoint, by its ranks."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gloo_ranks import Outcome, one_thread
from parity_cells import Cell, Run, same_bits
from parity_layouts import whole
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

LEG_STEPS = 3


@dataclass(frozen=True)
class Route:
    """Layouts and world sizes that train one after the other, LEG_STEPS steps each."""

    legs: tuple[tuple[str, int], ...]
    row: str
    precision: str

    def __str__(self) -> str:
        legs = (f"{layout}/{world_size}" for layout, world_size in self.legs)
        return "/".join((*legs, self.row, self.precision))

    def cell(self, leg: int) -> Cell:
        layout, world_size = self.legs[leg]
        return Cell(layout, world_size, self.row, self.precision)


@dataclass(frozen=True)
class Leg:
    route: Route
    number: int
    folder: Path
    """The route's own, for its checkpoints."""

    @property
    def world_size(self) -> int:
        return self.route.legs[self.number][1]


def start(cell: Cell) -> Run:
    run = Run(cell)
    # torch wants a state for every parameter that requires a gradient, also of one that gets none.
    run.model.unused.requires_grad_(False)
    return run


def train(run: Run, leg: int) -> None:
    """The steps of a leg, with given gradients; the learning rate is halved in its middle."""
    for number in range(leg * LEG_STEPS, (leg + 1) * LEG_STEPS):
        if number % LEG_STEPS == 1:
            for group in run.optimizer.param_groups:
                group["lr"] *= 0.5
        run.give_gradients(number)
        run.optimizer.step()
        run.optimizer.zero_grad()


def uninterrupted(route: Route) -> Outcome:
    """The same steps on one process."""
    with one_thread():
        run = start(route.cell(0).alone)
        for leg in range(len(route.legs)):
            train(run, leg)
        return run.outcome()


def travel(leg: Leg) -> Outcome:
    """Take over what the leg before has saved, train on, and save for the next."""
    run, unchanged = start(leg.route.cell(leg.number)), True
    if leg.number > 0:
        before = leg.folder / f"{leg.number - 1}"
        load(run, before)
        saved: dict[str, Tensor] = torch.load(f"{before}.pt")
        loaded = {name: whole(tensor) for name, tensor in run.tensors().items()}
        # A rank of ZeRO-redundancy has the state of its own parameters only.
        keys_agree = loaded.keys() <= saved.keys()
        if not run.layout.redundancy:
            keys_agree = loaded.keys() == saved.keys()
        unchanged = keys_agree and all(same_bits(loaded[name], saved[name]) for name in loaded)
    train(run, leg.number)
    outcome = run.outcome()
    if leg.number + 1 < len(leg.route.legs):
        save(run, leg.folder / f"{leg.number}", outcome["tensors"])
    return {**outcome, "unchanged": unchanged}


def save(run: Run, folder: Path, tensors: dict[str, Tensor]) -> None:
    """A checkpoint, and beside it all tensors whole."""
    if run.layout.redundancy:  # torch's own way for it: one rank collects the state
        run.optimizer.consolidate_state_dict(to=0)
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, tensors)
        tensors = {name: tensor for part in gathered for name, tensor in part.items()}
        if dist.get_rank() == 0:
            saved = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
            torch.save(saved, f"{folder}.whole.pt")
    else:
        dcp.save(checkpoint_of(run), checkpoint_id=folder)
    if dist.get_rank() == 0:
        torch.save(tensors, f"{folder}.pt")


def load(run: Run, folder: Path) -> None:
    if run.layout.redundancy:
        saved = torch.load(f"{folder}.whole.pt")
        run.model.load_state_dict(saved["model"])
        run.optimizer.load_state_dict(saved["optimizer"])
        return
    checkpoint = checkpoint_of(run)
    dcp.load(checkpoint, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_model_state_dict(run.model, checkpoint["model"])
    set_optimizer_state_dict(run.model, run.optimizer, checkpoint["optimizer"])


def checkpoint_of(run: Run) -> Outcome:
    return {
        "model": get_model_state_dict(run.model),
        "optimizer": get_optimizer_state_dict(run.model, run.optimizer),
    }
