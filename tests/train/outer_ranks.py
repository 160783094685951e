"""Runs with outer steps on gloo ranks: a regression in FP64, whose gradient is a line of numpy."""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_ranks import group_of_one, lines, quiet
from gloo_ranks import Outcome
from hydra import compose, initialize_config_module
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from largebatch.conf.config import typed
from largebatch.conf.weights_config import OuterConfig
from largebatch.distributed.ranks import Ranks
from largebatch.distributed.team import Team
from largebatch.train.data.sampler import Indices
from largebatch.train.engines.precision import Precision
from largebatch.train.run import run
from largebatch.train.run_spec import Given, RunSpec, make_plan
from largebatch.train.tasks import Batch
from largebatch.train.weights.outer import OuterSteps

STEPS, BATCH_SIZE, INTERVAL, FEATURES = 7, 16, 3, 6
OUTER_LR, OUTER_MOMENTUM = 0.8, 0.6
CPU = torch.device("cpu")
_GROUP = "__torch__.torch.classes.c10d.ProcessGroup"


@dataclass(frozen=True)
class Cell:
    """A run; `groups` 0: without outer steps."""

    groups: int
    inner: tuple[str, ...] = ("optim=sgd", "optim.lr=0.1")
    words: tuple[str, ...] = ()
    deep: bool = False

    def __str__(self) -> str:
        return " ".join((f"groups={self.groups}", *self.inner, *self.words, "deep" * self.deep))

    @property
    def overrides(self) -> list[str]:
        outer = (
            "outer=diloco", f"outer.groups={self.groups}", f"outer.interval={INTERVAL}",
            f"outer.lr={OUTER_LR}", f"outer.momentum={OUTER_MOMENTUM}",
        )  # fmt: skip
        return [
            "task=digits", "target.loss=null", f"batch.size={BATCH_SIZE}",
            f"budget.samples={STEPS * BATCH_SIZE}", "evaluation.growth=1.0",
            *(outer if self.groups else ()), *self.inner, *self.words,
        ]  # fmt: skip


def table(num: int) -> tuple[Tensor, Tensor]:
    """Rows and what is to be found of them."""
    draw = torch.Generator().manual_seed(5)
    rows = torch.randn(num, FEATURES, generator=draw, dtype=torch.float64)
    return rows, torch.randn(num, generator=draw, dtype=torch.float64)


class Regression:
    """Least squares of a table; calls `mark` where a step begins."""

    replacement = False
    num_train, num_eval = 64, 32

    def __init__(self, mark: Callable[[str], None] = lambda word: None) -> None:
        self._rows, self._values = table(self.num_train + self.num_eval)
        self._mark = mark

    def train_batch(self, indices: Indices) -> Batch:
        if len(indices) == BATCH_SIZE // dist.get_world_size():  # not those that are tried first
            self._mark("step")
        rows = torch.from_numpy(indices)
        return self._rows[rows], self._values[rows]

    def eval_batch(self, indices: Indices) -> Batch:
        rows = torch.from_numpy(indices) + self.num_train
        return self._rows[rows], self._values[rows]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return (model(batch[0]).squeeze(1) - batch[1]).square().mean() / 2

    def provenance(self) -> Mapping[str, str]:
        return {"data": "a table", "data_hash": "0"}


def first_weights() -> Tensor:
    """Of the model, its bias last."""
    return torch.linspace(-1, 1, FEATURES + 1, dtype=torch.float64)


def model_of(cell: Cell) -> nn.Module:
    if cell.deep:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    model = nn.Linear(FEATURES, 1).double()
    with torch.no_grad():
        model.weight.copy_(first_weights()[None, :-1])
        model.bias.copy_(first_weights()[-1:])
    return model


class Collectives(TorchDispatchMode):
    """Notes each collective, whoever calls it: [its name, the size of its group, elements], between
    words of others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            values = [*args, *(kwargs or {}).values()]
            objects = [each for each in values if isinstance(each, torch.ScriptObject)]
            (group,) = [each for each in objects if each._type().qualified_name() == _GROUP]
            size = dist.ProcessGroup.unbox(group).size()
            held = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.seen.append([func.__name__, size, sum(numel(each) for each in held)])
        return func(*args, **(kwargs or {}))


def numel(value: Any) -> int:
    return sum(map(numel, value)) if isinstance(value, (list, tuple)) else value.numel()


def work(job: Any) -> Outcome:
    return trained(job) if isinstance(job, Cell) else {"found": JOBS[job]()}


def trained(cell: Cell) -> Outcome:
    """The weights after a run, on this rank; rank 0's lines; the collectives of the steps."""
    group_of_one()
    ranks = Ranks("test", dist.get_rank(), dist.get_world_size())
    with initialize_config_module("largebatch.conf", version_base="1.3"):
        config = typed(compose("train", cell.overrides))
    model, collectives = model_of(cell), Collectives()
    given = Given(Regression(collectives.seen.append), model)
    with quiet(), collectives, tempfile.TemporaryDirectory() as temporary:
        folder, names = Path(temporary), ("sgd", "table", "linear")
        spec = RunSpec(
            config, make_plan(config), folder, *names, noise_source=config.noise.small, given=given
        )
        run(spec, Team(ranks), CPU)
        told = json.dumps(lines(folder)) if ranks.is_first else ""
    held = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    weights = torch.cat([each.detach().flatten() for each in held])
    return {"weights": weights, "lines": told, "collectives": json.dumps(collectives.seen)}


def buffers() -> list[float]:
    """What is left of running statistics that differ from rank to rank."""
    rank = dist.get_rank()
    model = nn.BatchNorm1d(3)
    assert model.running_mean is not None
    assert model.num_batches_tracked is not None
    outer = OuterSteps(OuterConfig(kind="diloco", groups=2), model, dist.group.WORLD)
    model.running_mean += 1 + rank
    model.num_batches_tracked += 5
    outer.step()
    return [*model.running_mean.tolist(), float(model.num_batches_tracked)]


def loss_scale() -> dict[str, float]:
    """A loss scale that each rank has brought elsewhere, when they have met."""
    precision = Precision("fp16", CPU)
    scale = precision.loss_scale
    assert scale is not None
    for overflowed in (0.0, float(dist.get_rank() == 1), 0.0):
        scale.update(torch.tensor(overflowed))
    precision.agree()
    return precision.state_dict()


JOBS: dict[str, Callable[[], Any]] = {"buffers": buffers, "loss scale": loss_scale}
