"""What all ranks of a cell do, each returning what this rank has found."""

import functools
from collections.abc import Callable
from unittest import mock

import torch
import torch.distributed as dist
from gloo_ranks import Outcome
from parity_cells import NUM_STEPS, ROWS, Cell, Run, same_bits
from parity_layouts import LAYOUTS, like, local, whole
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Shard

import largebatch.optim.zero

BAD_STEP = 2  # of the checks in which one gradient is not finite
AMP_SCALE = 4.0


def trajectory(cell: Cell) -> Outcome:
    run = Run(cell)
    for number in range(NUM_STEPS):
        run.step(number)
    return run.outcome()


def without_bad_step(cell: Cell) -> Outcome:
    """What `found_inf` and `scaler` should come to."""
    run = Run(cell)
    for number in range(NUM_STEPS):
        if number != BAD_STEP:
            run.step(number)
    return run.outcome()


def found_inf(cell: Cell) -> Outcome:
    """One rank alone sees a gradient that is not finite, and has the attributes set for it.

    DDP gives every rank the same gradients: there all ranks see it.
    """
    run, unchanged = Run(cell), True
    replicated = cell.layout in ("one-process", "DDP")
    sees = replicated or dist.get_rank() == dist.get_world_size() - 1
    for number in range(NUM_STEPS):
        run.give_gradients(number, scale=AMP_SCALE)
        bad = number == BAD_STEP and sees
        if bad:
            local(run.model.up.weight.grad).fill_(float("nan"))
            local(run.model.down.weight.grad)[-1] = float("inf")
        run.optimizer.found_inf = torch.full((), float(bad))
        run.optimizer.grad_scale = torch.full((), AMP_SCALE)
        before = {name: local(tensor).clone() for name, tensor in run.tensors().items()}
        run.optimizer.step()
        if number == BAD_STEP:
            after = {name: local(tensor) for name, tensor in run.tensors().items()}
            unchanged = before.keys() == after.keys() and all(
                same_bits(before[name], after[name]) for name in before
            )
    return {**run.outcome(), "unchanged": unchanged}


def scaler(cell: Cell) -> Outcome:
    """torch's own GradScaler, which here finds a gradient that is not finite."""
    run, scales = Run(cell), []
    scaler = torch.amp.GradScaler("cpu", init_scale=AMP_SCALE)
    for number in range(NUM_STEPS):
        scaler.scale(torch.zeros(()))  # lets it create its scale tensor
        scales.append(scaler.get_scale())
        run.give_gradients(number, scale=scales[-1])
        if number == BAD_STEP:
            grad = torch.zeros(run.shapes["up.weight"])
            grad[-1] = float("inf")
            run.model.up.weight.grad = like(run.model.up.weight, grad)
        scaler.step(run.optimizer)
        scaler.update()
    return {**run.outcome(), "scales": scales}


def absent(cell: Cell) -> Outcome:
    """Ranks whose shard of a parameter is empty have no gradient for it, and so no state."""
    run = Run(cell)
    num_absent = 0
    for number in range(NUM_STEPS):
        run.give_gradients(number)
        for param in run.model.parameters():
            if local(param).numel() == 0:
                param.grad = None
                num_absent += 1
        run.optimizer.step()
    weights = {name: whole(param.detach()) for name, param in run.model.named_parameters()}
    return {"weights": weights, "num_absent": num_absent}


def partial(cell: Cell) -> Outcome:
    """Of a replicated parameter, each rank has a summand of the gradient, as autograd may leave it.

    `unchanged` says whether the optimizer has left them as they were.
    """
    run, unchanged = Run(cell), True
    param = run.model.down.bias
    for number in range(NUM_STEPS):
        run.give_gradients(number)
        summand = param.grad.to_local() * (0.25 if dist.get_rank() == 0 else 0.75)
        param.grad = DTensor.from_local(summand, param.device_mesh, [Partial()])
        before = summand.clone()
        run.optimizer.step()
        unchanged &= param.grad.placements == (Partial(),) and same_bits(summand, before)
    return {**run.outcome(), "unchanged": unchanged}


class Tower(nn.Module):
    """Linear layers, a weight and a bias each, in pairs that may be tensor-parallel."""

    def __init__(self, num_parameters: int) -> None:
        super().__init__()
        names = [f"linear{index}" for index in range(num_parameters // 2)]
        for name in names:
            self.add_module(name, nn.Linear(4, 4))
        self.pairs = list(zip(names[:-1:2], names[1::2], strict=False))

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


@functools.cache
def spread_tower(layout: str, num_parameters: int) -> Tower:
    tower = Tower(num_parameters)
    LAYOUTS[layout].spread(tower)
    return tower


def collectives(cell: Cell) -> Outcome:
    """Collectives of one step, by number of parameters; with and without the AMP attributes.

    Of ZeRO-redundancy, the optimizer's within: the broadcasts of the weights are not ours.
    """
    from torch.distributed.tensor.debug import CommDebugMode  # dear, and for ranks alone

    layout, row = LAYOUTS[cell.layout], ROWS[cell.row]
    counts: dict[str, dict[int, int]] = {"plain": {}, "amp": {}}
    for num_parameters in (10, 100):
        model = spread_tower(cell.layout, num_parameters)
        optimizer = row.make(model, layout, cell.precision)
        stepped = optimizer.optim if layout.redundancy else optimizer
        for kind, found in counts.items():
            for param in model.parameters():
                param.grad = torch.ones_like(param)
            if kind == "amp":
                stepped.found_inf, stepped.grad_scale = torch.zeros(()), torch.ones(())
            with CommDebugMode() as mode:
                stepped.step()
            found[num_parameters] = mode.get_total_counts()
    return counts


def counter(cell: Cell) -> Outcome:
    """How many of six known collectives the counter of `collectives` sees."""
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = LAYOUTS["FSDP2"].spread(Tower(2)).linear0.weight.device_mesh
    sharded = like(nn.Parameter(torch.ones(4)), torch.ones(4))
    sharded = DTensor.from_local(sharded, mesh, run_check=False)
    with CommDebugMode() as mode:
        dist.all_reduce(torch.ones(2))
        dist.all_reduce(torch.ones(2), group=mesh.get_group())
        mesh.get_group().allreduce(torch.ones(2)).wait()
        dist.broadcast(torch.ones(2), src=0)
        sharded.redistribute(mesh, [Shard(0)]).full_tensor()
        all_reduce(torch.ones(2), "sum", mesh).sum()
    return {"seen": mode.get_total_counts()}


def flat(cell: Cell) -> Outcome:
    """What the constructor says to the parameters of FSDP1, flattened or views of flat ones."""
    said = {}
    for use_orig_params in (False, True):
        model = FullyShardedDataParallel(
            nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
            device_id=torch.device("cpu"),
            use_orig_params=use_orig_params,
        )
        try:
            ROWS[cell.row].optimizer(model.named_parameters(), **ROWS[cell.row].options)
        except ValueError as error:
            said[use_orig_params] = str(error)
    return {"said": said}


def interleaved(cell: Cell) -> Outcome:
    """What the constructor says to a fused tensor that is sharded twice along one dimension."""
    run = Run(cell)
    params = {"params": [("up.weight", run.model.up.weight)], "norm_groups": 2}
    try:
        ROWS[cell.row].optimizer([params], **ROWS[cell.row].options)
    except ValueError as error:
        return {"said": str(error)}
    return {"said": "nothing"}


def unbound(cell: Cell) -> Outcome:
    """What the first step says in ZeRO-redundancy without `bind`."""
    with mock.patch.object(largebatch.optim.zero, "bind"):
        try:
            return trajectory(cell)
        except RuntimeError as error:
            return {"said": str(error)}


def deepspeed(cell: Cell) -> Outcome:
    """A cell of `zero_training.py`."""
    import zero_ranks

    stage, row = int(cell.layout[-1]), cell.row.replace("-", " ")
    bound = ROWS[cell.row].ours
    return zero_ranks.work(zero_ranks.Cell(stage, cell.precision, row, bound=bound))


CHECKS: dict[str, Callable[[Cell], Outcome]] = {
    check.__name__: check
    for check in (
        trajectory,
        without_bad_step,
        found_inf,
        scaler,
        absent,
        partial,
        collectives,
        counter,
        flat,
        interleaved,
        unbound,
        deepspeed,
    )
}


def check(cell: Cell) -> Outcome:
    return CHECKS[cell.check](cell)
