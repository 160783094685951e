"""torch's Muon for the matrices, torch's AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) orthogonalises the momentum of
a matrix; torch.optim.Muon takes nothing but matrices. Both are torch's own: this file only joins
them, as a baseline that a training loop can treat like any other optimizer. By default torch's
`adjust_lr_fn="match_rms_adamw"` (Liu et al. 2025, arXiv:2502.16982) lets both share one learning
rate.
"""

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from largebatch.optim.options import require

NamedParameters = Iterable[tuple[str, Tensor]]


class Muon(Optimizer):
    """Muon for the matrices among `params`, AdamW for the rest.

    Args:
        params: (name, parameter) pairs, as `model.named_parameters()` gives them.
        adamw: patterns (`fnmatch`) of names of matrices that AdamW takes too. Embeddings look their
            rows up, which is no matrix product.
        momentum, nesterov, ns_steps, adjust_lr_fn: of torch.optim.Muon.
        betas, eps: of torch.optim.AdamW.

    Raises:
        ValueError: parameters without names, no matrix for Muon, a value out of range.
        RuntimeError: this torch has no Muon; from 2.9 on it has.
    """

    def __init__(
        self,
        params: NamedParameters,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        adamw: Sequence[str] = ("*embedding*",),
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise RuntimeError(
                f"torch.optim.Muon is in torch from 2.9 on, this is {torch.__version__}"
            )
        pairs = list(params)
        named = all(isinstance(pair, tuple) for pair in pairs)
        require(named, "params", "named_parameters(), (name, parameter) pairs", "bare parameters")
        matrices = [(n, p) for n, p in pairs if p.dim() == 2 and not _any_matches(n, adamw)]
        require(bool(matrices), "params", "with at least one matrix for Muon", "none")
        taken = {name for name, _ in matrices}
        others = [(name, param) for name, param in pairs if name not in taken]
        muon = torch.optim.Muon(
            matrices, lr, weight_decay, momentum, nesterov, ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
        )  # fmt: skip
        parts: list[Optimizer] = [muon]
        if others:
            parts.append(AdamW(others, lr, betas, eps, weight_decay))
        groups = [
            group | {"part": place}
            for place, part in enumerate(parts)
            for group in part.param_groups
        ]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self._parts = parts

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only the constructor's groups: it alone knows names.

        Raises:
            ValueError: any other.
        """
        require("part" in param_group, "params", "given to the constructor", "a group added later")
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of both parts; returns the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for place, part in enumerate(self._parts):
            # Loading a state, or unpickling, has put others in their place.
            part.param_groups = [g for g in self.param_groups if g["part"] == place]
            part.state = self.state
            part.step()
        return loss


def _any_matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
