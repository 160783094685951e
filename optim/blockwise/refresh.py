"""A refresh of a block's roots or bases: in the step, or beside the steps.

"in_step": a step that takes roots waits for them. They are of factors that have its gradient.

"beside": the roots of a refresh come into use at the next one; until then they are made on the host
(`largebatch.optim.math.decompositions.Beside`), whose speed decides nothing. They are one interval
of steps old when they come and two when they go, in place of none and one. Those of the first
interval, in which factors change fast, are taken in the step. What is under way is in the state, as
the factors that were asked of: a state that is loaded asks again.
"""

from collections.abc import Callable, Generator
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from largebatch.optim.base import Group
from largebatch.optim.blockwise.block_work import BlockAtWork
from largebatch.optim.blockwise.blocks import Block
from largebatch.optim.math.decompositions import Decomposition, Outcome

Result = TypeVar("Result")

Ask = Callable[[Callable[[], Tensor], int], Decomposition[Result]]
"""The decomposition of a dimension, by what returns its factor, and the dimension."""


def asked_shapes(group: Group, block: Block) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what a block's state keeps of a refresh that is under way."""
    dims = block.dims if group["refresh"] == "beside" else ()
    return {f"asked_{dim}": (block.shape[dim], block.shape[dim]) for dim in dims}


def refreshed(
    block: BlockAtWork,
    first: int,
    factor: Callable[[int], Tensor],
    ask: Ask[Result],
    use: Callable[[list[Outcome[Result]]], None],
) -> Generator[list[Decomposition[Any]], list[Outcome[Any]], None]:
    """Take a block's roots or bases, which are due: yield what is to be decomposed in this step.

    Args:
        first: the step at which they are first needed.
        factor: a dimension's factor, as it is decomposed.
        use: called once with the outcomes, one for each dimension that has a factor.
    """
    now = [ask(partial(factor, dim), dim) for dim in block.dims]
    if block.group["refresh"] == "in_step":
        use((yield now))
        return
    key = block.layer.param, block.number
    kept = [ask(partial(block.state.__getitem__, f"asked_{dim}"), dim) for dim in block.dims]
    is_young = block.step - first < block.group["precondition_interval"]
    use((yield now) if is_young else block.beside.take(key, kept))
    for dim in block.dims:
        block.put(f"asked_{dim}", factor(dim))
    if is_young:  # the next may be, too
        block.beside.forget(key)
    else:
        block.beside.begin(key, kept)
