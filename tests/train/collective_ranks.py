"""What collectives reduce by while a rank trains, whoever calls them: Python, DDP's C++, FSDP2."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from engine_ranks import Cell, work
from gloo_ranks import Outcome
from torch.utils._python_dispatch import TorchDispatchMode

_REDUCE_OP = "__torch__.torch.classes.c10d.ReduceOp"


class Reductions(TorchDispatchMode):
    """Counts (collective, reduction) of all that goes through c10d's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            for value in (*args, *(kwargs or {}).values()):
                self._note(func.__name__, value)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, value: Any) -> None:
        if isinstance(value, torch.ScriptObject) and value._type().qualified_name() == _REDUCE_OP:
            self.seen[f"{name} {dist.ReduceOp.RedOpType(value.op()).name}"] += 1
        elif isinstance(value, str) and value.lower() in ("sum", "avg", "min", "max", "product"):
            self.seen[f"{name} {value}"] += 1


def work_and_reductions(cell: Cell) -> Outcome:
    """A run's losses, and "reductions": by what its collectives have reduced, and how often."""
    with Reductions() as reductions:
        outcome = work(cell)
    return outcome | {"reductions": dict(reductions.seen)}
