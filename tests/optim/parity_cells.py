"""The parity matrix as data, layout x optimizer x precision, and one cell's model and optimizer.

Given gradients: every layout steps with the same gradients, spread as its parameters are, so that
FP32 and bf16 cells compare optimizers and not the summation order of a backward pass. The real
thing, batches through the spread model, runs in FP64, where that order does not show.
"""

from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from gloo_ranks import Outcome
from parity_layouts import LAYOUTS, Layout, Network, like, local, shard_key, whole
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from largebatch.optim import LAMB, LARS

NUM_STEPS = 6
BATCH_SIZE = 12  # samples, over all ranks


@dataclass(frozen=True)
class Row:
    name: str
    optimizer: type[torch.optim.Optimizer]
    options: dict[str, Any]
    fused: bool = False
    """The network's fused tensors are split into their layers."""

    @property
    def ours(self) -> bool:
        return issubclass(self.optimizer, LAMB | LARS)

    def make(self, model: nn.Module, layout: Layout, precision: str) -> torch.optim.Optimizer:
        options = dict(self.options)
        if precision == "bf16+master":
            options["master_weights"] = True
        named = not layout.redundancy  # which does not take names
        groups = parameter_groups(model, self.fused, named)
        if not layout.redundancy:
            return self.optimizer(groups, **options)
        # Imported by the ranks only: the import warns of torch's own deprecated torch.jit.
        from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizer = ZeroRedundancyOptimizer(groups, self.optimizer, **options)
        if self.ours:
            from largebatch.optim.zero import bind

            bind(optimizer)
        return optimizer


class Deaf:
    """Mixed into an optimizer, it hears nothing of the other ranks: per-shard norms."""

    def step(self, closure: Any = None) -> Any:
        with mock.patch.object(dist, "all_reduce"):
            return super().step(closure)  # type: ignore[misc]


class DeafLAMB(Deaf, LAMB):
    pass


class DeafLARS(Deaf, LARS):
    pass


LAMB_OPTIONS = {"lr": 0.02, "betas": (0.9, 0.99), "weight_decay": 0.1}
LARS_OPTIONS = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.05, "trust_coefficient": 0.02}
CLIP = {"max_grad_norm": 1.0}  # far below the norm of the given gradients, and of the real ones

ROWS = {
    row.name: row
    for row in (
        Row("AdamW", torch.optim.AdamW, LAMB_OPTIONS),
        Row("LARS", LARS, LARS_OPTIONS),
        Row("LARS-clip-fused", LARS, LARS_OPTIONS | CLIP, fused=True),
        Row("LAMB", LAMB, LAMB_OPTIONS),
        Row("LAMB-clip", LAMB, LAMB_OPTIONS | CLIP),
        Row("LAMB-fused", LAMB, LAMB_OPTIONS, fused=True),
        Row("deaf-LARS", DeafLARS, LARS_OPTIONS),
        Row("deaf-LAMB", DeafLAMB, LAMB_OPTIONS),
        Row("deaf-LAMB-clip", DeafLAMB, LAMB_OPTIONS | CLIP),
    )
}
FUSED = {
    "qkv.weight": {"norm_groups": 3},
    "kv": {"norm_groups": (4, 6), "norm_dim": 1},
    "down.weight": {"norm_groups": (3, 7), "norm_dim": 1},
    "head.weight": {"norm_groups": (3, 7), "norm_dim": -1},
}


def parameter_groups(model: nn.Module, fused: bool, named: bool) -> list[dict[str, Any]]:
    """Weights, then vectors, which do not decay; where `fused`, a group for each fused tensor."""
    weights: dict[str, Any] = {"params": []}
    vectors: dict[str, Any] = {"params": [], "weight_decay": 0.0}
    groups = [weights, vectors]
    for name, param in model.named_parameters():
        entry = (name, param) if named else param
        if fused and name in FUSED:
            groups.append({"params": [entry], **FUSED[name]})
        else:
            (vectors if param.dim() == 1 else weights)["params"].append(entry)
    return groups


@dataclass(frozen=True)
class Cell:
    layout: str
    world_size: int
    row: str
    precision: str = "fp32"
    """fp32, bf16, bf16+master: given gradients; fp64: real training."""
    check: str = "trajectory"

    def __str__(self) -> str:
        check = () if self.check == "trajectory" else (self.check,)
        return "/".join((*check, self.layout, str(self.world_size), self.row, self.precision))

    @property
    def alone(self) -> "Cell":
        """The same on one process."""
        return Cell("one-process", 1, self.row, self.precision, self.check)

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "fp64": torch.float64}.get(self.precision, torch.bfloat16)


@dataclass
class Run:
    """A model spread as the cell says, and its optimizer, stepped through given or real batches."""

    cell: Cell
    layout: Layout = field(init=False)
    model: nn.Module = field(init=False)
    module: nn.Module = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.layout = LAYOUTS[self.cell.layout]
        self.model = Network(self.cell.dtype)
        self.shapes = {name: param.shape for name, param in self.model.named_parameters()}
        self.module = self.layout.spread(self.model)
        row = ROWS[self.cell.row]
        self.optimizer = row.make(self.model, self.layout, self.cell.precision)

    @property
    def inner(self) -> torch.optim.Optimizer:
        return self.optimizer.optim if self.layout.redundancy else self.optimizer

    def step(self, number: int) -> None:
        self.backward(number) if self.cell.precision == "fp64" else self.give_gradients(number)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def give_gradients(self, number: int, scale: float = 1.0) -> None:
        grads = given_gradients(self.shapes, number)
        for name, param in self.model.named_parameters():
            if name in grads:
                param.grad = like(param, grads[name] * scale)
                if (self.layout.name, param.dtype, name) not in _GIVEN:  # the harness itself
                    assert torch.equal(whole(param.grad), (grads[name] * scale).to(param.dtype))
                    _GIVEN.add((self.layout.name, param.dtype, name))

    def backward(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(BATCH_SIZE, 8, dtype=torch.float64, generator=generator)
        target = x.sin().sum(dim=1, keepdim=True)
        mine = self.layout.share()
        nn.functional.mse_loss(self.module(x[mine]), target[mine]).backward()
        if self.layout.ignores:
            for param in self.model.parameters():
                if not isinstance(param, DTensor) and param.grad is not None:
                    dist.all_reduce(param.grad)
                    param.grad /= dist.get_world_size()

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter, and every state tensor this rank holds a part of, by name."""
        tensors = {}
        for name, param in self.model.named_parameters():
            tensors[name] = param.detach()
            for key, value in sorted(self.inner.state.get(param, {}).items()):
                assert value.dim() == 0 or isinstance(value, DTensor) == isinstance(param, DTensor)
                tensors[f"{name}/{key}"] = value
        return tensors

    def outcome(self) -> Outcome:
        tensors = self.tensors()
        stats = self.inner.layer_stats() if ROWS[self.cell.row].ours else {}
        if self.layout.redundancy:  # which numbers its parameters
            stats = {self.named(key): values for key, values in stats.items()}
        return {
            "tensors": {name: whole(tensor) for name, tensor in tensors.items()},
            "copies": {name: (shard_key(t), local(t).clone()) for name, t in tensors.items()},
            "stats": {name: torch.stack([*values.values()]) for name, values in stats.items()},
        }

    def named(self, key: int | str) -> str:
        """A layer's name by its number, which may carry a part: 3 or "3[0]"."""
        number, bracket, part = str(key).partition("[")
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        names = {param: name for name, param in self.model.named_parameters()}
        return names[params[int(number)]] + bracket + part


_GIVEN: set[tuple[str, torch.dtype, str]] = set()
"""The layouts, types and parameters whose given gradients have been looked at in this process."""


def given_gradients(shapes: dict[str, torch.Size], number: int) -> dict[str, Tensor]:
    """Gradients whose scale differs between layers, and between steps, so that a clip differs."""
    generator = torch.Generator().manual_seed(number)
    grads = {}
    for index, (name, shape) in enumerate(shapes.items()):
        if name not in ("frozen", "unused"):
            scale = 10.0 ** (index % 3 - 1 + number % 3)
            grads[name] = torch.randn(shape, generator=generator) * scale
    return grads


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal to the last bit: 0.0 and -0.0 differ, a NaN equals itself."""
    return one.dtype == other.dtype and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )
