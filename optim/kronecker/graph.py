"""What autograd's graph says of a model's passes.

A call of a layer leaves a mark on the node that returned its output. From what the model returned,
`used_elsewhere` goes down the graph, from the output of such a call to its input at once: a weight
that it reaches nevertheless has been used without its module, as by `F.linear(x, module.weight)`.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from largebatch.optim.kronecker.layers import Layer

# On the node that returned the output of a layer's call: what its input came from, or None.
MARK = "largebatch: call of a layer"
WITHIN = "largebatch: layer"


def mark(layer: Layer, x: Tensor, output: Tensor, leaf: Node) -> None:
    """Leave marks of a call with the graph, which may be a part of later passes.

    Args:
        leaf: adds gradients to the weight that was used.
    """
    node = get_gradient_edge(before_views(output)).node
    before = get_gradient_edge(x).node if x.requires_grad else None
    notes(node)[MARK] = before
    # A compiled graph is one node, which the call is a part of, as may be what came before.
    for part in (leaf, *(n for n in (node, before) if n is not None and _is_compiled(n))):
        notes(part).setdefault(WITHIN, set()).add(layer)


def used_elsewhere(outputs: Iterable[Tensor], layers: Collection[Layer]) -> set[Layer]:
    """The layers that have a parameter which the outputs depend on beside the layers' calls."""
    owners = {id(param): layer for layer in layers for param in layer.params}
    found: set[Layer] = set()
    nodes, seen = [get_gradient_edge(output).node for output in outputs], set[Node]()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        known = notes(node)
        within: set[Layer] = known.get(WITHIN, set())
        if MARK in known and known[MARK] is not node:
            following = [known[MARK]]
        else:
            following = [after for after, _ in node.next_functions]
        for after in following:
            if after is None:
                continue
            if after.next_functions:
                nodes.append(after)
                continue
            used: set[Layer] = set(notes(after).get(WITHIN, ()))  # or FSDP2's unsharded weight's
            owner = owners.get(id(getattr(after, "variable", None)))
            used |= set() if owner is None else {owner}
            found |= used - within
    return found & set(layers)


def before_views(output: Tensor) -> Tensor:
    """The tensor of the same elements that autograd's graph still has when a view, such as a linear
    layer's output for a sequence, has been written to in place."""
    base = output._base
    whole = base is not None and base.requires_grad and base.numel() == output.numel()
    return base if base is not None and whole and not base.is_leaf else output


def notes(node: Node) -> dict[str, Any]:
    """What lasts as long as the node."""
    return cast(dict[str, Any], node.metadata)  # which torch declares as a function


def _is_compiled(node: Node) -> bool:
    return "CompiledFunction" in type(node).__name__


def accumulates(leaf: Node) -> bool:
    """Whether the backward pass at work will add to the `grad` of a leaf."""
    try:
        return torch._C._will_engine_execute_node(leaf)
    except RuntimeError:  # torch's answer where autograd.grad returns this very gradient
        return False


def differentiable(output: Any) -> Iterator[Tensor]:
    """Tensors with a gradient, within lists and mappings too."""
    if isinstance(output, Tensor):
        if output.requires_grad:
            yield output
        return
    if isinstance(output, Mapping):
        output = output.values()
    elif not isinstance(output, list | tuple):
        return
    for part in output:
        yield from differentiable(part)
