"""Muon for the hidden matrices, AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) orthogonalises the momentum of
a matrix. It is made for hidden layers: its author leaves embeddings, the output head and vectors to
AdamW. Given a model, this finds them by their modules, tied ones included; given names, by those.
The kernel of a convolution is the matrix (out, in * height * width), as in the author's code.

The arithmetic is that of torch.optim.Muon and torch.optim.AdamW, to the last bit. By default
`adjust_lr_fn="match_rms_adamw"` (Liu et al. 2025, arXiv:2502.16982) lets both share one learning
rate; torch's default is "original".
"""

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.optimizer import StateDict

from largebatch.optim.base import GroupedOptimizer
from largebatch.optim.loading import in_own_order
from largebatch.optim.options import require, require_one_of
from largebatch.optim.param_groups import EMBEDDING, ParamEntry, find_parameters, is_called

NAMES: Final = (
    "*embed*", "*wte*", "*wpe*", "*lm_head*", "head.*", "*.head.*", "*unembed*", "*output_layer*",
)  # fmt: skip
"""Patterns (`fnmatch`) of embeddings and output heads, where names are all there is."""

MUON: Final = "muon"
ADAMW: Final = "adamw"

_OPTIONS: Final = (
    "algorithm", "lr", "weight_decay", "momentum", "nesterov", "ns_steps", "adjust_lr_fn", "betas",
    "eps",
)  # fmt: skip

COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
"""Of the Newton-Schulz iteration X → aX + b(XXᵀ)X + c(XXᵀ)²X (Jordan et al.)."""


def orthogonalized(matrix: Tensor, ns_steps: int) -> Tensor:
    """A matrix near the orthogonal one that is nearest to `matrix`, (rows, columns), in bf16.

    Singular values come out between 0.7 and 1.2, which the author found to do as well as 1.
    """
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16()
    wide = x.size(0) <= x.size(1)
    x = x if wide else x.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ns_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


def adjusted(lr: float, adjust_lr_fn: str, rows: int, columns: int) -> float:
    """The rate of an orthogonalized update, so that its size does not depend on its shape."""
    if adjust_lr_fn == "original":
        return lr * math.sqrt(max(1, rows / columns))
    return lr * (0.2 * math.sqrt(max(rows, columns)))


class Muon(GroupedOptimizer):
    """Muon for the hidden matrices and kernels, AdamW for the rest.

    Each group says by `algorithm` ("muon" or "adamw") what steps it; a group without it is split by
    what its parameters are. Both algorithms' options are in each group.

    Args:
        params: the model, whose modules tell embeddings and the output head (the model's own
            `get_output_embeddings()`, else its last linear layer that is in no block of an
            nn.ModuleList); or (name, parameter) pairs, or groups of them.
        adamw: patterns (`fnmatch`) of names that AdamW takes too. With names alone, `NAMES` and
            these, and the last matrix where it has as many rows as an embedding.
        groups: beside a model, groups of its parameters, as of `param_groups`; None: one.
        momentum, nesterov, ns_steps, adjust_lr_fn: of torch.optim.Muon.
        betas, eps: of torch.optim.AdamW.

    Raises:
        ValueError: parameters without names, no matrix for Muon, a value out of range, a tensor of
            three or more dimensions without its module, only with a name.

    >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10))
    >>> for group in Muon(model, lr=0.01).param_groups:
    ...     print(group["algorithm"], group["param_names"])
    muon ['1.weight']
    adamw ['0.weight', '1.bias', '2.weight', '2.bias']
    """

    takes_model = True

    # On the class too, because deepcopy and pickle keep an optimizer's groups and state only.
    _by_adamw: Mapping[Tensor, bool] = {}

    def __init__(
        self,
        params: nn.Module | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        adamw: Sequence[str] = (),
        groups: Iterable[dict[str, Any]] | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov,
            "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn, "betas": betas, "eps": eps,
        }  # fmt: skip
        self._check_options(defaults)
        if isinstance(params, nn.Module):
            entries = find_parameters(params)
            self._by_adamw = _by_module(params, entries, adamw)
            whole = {"params": [(entry.names[0], entry.param) for entry in entries]}
            taken: list[Any] = [whole] if groups is None else list(groups)
        else:
            require(groups is None, "groups", "None where params is no model", "groups")
            taken = list(params)
            if not taken or not isinstance(taken[0], dict):
                taken = [{"params": taken}]
            # A generator, such as named_parameters() itself, is read once.
            taken = [{**group, "params": list(group["params"])} for group in taken]
            pairs = [pair for group in taken for pair in group["params"]]
            named = all(isinstance(pair, tuple) for pair in pairs)
            require(
                named, "params", "the model, or named_parameters(), (name, parameter) pairs",
                "bare parameters",
            )  # fmt: skip
            self._by_adamw = _by_name(pairs, (*NAMES, *adamw))
        super().__init__(taken, defaults)
        has_matrix = any(group["algorithm"] == MUON for group in self.param_groups)
        require(has_matrix, "params", "with at least one hidden matrix for Muon", "none")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch, or two where it has parameters for both algorithms.

        Parameters that the constructor did not see go by shape: matrices and kernels to Muon.

        Raises:
            ValueError: an option out of range, a parameter that its algorithm cannot step.
        """
        self._give_names(param_group)
        given = param_group["params"]
        given = [given] if isinstance(given, Tensor) else list(given)
        parts: dict[str, list[Any]] = {MUON: [], ADAMW: []}
        for item in given:
            param = item[1] if isinstance(item, tuple) else item
            by_adamw = self._by_adamw.get(param, param.dim() < 2)
            parts[param_group.get("algorithm") or (ADAMW if by_adamw else MUON)].append(item)
        before = len(self.param_groups)
        try:
            for algorithm, items in parts.items():
                if items:
                    group = {**param_group, "params": items, "algorithm": algorithm}
                    super().add_param_group(group)
                    self._check_group(self.param_groups[-1])
        except Exception:  # also where the second of two is refused, by torch or here
            del self.param_groups[before:]
            raise

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options(options)
        require_one_of(options, "nesterov", (True, False))
        require_one_of(options, "adjust_lr_fn", ("match_rms_adamw", "original"))
        steps = options["ns_steps"]
        whole = isinstance(steps, int) and 1 <= steps < 100
        require(whole, "ns_steps", "a whole number, 1 to 99", steps)

    def _check_group(self, group: dict[str, Any]) -> None:
        self._check_options(group)
        require_one_of(group, "algorithm", (MUON, ADAMW))
        for param in group["params"]:
            require(not param.is_complex(), "params", "real", param.dtype)
            if group["algorithm"] == MUON:
                accepted = "of two dimensions or more"
                require(param.dim() >= 2, "params of Muon", accepted, param.dim())

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load as torch does; names decide, and what a saved group does not say stays as it is.

        Raises:
            ValueError: parameters that do not fit these.
        """
        state_dict = in_own_order(state_dict, self.param_groups)
        saved, own = state_dict["param_groups"], self.param_groups
        if len(saved) == len(own):  # torch refuses all others
            options = [{k: v for k, v in group.items() if k in _OPTIONS} for group in own]
            filled = [{**known, **group} for known, group in zip(options, saved, strict=True)]
            state_dict = {**state_dict, "param_groups": filled}
        super().load_state_dict(state_dict)

    def _make_step(self) -> None:
        self._refuse_sparse()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if group["algorithm"] == MUON:
                for param in params:
                    self._step_matrix(param, group)
            elif params:
                self._step_adamw(params, group)

    def _step_matrix(self, param: Tensor, group: Mapping[str, Any]) -> None:
        grad, state, momentum = param.grad, self.state[param], group["momentum"]
        assert grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad, memory_format=torch.preserve_format)
        buffer = state["momentum_buffer"]
        buffer.lerp_(grad, 1 - momentum)
        update = grad.lerp(buffer, momentum) if group["nesterov"] else buffer
        matrix = update.flatten(1) if update.dim() > 2 else update  # (rows, columns)
        lr = float(group["lr"])
        rate = adjusted(lr, group["adjust_lr_fn"], *matrix.shape)
        direction = orthogonalized(matrix, group["ns_steps"])
        direction = direction.view(update.shape) if update.dim() > 2 else direction
        param.mul_(1 - lr * group["weight_decay"])
        param.add_(direction, alpha=-rate)

    def _step_adamw(self, params: list[Tensor], group: Mapping[str, Any]) -> None:
        for param in params:
            state = self.state[param]
            if "step" not in state:
                state["step"] = torch.tensor(0.0, dtype=torch.float32)
            for key in ("exp_avg", "exp_avg_sq"):
                if key not in state:
                    state[key] = torch.zeros_like(param, memory_format=torch.preserve_format)
        states = [self.state[param] for param in params]
        grads = [param.grad for param in params if param.grad is not None]
        beta1, beta2 = group["betas"]
        adamw(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _by_module(
    model: nn.Module, entries: list[ParamEntry], patterns: Sequence[str]
) -> dict[Tensor, bool]:
    """Whether AdamW takes a parameter: vectors, embeddings, the head, what else is no matrix."""
    head = _head(model)

    def by_adamw(entry: ParamEntry) -> bool:
        kernel = any(isinstance(module, _KERNELS) for module in entry.modules)
        return (
            entry.param.dim() < 2
            or (entry.param.dim() > 2 and not kernel)
            or any(is_called(EMBEDDING, module) or module is head for module in entry.modules)
            or _any_matches(entry.names, patterns)
        )

    return {entry.param: by_adamw(entry) for entry in entries}


_KERNELS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _head(model: nn.Module) -> nn.Module | None:
    """The layer that makes the outputs: the one that the model names, or its last linear one, but
    for what lies in the blocks of an nn.ModuleList: a model without another has its head elsewhere,
    in a tied embedding.
    """
    for module in model.modules():
        own = getattr(module, "get_output_embeddings", None)
        if callable(own) and isinstance(found := own(), nn.Module):
            return found
    inside = {
        part
        for blocks in model.modules()
        if isinstance(blocks, nn.ModuleList)
        for block in blocks
        for part in block.modules()
        if part is not block
    }
    linear = [
        module
        for module in model.modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and module not in inside
    ]
    return linear[-1] if linear else None


def _by_name(pairs: Sequence[tuple[str, Tensor]], patterns: Sequence[str]) -> dict[Tensor, bool]:
    """The same where only names are known; a tensor that may be a kernel is refused."""
    found = {p: p.dim() < 2 or _any_matches([name], patterns) for name, p in pairs}
    for name, param in pairs:
        if param.dim() > 2 and not found[param]:
            raise ValueError(
                f"params must tell whether {name!r}, of {param.dim()} dimensions, is a "
                "convolution's kernel: give the model, Muon(model, …), or name it in adamw=(…)"
            )
    rows = {p.shape[0] for name, p in pairs if p.dim() == 2 and "embed" in name}
    *_, last = (None, *(param for _, param in pairs if param.dim() == 2))
    if last is not None and last.shape[0] in rows:
        found[last] = True
    return found


def _any_matches(names: Iterable[str], patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)
