"""The table of all optimizers that the contract is held against, and trials of them.

A new optimizer is one row. torch's own AdamW and SGD are rows too: what fails for them is wrong
with the test.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from kfac_ranks import ROWS as KFAC_OPTIONS
from kfac_ranks import Model, data
from optimizer_rows import ROWS as LAYERWISE_ROWS
from optimizer_rows import make_grads, make_layers, snapshot
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from largebatch.optim import KFAC, SOAP, Mano, Muon, Shampoo, SOAPMuon

INTERVAL = 3
"""Steps from refresh to refresh, where an optimizer has any; of K-FAC the same or less."""
SEVERAL = 2 * INTERVAL + 1
"""Steps in which everything has its turn twice."""
NUM_STEPS = 5 * INTERVAL

grads_of = functools.cache(functools.partial(make_grads, NUM_STEPS))


@dataclass
class Trial:
    """An optimizer and what it moves; each step has gradients of its own, the same in all trials.

    Attributes:
        model: what K-FAC watches; None: layers, whose gradients are given.
    """

    optimizer: Any
    params: list[Parameter]
    model: nn.Module | None = None

    def loss(self, number: int) -> Tensor:
        """The loss of a step."""
        if self.model is not None:
            x, y = data(number)
            return cross_entropy(self.model(x), y)
        grads = grads_of(self.params[0].dtype)[number]
        products = zip(self.params, grads, strict=True)
        return torch.stack([(param * grad).sum() for param, grad in products]).sum()

    def backward(self, number: int, factor: float = 1.0) -> list[Tensor]:
        """Leave the gradients of a step, times `factor`; return copies of them."""
        self.optimizer.zero_grad()
        (self.loss(number) * factor).backward()
        return self.grads()

    def grads(self) -> list[Tensor]:
        return [param.grad.clone() for param in self.params if param.grad is not None]

    def train(self, first: int, last: int, factor: float = 1.0) -> None:
        for number in range(first, last):
            self.backward(number, factor)
            self.optimizer.step()

    def weights(self) -> list[Tensor]:
        return [param.detach().clone() for param in self.params]

    def tensors(self) -> list[Tensor]:
        """Every parameter and all state."""
        return snapshot(self.optimizer)

    def set_weights(self, weights: Iterable[Tensor]) -> None:
        for param, weight in zip(self.params, weights, strict=True):
            param.data.copy_(weight)

    def duplicated(self, duplicate: Callable[[Any], Any]) -> "Trial":
        """A trial of a copy of the optimizer, and of the model if it watches one."""
        if self.model is not None:
            model, optimizer = duplicate((self.model, self.optimizer))
            return Trial(optimizer, list(model.parameters()), model)
        twin = duplicate(self.optimizer)
        pairs = zip(in_groups(self.optimizer), in_groups(twin), strict=True)
        copy_of = {id(param): copied for param, copied in pairs}
        return Trial(twin, [copy_of[id(param)] for param in self.params])


def in_groups(optimizer: torch.optim.Optimizer) -> list[Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


@dataclass(frozen=True)
class ContractRow:
    """An optimizer.

    Attributes:
        make: of parameters and options.
        watches: whether it has to be given the model that its parameters are of.
        masked: whether it is of ours with `found_inf`, FP32 state and refusals by name.
        maximizes: whether it has the option.
        never_waits: whether no step waits for the device.
        late: options under which a parameter's history depends on nothing but its own gradients.
        options: further ones to leave gradients alone under.
        bad: options of a group that are refused.
    """

    name: str
    make: Callable[..., torch.optim.Optimizer]
    lr: float
    watches: bool = False
    masked: bool = True
    maximizes: bool = True
    never_waits: bool = False
    late: dict[str, Any] | None = field(default_factory=dict)
    options: tuple[dict[str, Any], ...] = ()
    bad: tuple[dict[str, Any], ...] = ()

    def start(self, dtype: torch.dtype = torch.float32, **options: Any) -> Trial:
        if self.watches:
            model = Model(dtype)
            return Trial(self.make(model, **options), list(model.parameters()), model)
        params = make_layers(dtype)
        return Trial(self.make(params, **options), params)

    def partly(self) -> tuple[torch.optim.Optimizer, list[Parameter]]:
        """An optimizer of some parameters, and others."""
        if self.watches:
            model = Model(torch.float32)
            made = self.make(model, params=model.head.parameters())
            return made, list(model.conv.parameters())
        params = make_layers()
        return self.make(params[3:]), params[:3]

    def of_model(self, model: nn.Module) -> torch.optim.Optimizer:
        return self.make(model if self.watches else model.named_parameters())


def named(params: Iterable[Any]) -> list[tuple[str, Tensor]]:
    """Parameters with names, those that have some included; kernels are called so."""
    return [
        param
        if isinstance(param, tuple)
        else (f"{'layer' if param.dim() < 3 else 'kernel'}{n}", param)
        for n, param in enumerate(params)
    ]


def of_matrices(kind: Any, **facts: Any) -> ContractRow:
    """With the kernel, which names do not tell from a stack of matrices, left to AdamW."""

    def make(params: Any, **options: Any) -> torch.optim.Optimizer:
        given = [*params]
        if isinstance(given[0], dict):
            given = [{**group, "params": named(group["params"])} for group in given]
            names = [name for group in given for name, _ in group["params"]]
        else:
            given = named(given)
            names = [name for name, _ in given]
        kernels = ["kernel*"] if any(name.startswith("kernel") for name in names) else []
        return kind(given, **{"lr": 0.02, "weight_decay": 0.1, "adamw": kernels, **options})

    return ContractRow(kind.__name__, make, 0.02, late=None, **facts)


def blockwise(kind: type[torch.optim.Optimizer], **defaults: Any) -> ContractRow:
    def make(params: Any, **options: Any) -> torch.optim.Optimizer:
        return kind(
            params,
            **{
                "lr": 0.01,
                "block_size": 3,
                "precondition_interval": INTERVAL,
                **defaults,
                **options,
            },
        )

    return ContractRow(
        kind.__name__,
        make,
        0.01,
        late={"precondition_interval": 1},  # whose one slot is that of every block
        options=({"decay": "l2"},),
        bad=({"block_size": 0},),
    )


def kfac(name: str) -> ContractRow:
    def make(model: nn.Module, **options: Any) -> KFAC:
        return KFAC(model, **{"lr": 0.02, **KFAC_OPTIONS[name], **options})

    return ContractRow(
        f"KFAC {name}",
        make,
        0.02,
        watches=True,
        options=({"weight_decay": 0.1, "maximize": True},),
        bad=({"damping": -1.0}, {"kl_clip": 2e-3}),
    )


CONTRACT = (
    *(
        ContractRow(
            row.name,
            row.make,
            row.lr,
            masked=row.ours,
            never_waits=row.ours,
            bad=({"adapt": "no"},),
        )
        for row in LAYERWISE_ROWS
    ),
    blockwise(Shampoo, momentum=0.5, weight_decay=0.1),
    blockwise(SOAP, weight_decay=0.1),
    *map(kfac, KFAC_OPTIONS),
    of_matrices(Muon, never_waits=True, bad=({"momentum": 1.0},)),
    of_matrices(Mano, never_waits=True, bad=({"nesterov": 1},)),
    of_matrices(SOAPMuon, bad=({"factors": "mine"},)),
)
MASKED = tuple(row for row in CONTRACT if row.masked)
# Others by a number alone.
ALIKE = ("KFAC ridge",)


def each(names: str, rows: Iterable[Any]) -> pytest.MarkDecorator:
    """Parameters of a test, with or without more beside a row; those ALIKE in the matrix only."""
    params = []
    for given in rows:
        row, *more = given if isinstance(given, tuple) else (given,)
        marks = pytest.mark.matrix if row.name in ALIKE else ()
        params.append(
            pytest.param(row, *more, marks=marks, id="-".join([row.name, *map(str, more)]))
        )
    return pytest.mark.parametrize(names, params)


class NoHostSync(TorchDispatchMode):
    """Refuses every operator that makes the host wait for a value on the device."""

    FORBIDDEN = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert func.overloadpacket.__name__ not in self.FORBIDDEN, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def set_amp(optimizer: Any, found_inf: float, grad_scale: float | None) -> None:
    """Set what torch.amp.GradScaler sets before it calls `step`."""
    optimizer.found_inf = torch.tensor([found_inf])  # one element; 0-d where torch sets it
    optimizer.grad_scale = None if grad_scale is None else torch.tensor(grad_scale)
