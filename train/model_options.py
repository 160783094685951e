"""What can be done to any model before it is trained: by its blocks, the repeated parts."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def blocks(model: nn.Module) -> list[nn.Module]:
    """The elements of the model's outermost `ModuleList`s; none where it has no such list."""
    found: list[nn.Module] = []
    for child in model.children():
        found += list(child) if isinstance(child, nn.ModuleList) else blocks(child)
    return found


def checkpoint_activations(model: nn.Module) -> None:
    """Keep each block's input alone, and compute the block again in the backward pass.

    Raises:
        ValueError: the model has no list of blocks.
    """
    found = blocks(model)
    if not found:
        raise ValueError(
            f"engine.activation_checkpointing needs a model with its blocks in a ModuleList, and "
            f"{type(model).__name__} has none: leave it at false"
        )
    for block in found:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(model: nn.Module) -> None:
    """Compile each block, or the model where it has none; names and state stay as they are."""
    for module in blocks(model) or [model]:
        module.compile()
