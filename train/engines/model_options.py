"""What can be done to any model before it is trained, and while it is made."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.checkpoint import checkpoint

from largebatch.common.memory import check_memory


def blocks(model: nn.Module) -> list[nn.Module]:
    """The elements of the model's outermost `ModuleList`s; none where it has no such list."""
    found: list[nn.Module] = []
    for child in model.children():
        found += list(child) if isinstance(child, nn.ModuleList) else blocks(child)
    return found


def checkpoint_activations(model: nn.Module) -> None:
    """Keep each block's input alone, and compute the block again in the backward pass."""
    found = blocks(model)
    if not found:
        raise ValueError(
            f"engine.activation_checkpointing needs a model with its blocks in a ModuleList, and "
            f"{type(model).__name__} has none: leave it at false"
        )
    for block in found:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def wants_checkpointing(choice: bool | None, model: nn.Module, device: torch.device) -> bool:
    """Whether blocks are to be computed again: as chosen, or, where nothing is (None), on XPU.

    Its attention has no fused backward pass (torch-xpu-ops issues 1749 and 2489): autograd keeps
    what takes the square of a sequence's length, of every block, unless the block is made again.
    """
    if choice is not None:
        return choice
    return device.type == "xpu" and bool(blocks(model))


def compile_blocks(model: nn.Module) -> None:
    """Compile each block, or the model where it has none; names and state stay as they are."""
    for module in blocks(model) or [model]:
        module.compile()


@contextmanager
def within_memory(copies: int) -> Iterator[None]:
    """Refuse a model that is made within it as soon as its weights are more than this node holds.

    Args:
        copies: how often the node will hold as much as the weights take.
    """
    held = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal held
        if parameter is not None:
            held += parameter.numel() * parameter.element_size()
            check_memory(held * copies, "the model", "lower its sizes")

    if torch.get_default_device().type == "meta":
        yield
        return
    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
