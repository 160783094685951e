"""What a layer-wise step on a CPU works on, as chunks and as blocks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor

from largebatch.optim.layerwise.chunks import ChunkGroup, Way
from largebatch.optim.layerwise.cpu_blocks import Scratch, square_of
from largebatch.optim.sharding.layout import PLAIN, local


def locals_of(tensors: list[Tensor]) -> list[Tensor]:
    """Return this rank's part of each."""
    return tensors if set(map(type, tensors)) <= {*PLAIN} else [local(each) for each in tensors]


@dataclass(frozen=True)
class CpuStep:
    """The tensors of a step by the place of their parameter in the plan, local parts all of them.

    Attributes:
        grads: as they were found.
        scratch: of the optimizer.
        params: the parameters.
        weights: their wider copies where such are kept, else the parameters again.
        states: of the parameters, not local.
        multiplier: what a gradient is multiplied by, unless it is 1.
        grad_norms: of the gradients as they were found, where they are known: by the identity of a
            chunk group.
    """

    grads: list[Tensor]
    scratch: Scratch
    params: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    multiplier: float = 1.0
    grad_norms: Mapping[int, Tensor] = field(default_factory=dict)

    def multiplier_of(self, chunks: ChunkGroup) -> float:
        """What a gradient is multiplied by, to be descended along."""
        return -self.multiplier if chunks.group["maximize"] else self.multiplier

    def state(self, chunks: ChunkGroup, key: str) -> list[Tensor]:
        """The chunks of a state that is shaped like the parameters."""
        if chunks.whole_places is not None:
            return locals_of([self.states[place][key] for place in chunks.whole_places])
        return [chunk.of(local(self.states[chunk.place][key])) for chunk in chunks.members]

    # Packed -------------------------------------------------------------------------------------

    def room(self, chunks: ChunkGroup, name: str) -> Tensor:
        """Working memory of a pack, which nothing else has until its second pass is over."""
        return self.scratch.take(name, chunks.dtype, chunks.start, chunks.pack.numel)

    def laid_out(self, chunks: ChunkGroup, name: str, tensors: Sequence[Tensor]) -> Tensor:
        """The chunks of tensors end to end in such memory."""
        flat = self.room(chunks, name)
        torch._foreach_copy_(chunks.pack.views(name, flat), chunks.cut(tensors))
        return flat

    def write_weights(self, chunks: ChunkGroup) -> None:
        """Write the laid out weights where they are, and to parameters that they are copies of."""
        laid_out = chunks.pack.views("weights", self.room(chunks, "weights"))
        torch._foreach_copy_(chunks.cut(self.weights), laid_out)
        self.write_params(chunks)

    def laid_out_state(self, chunks: ChunkGroup, key: str) -> Tensor:
        """A state of the chunks end to end; to be written by `write_state` where it has changed.

        Entries that are plain tensors become views of one tensor and need no copying from then on.
        Whoever puts others in their place finds these laid out anew at the next step.
        """
        places = chunks.whole_places
        entries = [self.states[place][key] for place in places or ()]
        if places is None or not set(map(type, entries)) <= {*PLAIN}:
            flat = self.room(chunks, key)
            torch._foreach_copy_(chunks.pack.views(key, flat), self.state(chunks, key))
            return flat
        known = chunks.states.get(key)
        if known is None or not all(map(is_, entries, known[1])):
            flat = torch.zeros(chunks.pack.numel, dtype=chunks.dtype)
            known = chunks.states[key] = flat, chunks.pack.split(flat)
            torch._foreach_copy_(known[1], entries)
            for place, view in zip(places, known[1], strict=True):
                self.states[place][key] = view
        return known[0]

    def write_state(self, chunks: ChunkGroup, key: str, flat: Tensor) -> None:
        """Write a state that was copied to be laid out."""
        if key not in chunks.states:
            torch._foreach_copy_(self.state(chunks, key), chunks.pack.views(key, flat))

    def write_params(self, chunks: ChunkGroup) -> None:
        """Give parameters the values of their wider copies, where such are kept."""
        if self.weights is not self.params:
            own, params = chunks.cut(self.weights), chunks.cut(self.params)
            if own[0].dtype != params[0].dtype:
                torch._foreach_copy_(params, own)

    # Streamed -----------------------------------------------------------------------------------

    def flats(self, chunks: ChunkGroup, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.view(-1) for tensor in chunks.cut(tensors)]

    def block(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Working memory of a block's length."""
        return self.scratch.take(f"{name} of a block", dtype, 0, like.numel())

    def wide(self, name: str, block: Tensor, dtype: torch.dtype) -> Tensor:
        """A block in the dtype of the arithmetic: itself, or a copy in working memory."""
        return block if block.dtype == dtype else self.block(name, block, dtype).copy_(block)

    def norms(self, chunks: ChunkGroup, tensors: Sequence[Tensor]) -> Tensor:
        """The norm of each chunk of gradients or weights, finite where the chunk is."""
        if chunks.way is Way.PACKED:
            return chunks.pack.norms(self.laid_out(chunks, "gradients", tensors))
        squares = [
            square_of(flat, chunks.dtype, self.scratch) for flat in self.flats(chunks, tensors)
        ]
        return torch.tensor(squares, dtype=torch.float64).sqrt()
