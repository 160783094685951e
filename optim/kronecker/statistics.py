"""The statistics of Kronecker factors, gathered in a step's passes by hooks on a model's layers.

For a layer with input rows a and gradients δ = ∂L/∂s of an item's loss L by the layer's output rows
s (`largebatch.optim.kronecker.layers` says what the rows are), the Kronecker factors are

    A = (1 / P) Σ aaᵀ over all P positions        G = (1 / N) Σ δδᵀ over all positions

with N the number of items, that is, of terms in the mean that the loss is: samples, or tokens. With
one position per item, as in a network without weight sharing, A ⊗ G is the K-FAC approximation of
the Fisher matrix's block (Martens, Grosse 2015, https://arxiv.org/abs/1503.05671); for convolutions
it is KFC's (Grosse, Martens 2016, https://arxiv.org/abs/1602.01407, with the average over positions
in A and the sum in G, which their product does not see); for sequences it is that of "expand"
(Eschenhagen et al. 2023, https://arxiv.org/abs/2311.00636).

**Their scale.** A backward pass does not see δ. Whoever wrote the loop scaled the losses of the
passes, by 1 / accumulation or by a share of the batch, such that `p.grad` at the step is that of
the mean over all N items. R ranks that average their gradients divide by R afterwards; so on each
of them a pass sees

    δ̃ = (R / N) δ · c         c: the loss scale of mixed precision, 1 without

whatever the passes, their number and their sizes; and neither N nor R nor c is known in the pass.
So Σ δ̃δ̃ᵀ is kept as it comes, with the number of items beside it, and at the step, when both have
been added up over the ranks,

    G = (N / R²c²) Σ δ̃δ̃ᵀ      A = (1 / P) Σ aaᵀ

which is the same for every split of the same N items over passes and ranks, and for a batch
repeated any number of times. Where ranks do not hold equally many items, `loss` has to be scaled so
that its average over ranks is the mean over all items, for the gradient's sake as well.

**Which passes count.** Those of training, known by what they do: they add the gradient of the
layer's own weight to its `p.grad`. `autograd.grad`, `backward(inputs=…)`, torch.func and calls with
other weights do not, whatever they differentiate. What a pass has left here goes where its gradient
goes: `zero_grad`, of the optimizer or of a module, takes it away. A forward pass counts once, also
where several backward passes go through it: their δ̃ add up, as their gradients do. One that has
been differentiated with `create_graph`, for a penalty, counts where the same loss also reaches
what the model returned for it; else it has served the penalty alone.
"""

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from largebatch.optim.base import untraced
from largebatch.optim.kronecker.graph import (
    accumulates,
    before_views,
    differentiable,
    mark,
    used_elsewhere,
)
from largebatch.optim.kronecker.layers import (
    FactorSums,
    ForwardRecord,
    Layer,
    ModelCall,
    input_sum,
    output_sum,
)
from largebatch.optim.math.matrix_roots import full_precision
from largebatch.optim.math.tensors import scalar
from largebatch.optim.sharding.layout import is_dtensor


class FactorStatistics:
    """Sums over the passes of a model's layers from which Kronecker factors are made.

    Args:
        before: to be done before the model is called; held weakly.
        sampled: take the gradients from `backward` alone, and not from the passes of training.
    """

    def __init__(self, model: nn.Module, before: Callable[[], None], sampled: bool) -> None:
        self._sampled = sampled
        self.active = True
        """Whether passes are taken note of."""
        self.passes: set[Layer] = set()
        """The layers that any pass has been seen through."""
        self.elsewhere: set[Layer] | None = None
        """Those found to be used without their modules too; None: not looked for."""
        self.looks = True
        """Whether it is looked for: it takes a walk through the graph of each pass."""
        self._before = weakref.WeakMethod(before)
        self._call: ModelCall | None = None
        self._last: tuple[GradientEdge, ForwardRecord] | None = None
        self._told: int | None = None
        self._told_before = 0
        self._interval = 0
        self._forget()
        self._handles: dict[Layer | None, list[RemovableHandle]] = {
            None: [
                model.register_forward_pre_hook(Hook(self, "begin_call")),
                model.register_forward_hook(Hook(self, "end_call"), always_call=True),
            ]
        }
        # Not left on a model that outlives its optimizer: torch.jit.script would fail on them.
        weakref.finalize(self, remove, self._handles)

    def watch(self, layers: Iterable[Layer]) -> None:
        """Watch these layers from now on; sums of layers watched before remain."""
        layers = dict.fromkeys(layers)
        for layer in [layer for layer in self._handles if layer and layer not in layers]:
            remove({layer: self._handles.pop(layer)})
            self._sums.pop(layer, None)
        if layers.keys() - self._handles.keys():
            self.looks, self.elsewhere = True, None
            if "torch._dynamo" in sys.modules:
                torch.compiler.reset()  # what has been compiled without a hook runs without it
        for layer in layers:
            if layer not in self._handles:
                # First of the hooks: FSDP2's puts the shards in the place of the weight.
                hook = Hook(self, "see_forward", layer)
                handle = layer.module.register_forward_hook(hook, with_kwargs=True, prepend=True)
                self._handles[layer] = [handle]

    def _forget(self) -> None:
        self._interval += 1
        self._sums: dict[Layer, FactorSums] = {}
        self._by_layer: dict[Layer, int] = {}
        self._by_model = 0
        self._open: list[tuple[GradientEdge, ForwardRecord | ModelCall]] = []
        self._arrived: ModelCall | None = None
        self._finished: dict[Layer, int] = {}
        self._task = -1

    # What forward passes do ---------------------------------------------------------------------

    def begin_call(self) -> None:
        before = self._before()
        if before is not None:
            before()
        self._call, self._last = ModelCall(), None

    def end_call(self, output: Any) -> None:
        """Count the samples of a call, by the leading dimension of its output."""
        (call, last), self._call, self._last = (self._call, self._last), None, None
        if call is None or not self._takes_note():
            return
        returned = [*differentiable(output)]
        if self.looks and returned:
            layers = [layer for layer in self._handles if layer is not None]
            found = used_elsewhere(returned, layers)
            self.elsewhere = found | (self.elsewhere or set())
        tensors = [tensor for tensor in returned if tensor.dim()]
        if tensors:
            call.items = len(tensors[0])
            for tensor in tensors if not self._sampled else tensors[:1]:
                if last is not None and get_gradient_edge(tensor) == last[0]:
                    last[1].is_last = True
                self._await(tensor, call)

    def see_forward(self, layer: Layer, x: Tensor, output: Tensor) -> None:
        """Sum up the input now, not when the gradient arrives, so that no activation is kept."""
        if not self._takes_note() or not output.requires_grad:
            return
        weight = layer.module.weight
        assert isinstance(weight, Tensor)
        own = weight is layer.weight or is_dtensor(layer.weight)  # or FSDP2's unsharded one
        if not (own and weight.is_leaf and weight.requires_grad):
            return
        if is_dtensor(x) or is_dtensor(output) or not layer.fits(x, output):
            raise RuntimeError(
                f"K-FAC needs to see whole rows of layer {layer.name!r}, which is tensor-parallel: "
                "shard its parameters by fully_shard alone, or freeze it"
            )
        self.passes.add(layer)
        with exactly(x.device):
            inputs, positions = input_sum(layer, x.detach())
        indices = x.detach() if isinstance(layer.module, nn.Embedding) else x.new_empty(0)
        items = len(output) if output.dim() > layer.sample_dims else 1
        leaf = get_gradient_edge(weight).node
        if self.looks:
            mark(layer, x, output, leaf)
        record = ForwardRecord(layer, indices, inputs, positions, items, leaf, self._call)
        if self._call is not None:
            self._last = get_gradient_edge(output), record
        self._await(output, record)

    def _takes_note(self) -> bool:
        """Not within torch.func, whose gradients are never those of `p.grad`."""
        transformed: bool = torch._C._are_functorch_transforms_active()
        return self.active and torch.is_grad_enabled() and not transformed

    def _await(self, output: Tensor, awaiting: ForwardRecord | ModelCall) -> None:
        output = before_views(output)
        if self._sampled:
            self._open.append((get_gradient_edge(output), awaiting))
            return
        hook: Callable[[Tensor], None]
        if isinstance(awaiting, ModelCall):
            hook = partial(self._reach, awaiting)
        else:
            hook = partial(self._arrive, awaiting)
        output.register_hook(hook)  # type: ignore[no-untyped-call]

    # What backward passes do --------------------------------------------------------------------

    @untraced
    def _reach(self, call: ModelCall, grad: Tensor) -> None:
        call.reached, self._arrived = self._enter(), call

    @untraced
    def _arrive(self, record: ForwardRecord, grad: Tensor) -> None:
        if not accumulates(record.leaf):
            record.in_penalty |= torch.is_grad_enabled()  # as `create_graph` sets it
            return
        task, call = self._enter(), record.call
        if record.is_last and call is not None:
            self._reach(call, grad)  # whose own hook comes after this one
        reached = call is not None and call.reached == task
        if record.in_penalty and not reached:
            return
        self._drop_if_thrown_away(look=True)
        if call is None:
            call = self._arrived
        elif not reached:
            call = None
        self._count(call)
        kept = record.grad if record.interval == self._interval else None
        self._add(record, grad.detach(), kept)
        if torch._C._autograd._get_current_graph_task_keep_graph():
            record.grad = grad.detach() if kept is None else kept + grad.detach()

    def _enter(self) -> int:
        """Return the number of the running backward pass; `_finish` is called at its end."""
        task: int = torch._C._current_graph_task_id()
        if task != self._task:
            self._task = task
            Variable._execution_engine.queue_callback(self._finish)  # as DDP does
        return task

    @untraced
    def _finish(self) -> None:
        """A backward pass has ended. Without a gradient where FSDP2 has not reduced it yet."""
        self._arrived = None
        self._told_before = self._told or 0
        grads = {layer: layer.weight.grad for layer in self._sums}
        self._finished = {layer: grad._version for layer, grad in grads.items() if grad is not None}

    def _count(self, call: ModelCall | None) -> None:
        if call is not None and call.interval != self._interval:
            call.interval = self._interval
            self._by_model += call.items

    def _add(self, record: ForwardRecord, grad: Tensor, kept: Tensor | None = None) -> None:
        """Add a gradient to the sums.

        Args:
            kept: δ̃ that has been added before, of the same positions.
        """
        layer, again = record.layer, record.interval == self._interval
        with exactly(grad.device):
            if kept is None:
                outputs = output_sum(layer, record.x, grad)
            else:
                outputs = output_sum(layer, record.x, kept + grad)
                outputs -= output_sum(layer, record.x, kept)
            if layer not in self._sums:
                zeros = torch.zeros_like(record.inputs), torch.zeros_like(outputs)
                self._sums[layer] = FactorSums(*zeros, outputs.new_zeros(()))
            sums = self._sums[layer]
            sums.outputs += outputs
            if again:
                return
            sums.inputs += record.inputs
            sums.positions += scalar(record.positions, outputs)
        record.interval = self._interval
        self._by_layer[layer] = self._by_layer.get(layer, 0) + record.items

    def backward(self, loss: Tensor) -> None:
        """Gradients by the layers' outputs alone: none arrives at a parameter, or at DDP."""
        if not self.active:
            return
        edges = [edge for edge, _ in self._open]
        if not edges:
            raise RuntimeError("the model has not been called with gradients since the last step")
        grads = torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True)
        for grad, (_, awaiting) in zip(grads, self._open, strict=True):
            if grad is not None:
                if isinstance(awaiting, ModelCall):
                    self._count(awaiting)
                else:
                    self._add(awaiting, grad)

    # What the step asks -------------------------------------------------------------------------

    def looked(self) -> bool:
        """Return whether passes since the last step were searched for weights used elsewhere."""
        return self.looks and (self.elsewhere is not None or bool(self._sums))

    def tell(self, items: int) -> None:
        self._told = (self._told or 0) + items

    def drop(self) -> None:
        """Forget the passes whose gradients are thrown away."""
        if self._sums and not self._sampled:
            self._told = None
            self._forget()

    def _drop_if_thrown_away(self, look: bool) -> None:
        """Forget what passes have left whose gradients somebody has taken out of `p.grad`.

        Args:
            look: whether to look for zeros as well, where a gradient has been written to. Waits.
        """
        if self._sampled or not self._finished:
            return
        for layer, version in self._finished.items():
            grad = layer.weight.grad
            changed = look and grad is not None and grad._version != version
            # A shard of zeros says nothing of the other ranks'.
            if grad is None or (changed and not is_dtensor(grad) and not bool(grad.any())):
                self._sums.pop(layer, None)
        self._finished = {}
        if not self._sums:
            self._told = ((self._told or 0) - self._told_before) or None
            task, arrived = self._task, self._arrived
            self._forget()
            self._task, self._arrived = task, arrived

    def take(self) -> tuple[dict[Layer, FactorSums], int]:
        """Return the sums and the number of items since the last call, on this rank."""
        self._drop_if_thrown_away(look=False)
        if self._open and not self._sums:
            raise RuntimeError(
                "fisher='true' takes the curvature from fisher_backward, which has not been called "
                "since the last step: call it after the forward pass, or choose fisher='empirical'"
            )
        items = self._told or self._by_model or max(self._by_layer.values(), default=0)
        sums = self._sums
        self._told, self._told_before = None, 0
        self._forget()
        return sums, items


@contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, and no matrix product of less than FP32's precision."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False), full_precision():
        yield


def remove(handles: Mapping[Layer | None, Iterable[RemovableHandle]]) -> None:
    for some in handles.values():
        for handle in some:
            handle.remove()


class Hook:
    """A hook that keeps neither the statistics alive nor goes along with a copied model.

    Args:
        method: of the statistics, where it is for no layer.
    """

    def __init__(
        self, statistics: FactorStatistics | None, method: str, layer: Layer | None = None
    ) -> None:
        self._statistics = None if statistics is None else weakref.ref(statistics)
        self._method, self._layer = method, layer

    @untraced  # in a compiled model it runs between two graphs
    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        statistics = None if self._statistics is None else self._statistics()
        if statistics is None:
            return
        if self._layer is not None:
            kwargs, output = rest
            statistics.see_forward(self._layer, args[0] if args else kwargs["input"], output)
        else:
            getattr(statistics, self._method)(*rest)

    def __reduce__(self) -> tuple[type["Hook"], tuple[None, str]]:
        return Hook, (None, "")
