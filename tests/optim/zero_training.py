"""LARS and LAMB inside ZeRO, cells as data: their network and batches, and one process training it.

A cell trains on half of each batch a rank, over two micro-batches, and is compared with one process
that takes whole batches. In FP32 the gradients are the network's. In bf16 a backward pass of half a
batch rounds differently, so there the gradients are given: small multiples of a power of two, whose
sums and means over micro-batches and ranks are exact in bf16 too.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from largebatch.optim import LAMB, LARS

NUM_STEPS = 6
WORLD_SIZE = 2
NUM_MICRO_BATCHES = 2
MICRO_BATCH_SIZE = 4  # of one rank
NUM_PARTS = WORLD_SIZE * NUM_MICRO_BATCHES  # of a batch

LAMB_OPTIONS = {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1}
LARS_OPTIONS = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.05, "trust_coefficient": 0.05}
ROWS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "LAMB": (LAMB, LAMB_OPTIONS),
    "LAMB clip": (LAMB, {**LAMB_OPTIONS, "max_grad_norm": 0.1}),  # below every norm that occurs
    "LARS": (LARS, LARS_OPTIONS),
    "AdamW": (torch.optim.AdamW, LAMB_OPTIONS),  # elementwise: what fails for it is the test
}
DTYPES = ("fp32", "bf16")
OUR_ROWS = ("LAMB", "LAMB clip", "LARS")


@dataclass(frozen=True)
class Cell:
    stage: int | None
    """Of ZeRO; None: no DeepSpeed, but DDP and a ZeroRedundancyOptimizer."""
    dtype: str  # fp32, bf16, or bf16/fp32: bf16 with gradients summed in FP32
    row: str
    zero: dict[str, Any] = field(default_factory=dict)
    """More for DeepSpeed's zero_optimization."""
    clipping: float = 0.0
    """DeepSpeed's own gradient_clipping."""
    fused: bool = False
    """A fused weight and bias make a group of their own and are three layers each."""
    named: bool = False
    """The optimizer is given the parameters' names."""
    resumed: bool = False
    """Half-way a checkpoint is saved, and loaded into a new engine."""
    bound: bool = True

    def __str__(self) -> str:
        where = "ZeroRedundancyOptimizer" if self.stage is None else f"ZeRO-{self.stage}"
        marks = [
            *self.zero,
            *(mark for mark in ("fused", "named", "resumed") if getattr(self, mark)),
        ]
        marks += ["gradient_clipping"] if self.clipping else []
        marks += [] if self.bound else ["not bound"]
        return ", ".join([where, self.dtype, self.row, *marks])


def zero_cells() -> list[Cell]:
    """Every stage with every row, in FP32 and in bf16."""
    return [Cell(stage, dtype, row) for stage in range(4) for dtype in DTYPES for row in OUR_ROWS]


def more_cells() -> list[Cell]:
    """What else changes the flat tensors, the gradients or the optimizer's groups."""
    offload = {"offload_optimizer": {"device": "cpu"}}
    return [
        Cell(None, "fp32", "LAMB clip"),
        Cell(None, "fp32", "LARS", fused=True),
        Cell(0, "bf16", "LAMB clip", resumed=True),
        Cell(1, "bf16/fp32", "LAMB clip"),
        Cell(1, "bf16/fp32", "LAMB clip", resumed=True, clipping=0.2),
        Cell(1, "fp32", "LAMB clip", fused=True, named=True, clipping=0.2),
        Cell(2, "fp32", "LAMB clip", {"round_robin_gradients": True}, fused=True),
        Cell(2, "bf16", "LAMB", {"parameter_alignment": True}),
        Cell(2, "bf16", "LAMB clip", offload),
        Cell(2, "fp32", "LAMB", resumed=True, named=True),
        Cell(3, "bf16", "LAMB clip", resumed=True, clipping=0.2),
        Cell(3, "fp32", "LARS", offload, fused=True),
        Cell(3, "fp32", "LAMB clip", fused=True, named=True, clipping=0.2),
    ]


def control_cells() -> list[Cell]:
    """An elementwise optimizer, which is right in flat tensors by itself."""
    return [Cell(stage, "bf16", "AdamW", bound=False) for stage in (1, 2, 3)]


def unbound_cells() -> list[Cell]:
    """What goes wrong without `bind` and cannot be seen: a step that DeepSpeed makes by itself."""
    return [Cell(0, "bf16", "LAMB", bound=False)]


# The network, its batches and its groups --------------------------------------------------------


class Network(nn.Module):
    """Odd sizes, so that flat partitions begin and end in the middle of rows and of tensors."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(19, 6)
        self.fused = nn.Linear(18, 21)  # three layers of seven rows
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 5)
        self.scale = nn.Parameter(torch.full((1,), 0.5))  # a rank may hold nothing of it
        self.shift = nn.Parameter(torch.full((5,), 0.1), requires_grad=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean loss over samples; tokens (samples, 3), targets (samples, 5)."""
        value, gate, rest = self.fused(self.embedding(tokens).flatten(1)).chunk(3, dim=1)
        outputs = self.head(self.norm(value * torch.sigmoid(gate) + rest)) * self.scale + self.shift
        return nn.functional.mse_loss(outputs.float(), targets)


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]


Batch = tuple[Tensor, Tensor]


def batches() -> list[Batch]:
    """Whole ones: tokens (NUM_STEPS, NUM_PARTS, samples, 3), targets (…, 5)."""
    generator = torch.Generator().manual_seed(1)
    shape = (NUM_STEPS, NUM_PARTS, MICRO_BATCH_SIZE)
    tokens = torch.randint(19, (*shape, 3), generator=generator)
    targets = torch.randn(*shape, 5, generator=generator)
    return list(zip(tokens, targets, strict=True))


def given_gradients(name: str, param_shape: torch.Size, step: int) -> Tensor:
    """For each part of a batch, shape (NUM_PARTS, *param_shape); the parts add up exactly."""
    generator = torch.Generator().manual_seed(hash_of(name) + step)
    integers = torch.randint(-15, 16, (NUM_PARTS, *param_shape), generator=generator)
    return integers * 2.0 ** (step % 3 - 5)


def hash_of(name: str) -> int:
    """The same in every process."""
    return int.from_bytes(name.encode()) % 2**31


def parameter_groups(model: nn.Module, cell: Cell) -> list[dict[str, Any]]:
    """Matrices; vectors, which neither decay nor adapt; the scale; and what is fused."""
    groups: dict[str, dict[str, Any]] = {
        "matrices": {},
        "vectors": {"weight_decay": 0.0, "adapt": False},
        "scale": {},
        "fused": {"norm_groups": 3},
    }
    for name, param in model.named_parameters():
        kind = "matrices" if name.endswith("weight") and "norm" not in name else "vectors"
        if name == "scale" or (cell.fused and name.startswith("fused")):
            kind = name.split(".")[0]
        groups[kind].setdefault("params", []).append((name, param) if cell.named else param)
    return [group for group in groups.values() if "params" in group]


def layer_names(cell: Cell) -> set[str]:
    fused = {name for name, _ in trainable(Network()) if cell.fused and name.startswith("fused")}
    parts = {f"{name}[{part}]" for name in fused for part in range(3)}
    return {name for name, _ in trainable(Network())} - fused | parts


def make_optimizer(model: nn.Module, cell: Cell) -> torch.optim.Optimizer:
    optimizer, options = ROWS[cell.row]
    return optimizer(parameter_groups(model, cell), **options)


# One process ------------------------------------------------------------------------------------


def train_alone(cell: Cell) -> dict[str, Tensor]:
    """FP32 weights by name, after steps on whole batches."""
    model = Network()
    if cell.dtype != "fp32":
        model = model.bfloat16().float()
    optimizer = make_optimizer(model, cell)
    for step, (tokens, targets) in enumerate(batches()):
        optimizer.zero_grad()
        if cell.dtype == "fp32":
            model(tokens.flatten(0, 1), targets.flatten(0, 1)).backward()
        else:
            for name, param in trainable(model):
                param.grad = given_gradients(name, param.shape, step).sum(0) / WORLD_SIZE
        if cell.clipping:  # with DeepSpeed's guard against dividing by nothing
            grads = [param.grad for _, param in trainable(model)]
            norm = torch.nn.utils.get_total_norm(grads) + 1e-6
            torch._foreach_div_(grads, torch.clamp(norm / cell.clipping, min=1.0))
        optimizer.step()
    return {name: param.detach() for name, param in trainable(model)}
