"""What one rank of very many does, run here by itself: every collective goes to a fake group.

Tensors are meta tensors, which have shapes and no data: a rank of 38,400 is built and run in
seconds, by the code that trains.
"""

import gc
import pickle
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from largebatch.benchmarks.harness import Traffic
from largebatch.distributed.ranks import Ranks
from largebatch.optim import LAMB, SOAP, Muon, Shampoo
from largebatch.optim.blockwise.work_group import make_layer, share_out, work_groups_of
from largebatch.optim.kronecker.layers import find_layers
from largebatch.optim.kronecker.work_group import make_work_groups
from largebatch.optim.sharding.placement import Placement, placement_of
from largebatch.optim.sharding.redistribution import Redistribution
from largebatch.train.checkpoints.plan import digest_of, parts_of, plan_of
from largebatch.train.checkpoints.torch_format import SharingPlanner

Shapes = Mapping[str, tuple[int, ...]]

PER_NODE: Final = 12

LAYOUTS: Final = ("ddp", "hsdp")
"""Copies on all ranks; shards within a node, and copies of them from node to node."""


def matrices(num_blocks: int = 32, width: int = 4096, hidden: int = 11008) -> Shapes:
    """Those in the blocks of a decoder of 7 B parameters; embeddings and gains aside."""
    found: dict[str, tuple[int, ...]] = {}
    for number in range(num_blocks):
        found |= {f"{number}.{name}.weight": (width, width) for name in ("q", "k", "v", "o")}
        found |= {f"{number}.{name}.weight": (hidden, width) for name in ("gate", "up")}
        found[f"{number}.down.weight"] = (width, hidden)
    return found


@contextmanager
def as_rank(rank: int, size: int) -> Iterator[None]:
    """This process as one rank of a group whose others are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def takes_meta() -> bool:
    """Whether collectives of this torch take meta tensors; torch does not say so publicly."""
    has: bool = torch._C._dispatch_has_kernel_for_dispatch_key("c10d::allreduce_", "Meta")
    return has


class MessageWatch(Traffic):  # type: ignore[no-untyped-call] # torch's own is not annotated
    """Also counts the bytes of tensors made meanwhile that are alive."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.most_bytes = 0
        self._bytes: dict[int, int] = {}
        self._given = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace != "c10d":
            for tensor in result if isinstance(result, list | tuple) else [result]:
                if isinstance(tensor, Tensor):
                    self._note(tensor)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._bytes and key not in self._given:
            self._bytes[key] = storage.nbytes()
            weakref.finalize(storage, self._bytes.pop, key, None)
            self.most_bytes = max(self.most_bytes, sum(self._bytes.values()))


@dataclass(frozen=True)
class Exchanged:
    """What an exchange of one rank was like, in a step; seconds are of processor time."""

    owners: int
    """Ranks that own anything."""
    largest_share: int
    """Bytes of results that the owner of most has."""
    plan_seconds: float
    host_seconds: float
    """Of the step's exchange without what travels, and without arithmetic on data."""
    memory: int
    """The most bytes that the exchange has in hand at once, beside what it is given."""
    collectives: dict[str, int]
    sent: int
    partners: list[tuple[int, int]]
    """Of each all-to-all the bytes sent and to how many ranks."""
    reduced: list[int]
    """Of each all-reduce its bytes."""


def parameters(
    shapes: Shapes, layout: str, size: int, device: str = "meta"
) -> dict[str, nn.Parameter]:
    """Parameters of one rank: plain, or sharded within a node and replicated across."""
    mesh = None
    if layout == "hsdp":
        mesh = init_device_mesh("cpu", (size // PER_NODE, PER_NODE), mesh_dim_names=("r", "s"))
    return {name: nn.Parameter(spread_out(shape, mesh, device)) for name, shape in shapes.items()}


def spread_out(shape: tuple[int, ...], mesh: DeviceMesh | None, device: str) -> Tensor:
    """A tensor of zeros, or of none, cut by rows within a node where there is a mesh."""
    if mesh is None:
        return torch.zeros(shape, device=device)
    chunk = -(-shape[0] // PER_NODE)
    place = mesh.get_local_rank(1)
    rows = max(0, min(chunk, shape[0] - chunk * place))
    held = torch.zeros(rows, *shape[1:], device=device)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        held, mesh, [Replicate(), Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
    )


def block_exchange(make: Callable[..., Any]) -> Callable[[dict[str, nn.Parameter]], Redistribution]:
    """That of Shampoo, SOAP or Muon."""

    def build(params: dict[str, nn.Parameter]) -> Redistribution:
        optimizer = make([*params.items()], process_group=dist.group.WORLD)
        group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
        layers = [
            make_layer(p, name, optimizer.blocks_in(group_of[p], p.shape), dist.group.WORLD)
            for name, p in params.items()
        ]
        share_out(layers, group_of)
        (work_group,) = work_groups_of(layers)
        return work_group.redistribution

    return build


def layer_exchange(params: dict[str, nn.Parameter]) -> Redistribution:
    """That of K-FAC."""
    model = nn.ModuleDict()
    for name, param in params.items():
        linear = nn.Linear(param.shape[1], param.shape[0], bias=False, device="meta")
        linear.weight = param
        model[name.replace(".", "/")] = linear
    layers = find_layers(model, 4096)
    placements: dict[Tensor, Placement] = {
        p: placement_of(p, name, dist.group.WORLD) for name, p in params.items()
    }
    (work_group,) = make_work_groups(layers, placements, 10)
    return work_group.redistribution


EXCHANGES: Final[Mapping[str, Callable[[dict[str, nn.Parameter]], Redistribution]]] = {
    "Shampoo": block_exchange(
        lambda params, **more: Shampoo(params, lr=0.1, max_preconditioner_dim=None, **more)
    ),
    "SOAP": block_exchange(lambda params, **more: SOAP(params, lr=0.1, **more)),
    "Muon": block_exchange(lambda params, **more: Muon(params, lr=0.1, **more)),
    "K-FAC": layer_exchange,
}
"""Shampoo cuts all sides to 1024, SOAP by its defaults leaves those above 10,000 whole, Muon has
whole matrices for blocks, and K-FAC layers."""


def exchanged(optimizer: str, shapes: Shapes, layout: str, size: int, rank: int = 0) -> Exchanged:
    """One step's exchange on one rank of `size`."""
    with as_rank(rank, size):
        params = parameters(shapes, layout, size)
        begun = time.process_time()
        exchange = EXCHANGES[optimizer](params)
        planned = time.process_time()
        parts = [getattr(p, "to_local", lambda p=p: p)().detach() for p in params.values()]
        results = owned(exchange)
        sums = torch.zeros(6 * len(parts), device="meta")
        started = time.process_time()
        given = [*parts, sums, *(block for own in results for block in own.values())]
        with MessageWatch(*given) as watch:
            exchange.to_owners(parts, sums if layout == "hsdp" else None)
            pieces, _ = exchange.to_holders(results, sums)
            for _ in pieces:
                pass
        ended = time.process_time()
        return summary(exchange, watch, planned - begun, ended - started)


def owned(exchange: Redistribution) -> list[dict[int, Tensor]]:
    """A result for each block that this rank owns."""
    found: list[dict[int, Tensor]] = []
    for tensor in exchange.tensors:
        pairs = enumerate(zip(tensor.blocks, tensor.owners, strict=True))
        mine = {number: block for number, (block, owner) in pairs if owner == exchange.me}
        found.append({n: torch.zeros(block.size, device="meta") for n, block in mine.items()})
    return found


def summary(exchange: Redistribution, watch: MessageWatch, plan: float, host: float) -> Exchanged:
    shares: Counter[int] = Counter()
    for tensor in exchange.tensors:
        for block, owner in zip(tensor.blocks, tensor.owners, strict=True):
            shares[owner] += 4 * block.numel
    swaps = [(sent, to) for name, sent, to in watch.collectives if name == "alltoall_base"]
    return Exchanged(
        owners=len(shares),
        largest_share=max(shares.values()),
        plan_seconds=plan,
        host_seconds=host,
        memory=watch.most_bytes,
        collectives=dict(Counter(name for name, _, _ in watch.collectives)),
        sent=sum(sent for _, sent, _ in watch.collectives),
        partners=swaps,
        reduced=[sent for name, sent, _ in watch.collectives if name == "allreduce"],
    )


def norms_reduced(shapes: Shapes, layout: str, size: int) -> Exchanged:
    """A step of LAMB with as many tensors, of two columns: what travels are numbers of layers."""
    with as_rank(0, size):
        params = parameters(dict.fromkeys(shapes, (PER_NODE, 2)), layout, size, "cpu").values()
        begun = time.process_time()
        optimizer = LAMB(params, lr=0.1)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        planned = time.process_time()
        optimizer.step()
        ended = time.process_time()
        with MessageWatch() as watch:
            optimizer.step()
        reduced = [sent for name, sent, _ in watch.collectives if name == "allreduce"]
        return Exchanged(
            size, 0, planned - begun, ended - planned, sum(reduced),
            dict(Counter(name for name, _, _ in watch.collectives)), sum(reduced), [], reduced,
        )  # fmt: skip


def planned(shapes: Shapes, layout: str, size: int) -> dict[str, float]:
    """What planning a checkpoint takes, of model and LAMB's state; seconds of processor time.

    By the first of `size` ranks, and by one that writes nothing; and by torch for each rank.
    """
    with as_rank(0, size):
        params = parameters(shapes, layout, size)
        first = Ranks(rank=0, size=size)
        planner = SharingPlanner(first)
        planner.set_up_planner(nested(params), is_coordinator=True)
        state, paths = planner.state_dict, planner.mappings
        begun = time.process_time()
        digest = digest_of(state, paths, first)
        planned = time.process_time()
        whole = plan_of(digest, state, paths, first)
        ended = time.process_time()
        writers = {r for value in state.values() for _, may in parts_of(value, size) for r in may}
        # Of the same shard as the first, which is all that this process has.
        idle = next((r for r in range(0, size, PER_NODE) if r not in writers), 0)
        between = time.process_time()
        other = plan_of(digest, state, paths, Ranks(rank=idle, size=size))
        last = time.process_time()
        assert whole is not None
        assert other is not None
        torch_bytes, torch_seconds = by_torch(nested(params))
        return {
            "writers": len(writers),
            "first_seconds": ended - begun,
            "bystander_seconds": last - between + planned - begun,
            "again_seconds": planned - begun,
            "agreed_bytes": 2 * 8,
            "torch_bytes": torch_bytes,
            "torch_seconds": torch_seconds,
        }


def nested(params: dict[str, nn.Parameter]) -> dict[str, Any]:
    """What a checkpoint of a model and of LAMB has."""
    moments = {
        name: {
            "exp_avg": torch.zeros_like(param),
            "exp_avg_sq": torch.zeros_like(param),
            "step": torch.zeros(()),
        }
        for name, param in params.items()
    }
    groups = [{"lr": 0.1, "betas": (0.9, 0.999), "params": [*params]}]
    return {"model": dict(params), "optimizer": {"state": moments, "param_groups": groups}}


def by_torch(tensors: dict[str, Any], num_plans: int = 8) -> tuple[int, float]:
    """Bytes of one rank's plan, and seconds that joining such plans takes for each of them."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(tensors, is_coordinator=True)
    plan = pickle.dumps(planner.create_local_plan())
    collects = gc.isenabled()
    gc.disable()  # what there is to search depends on what else this process has made
    try:
        begun = time.process_time()
        planner._dedup_save_plans([pickle.loads(plan) for _ in range(num_plans)])
        return len(plan), (time.process_time() - begun) / num_plans
    finally:
        if collects:
            gc.enable()
