"""The base of Shampoo, SOAP and Muon apart from their formulas: a gradient's way through the ranks.

A step, in this order:

1. every rank's part of the gradients, unscaled, travels to the owners of its blocks, and with it
   what has to be agreed on: `found_inf`, and which parameters have a gradient;
2. the owners work on their blocks, and advance the state that only they have; vectors and
   scalars, which have no blocks, are stepped by AdamW where they lie;
3. the squares from which norms of whole layers are made are added up over the ranks;
4. directions travel back to all that hold a part of the parameter, piece by piece, and every rank
   moves its part of the weights by each piece as it arrives.

That is one sum and a few rounds each way for each process group, more where more bytes travel
(`largebatch.optim.sharding.redistribution`), and the same ones on every rank whatever gradients are
missing: a parameter takes part in a step if any rank has a gradient for it, and counts as zeros
where there is none. Only a rank that lacks some gradient waits for the device to learn which the
others have.

Plain parameters are those of one process, or of DDP's replicas: each rank computes all of it, which
needs no collective, but needs like ranks: on unlike hardware replicas would drift apart. With
`process_group` the ranks of the group share the work and the memory of the factors; their gradients
must be the same, as DDP leaves them, and results travel once.

Promises as in `largebatch.optim.layerwise.optimizer`. The device is waited for where roots or bases
are taken, which cannot be done without: see `largebatch.optim.math.decompositions`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from largebatch.optim.base import Group
from largebatch.optim.blockwise.block_work import (
    BlockAtWork,
    BlockTask,
    Directions,
    GatheredStep,
    GroupGradients,
    PartAtWork,
    factor_beta,
    run_tasks,
)
from largebatch.optim.blockwise.hyperball import RADIUS, Sphere, on_sphere
from largebatch.optim.blockwise.owned_state import OwnedState
from largebatch.optim.blockwise.step_stats import (
    DROPPED_ROW,
    BlockDirection,
    BlockStats,
    Tally,
)
from largebatch.optim.blockwise.work_group import DROPPED, BlockedLayer, BlockWorkGroup
from largebatch.optim.math.adam import adam_direction, corrected
from largebatch.optim.math.decompositions import REFRESHES
from largebatch.optim.math.matrix_roots import full_precision
from largebatch.optim.math.tensors import add, average, descend, on_device, without_too_large, write
from largebatch.optim.options import require, require_one_of
from largebatch.optim.sharding.layout import Name, local

Here = Callable[[Tensor], Tensor]
"""The view of a piece in tensors that are laid out like this rank's part of a parameter."""


class BlockwiseOptimizer(OwnedState):
    """Base of optimizers that work on whole blocks of matrices."""

    _stats: tuple[BlockStats, ...] = ()

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options(options)
        require(
            isinstance(options["maximize"], bool), "maximize", "True or False", options["maximize"]
        )
        require_one_of(options, "decay", ("decoupled", "l2"))
        if "hyperball" in options:
            require_one_of(options, "hyperball", (False, True))
            decay = options["weight_decay"]
            is_free = not options["hyperball"] or options.get("algorithm") == "adamw" or decay == 0
            require(is_free, "weight_decay", "0 with hyperball, which keeps the norm", decay)

    # What a subclass says of its formula --------------------------------------------------------

    def _work_on_all(self, blocks: Sequence[BlockAtWork]) -> list[BlockDirection]:
        """Advance the state of the blocks owned here by one gradient; return their directions.

        Called with `full_precision` set.
        """
        assert not blocks, "an optimizer with blocks works on them"
        return []

    def _rate(self, layer: BlockedLayer, group: Group) -> float | Tensor:
        """The learning rate of a layer."""
        lr: float | Tensor = group["lr"]
        return lr

    def _uses_momentum(self, group: Group) -> bool:
        """Whether a layer's steps are averaged once more where the weights lie."""
        return False

    def _with_momentum(
        self, layer: BlockedLayer, group: Group, step: Tensor, here: Here, skip: Tensor | None
    ) -> Tensor:
        """Return the average of a layer's steps, from a piece that lies `here` in its tensors.

        Called where `_uses_momentum` says so, by a subclass that has it.
        """
        raise NotImplementedError

    def _betas(self, group: Group) -> dict[str, float]:
        beta1, beta2 = group["betas"]
        return {"exp_avg": beta1, "exp_avg_sq": beta2}

    def _elementwise_keys(self, has_blocks: bool, group: Group) -> tuple[str, ...]:
        if not has_blocks:
            return ("exp_avg", "exp_avg_sq")
        return ("momentum_buffer",) if self._uses_momentum(group) else ()

    # The phases of a step -----------------------------------------------------------------------

    def _make_step(self) -> None:
        self._reports.heed()
        self._refuse_sparse()
        self._counts.settle()
        self._counts.read(self._states())
        gathered = self._gather(self._work_groups())
        with full_precision():
            directions = [self._work(gradients, gathered) for gradients in gathered.gradients]
        for ours in directions:
            self._descend(ours, gathered)
        self._stats = tuple(ours.stats for ours in directions)
        self._advance(gathered)

    def _gather(self, work_groups: list[BlockWorkGroup]) -> GatheredStep:
        """Bring the gradients to the owners of their blocks, before any state is touched."""
        device = work_groups[0].layers[0].device if work_groups else torch.device("cpu")
        flag = self._own_found_inf(device)
        active: set[Tensor] = set()
        gradients: list[GroupGradients] = []
        for work_group in work_groups:
            read = [self._gradient(layer) for layer in work_group.layers]
            ours, dropped = [each[0] for each in read], [each[1] for each in read]
            present = [part is not None for part in ours]
            sums = None
            if work_group.is_sharded:
                # Of all ranks: is the step to be skipped, and who has a gradient of what. Made on
                # the device: a copy to it would wait for all that it has still to do.
                size = 1 + len(present)
                sums = torch.ones(
                    size, dtype=work_group.dtype, device=work_group.redistribution.device
                )
                sums[0] = 0.0 if flag is None else flag
                for place, has in enumerate(present):
                    if not has:
                        sums[1 + place] = 0.0
            arrived, totals = work_group.redistribution.to_owners(ours, sums)
            if totals is not None:
                if flag is not None:
                    flag = totals[0]
                if not all(present):
                    present = [count > 0 for count in totals[1:].tolist()]
            active |= {
                layer.param for layer, has in zip(work_group.layers, present, strict=True) if has
            }
            gradients.append(GroupGradients(work_group, ours, dropped, arrived))
        return GatheredStep(gradients, active, None if flag is None else flag != 0)

    def _gradient(self, layer: BlockedLayer) -> tuple[Tensor | None, Tensor | None]:
        """This rank's part of the gradient to descend along, not to be written to; and how many of
        its elements were dropped, 0-d."""
        param, group = layer.param, self._group_of[layer.param]
        if param.grad is None:
            return None, None
        grad = self._unscaled_gradient(param)
        if group["maximize"]:
            grad = -grad
        if group["decay"] == "l2" and group["weight_decay"]:
            grad = grad.add(local(param), alpha=group["weight_decay"])
        return without_too_large(grad)

    def _work(self, gradients: GroupGradients, gathered: GatheredStep) -> Directions:
        """The directions of the blocks owned here, and of this rank's part of what has none."""
        work_group = gradients.work_group
        tally = Tally(work_group.layers, work_group.dtype, work_group.redistribution.device)
        blocks: list[dict[int, Tensor]] = [{} for _ in work_group.layers]
        at_work: list[tuple[int, BlockAtWork]] = []
        alone: list[PartAtWork] = []
        for place, layer in enumerate(work_group.layers):
            if layer.param not in gathered.active:
                continue
            param = layer.param
            group = self._group_of[param]
            self._make_state(layer, group)
            step = self._counts.of(param, self.state[param]) + 1
            ages = self._ages_of(layer, step)
            tally.moves(place, gradients.dropped[place])
            if not layer.blocks:
                part = gradients.parts[place]
                if part is None:
                    part = torch.zeros_like(local(param), dtype=layer.dtype)
                alone.append(PartAtWork(place, layer, group, part, step, ages))
            for k, whole in gradients.blocks[place].items():
                grad = whole.to(layer.dtype).reshape(layer.blocks[k].shape)
                state = self._block_state(layer, k)
                shared = self.failures, gathered.skip, self._beside
                work = BlockAtWork(layer, k, group, grad, state, step, ages, *shared)
                at_work.append((place, work))
        elementwise = self._work_on_parts(work_group, alone, gathered.skip)
        for own in alone:
            tally.add_part(own.place, own.grad, elementwise[own.place])
        found = self._work_on_all([work for _, work in at_work])
        for (place, work), done in zip(at_work, found, strict=True):
            k = work.number
            blocks[place][k] = done.direction.reshape(work.layer.blocks[k].box.size)
            tally.add_block(place, k, work.grad, done, work.state.get("condition"))
        return Directions(work_group, blocks, elementwise, tally.stats())

    def _descend(self, ours: Directions, gathered: GatheredStep) -> None:
        """Bring the directions back, and move this rank's part of the weights."""
        work_group, stats = ours.work_group, ours.stats
        failed = self._reports.own(work_group)
        sums = [stats.squares.flatten(), stats.conditions, failed]
        pieces, totals = work_group.redistribution.to_holders(ours.blocks, torch.cat(sums))
        assert totals is not None
        squares, stats.conditions, failed = torch.split(totals, [part.numel() for part in sums])
        # A sum of squares that has overflown is large and not infinite: ratios stay numbers.
        stats.squares = squares.view_as(stats.squares).clamp(max=torch.finfo(totals.dtype).max)
        self._reports.receive(work_group, failed)
        scales, moved = stats.scales(), set(stats.moved)
        spheres = self._spheres(stats, gathered.skip)
        for piece, part in pieces:  # all are to be taken, whether they move anything or not
            if piece.tensor in moved:
                layer = work_group.layers[piece.tensor]
                scale = scales[piece.tensor].to(layer.device, layer.dtype)
                here = partial(piece.box.of, within=layer.placement.boxes[layer.placement.me])
                sphere = spheres.get(piece.tensor)
                self._move(layer, part.to(layer.dtype), here, gathered.skip, scale, sphere)
        for place, direction in ours.elementwise.items():
            self._move(work_group.layers[place], direction, lambda tensor: tensor, gathered.skip)
        if stats.moved:
            known = [self.state[work_group.layers[place].param][DROPPED] for place in stats.moved]
            news = stats.squares[:, DROPPED_ROW].unbind()
            dropped = [news[place].to(old) for place, old in zip(stats.moved, known, strict=True)]
            add(known, dropped, gathered.skip)

    def _spheres(self, stats: BlockStats, skip: Tensor | None) -> dict[int, Sphere]:
        """The steps of the layers that stay on a sphere, by their place."""
        found = {}
        for place in stats.moved:
            layer = stats.layers[place]
            group = self._group_of[layer.param]
            if layer.blocks and group.get("hyperball"):
                radius = self.state[layer.param][RADIUS]
                squares = stats.squares[place].to(radius.device)
                sphere = on_sphere(squares[0], squares[2], radius, self._rate(layer, group))
                write([radius], [sphere.radius], skip)
                found[place] = sphere
        return found

    def _move(
        self,
        layer: BlockedLayer,
        direction: Tensor,
        here: Here,
        skip: Tensor | None,
        scale: Tensor | None = None,
        sphere: Sphere | None = None,
    ) -> None:
        """Move the piece of this rank's part of the weights that lies `here` in it.

        Args:
            scale: what the direction is to be multiplied by, 0-d; None: 1.
        """
        group, weight = self._group_of[layer.param], here(local(layer.param))
        # The weights themselves, where they are as wide and the step is made in any case.
        new = weight.to(layer.dtype, copy=skip is not None)
        rate: float | Tensor
        if sphere is not None:
            new.mul_(sphere.keep.to(layer.dtype))
            rate = sphere.rate.to(layer.dtype)
        else:
            if layer.blocks and self._uses_momentum(group):
                direction = direction if scale is None else direction * scale
                direction, scale = self._with_momentum(layer, group, direction, here, skip), None
            rate = self._rate(layer, group)
            if isinstance(rate, Tensor):
                rate = on_device(rate, weight.device).to(layer.dtype)
            if group["decay"] == "decoupled" and group["weight_decay"]:
                descend(new, new, rate * group["weight_decay"])
        descend(new, direction, rate if scale is None else rate * scale)
        if new is not weight:
            write([weight], [new], skip)

    def _advance(self, gathered: GatheredStep) -> None:
        """Count the step, on the device and on the host."""
        moved = [
            layer.param for gradients in gathered.gradients for layer in gradients.work_group.layers
        ]
        moved = [param for param in moved if param in gathered.active]
        by_device: dict[torch.device, list[Tensor]] = {}
        for param in moved:
            step = self.state[param]["step"]
            by_device.setdefault(step.device, []).append(step)
        for device, steps in by_device.items():
            add(steps, 1.0, None if gathered.skip is None else gathered.skip.to(device))
        self._counts.stepped(moved, gathered.skip)

    def _work_on_parts(
        self, work_group: BlockWorkGroup, parts: Sequence[PartAtWork], skip: Tensor | None
    ) -> dict[int, Tensor]:
        """Advance the state of this rank's parts of what has no blocks; return their directions by
        the layers' places. The same layers on every rank."""
        return {
            part.place: self._adamw(part.layer.param, part.group, part.grad, part.ages, skip)
            for part in parts
        }

    def _adamw(
        self,
        param: Tensor,
        group: Group,
        grad: Tensor,
        ages: Mapping[str, float],
        skip: Tensor | None,
    ) -> Tensor:
        """m̂ / (√v̂ + ε) of this rank's part of a parameter; advances m and v."""
        (beta1, beta2), state = group["betas"], self.state[param]
        exp_avg, exp_avg_sq = local(state["exp_avg"]), local(state["exp_avg_sq"])
        average([exp_avg], [grad], beta1, skip)
        average([exp_avg_sq], [grad * grad], beta2, skip)
        mean = corrected(exp_avg, beta1, ages["exp_avg"])
        squares = corrected(exp_avg_sq, beta2, ages["exp_avg_sq"])
        return adam_direction(mean, squares, group["eps"])

    def layer_stats(self) -> dict[Name, dict[str, Tensor]]:
        """What the last step was like, for every layer moved by it.

        Keys are the parameters' names where the optimizer was given `model.named_parameters()`,
        else their index over all groups. Values are 0-d tensors on the device:

        - `weight_norm`: ‖w‖ before the step;
        - `update_norm`: ‖u‖ of the step's direction as it goes into momentum, decay and lr;
        - `trust_ratio`: what the preconditioned direction was multiplied by for that length;
        - `cosine`: of the angle between u and the gradient, 1 for plain gradient descent;
        - `condition_number`: the largest of the layer's factors when roots or bases were last
          taken; for layers that are preconditioned only;
        - `dropped_elements`: how many elements of the gradient were taken for 0, see below.

        An element of a gradient above 1.8e16 (FP64: 1.3e151), which is finite but whose square FP32
        could not average with others, counts as 0; the state sums them up as `dropped_elements`.
        After a step masked by `found_inf` they are void.
        """
        return {name: layer for stats in self._stats for name, layer in stats.by_layer()}


class SecondOrderOptimizer(BlockwiseOptimizer):
    """Base of optimizers that precondition blocks by Kronecker factors."""

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options(options)
        for name in ("block_size", "precondition_interval"):
            whole = isinstance(options[name], int) and options[name] >= 1
            require(whole, name, "a whole number >= 1", options[name])
        longest = options["max_preconditioner_dim"]
        holds = longest is None or (isinstance(longest, int) and longest >= 1)
        require(holds, "max_preconditioner_dim", "a whole number >= 1 or None", longest)
        for name in ("merge_dims", "precondition"):
            require(isinstance(options[name], bool), name, "True or False", options[name])
        require_one_of(options, "sides", ("both", "one"))
        require_one_of(options, "refresh", REFRESHES)

    def _work_on(self, block: BlockAtWork) -> BlockTask:
        """Advance a block's state by one gradient, and return its direction."""
        raise NotImplementedError

    def _work_on_all(self, blocks: Sequence[BlockAtWork]) -> list[BlockDirection]:
        return run_tasks([self._work_on(block) for block in blocks])

    def _betas(self, group: Group) -> dict[str, float]:
        factors = factor_beta(group)
        return {**super()._betas(group), "factor": 0.0 if factors == 1 else factors}
