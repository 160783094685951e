"""Which parameters are hidden matrices, for an algorithm of matrices, and which AdamW steps.

Algorithms that turn a whole matrix at once are made for hidden layers: embeddings, the output head
and vectors are left to AdamW. Given a model, they are found by their modules, tied ones included;
given names, by those. The kernel of a convolution is the matrix (out, in · height · width). Another
tensor of three dimensions or more is a stack of matrices, of experts for one, if its group says by
`norm_groups` how it is split; else AdamW's.
"""

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Final

from torch import Tensor, nn
from torch.optim.optimizer import StateDict

from largebatch.optim.base import Group
from largebatch.optim.blockwise.optimizer import BlockwiseOptimizer
from largebatch.optim.blockwise.work_group import BlockedLayer
from largebatch.optim.groups import (
    EMBEDDING,
    ParamEntry,
    find_parameters,
    is_called,
    require_match,
)
from largebatch.optim.options import require, require_one_of
from largebatch.optim.sharding.layout import Name, split_sizes

NAMES: Final = (
    "*embed*", "*wte*", "*wpe*", "*lm_head*", "head.*", "*.head.*", "*unembed*", "*output_layer*",
)  # fmt: skip
"""Patterns (`fnmatch`) of embeddings and output heads, where names are all there is."""

ADAMW: Final = "adamw"

KERNELS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

Given = nn.Module | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
"""A model, (name, parameter) pairs, or groups of them."""

SPLIT: Final = {"decay": "decoupled", "norm_groups": None, "norm_dim": 0}
"""Options that all groups have, beside those of the algorithm."""


class OfHiddenMatrices(BlockwiseOptimizer):
    """Base of optimizers that step hidden matrices themselves, and the rest by AdamW.

    Each group says by `algorithm` what steps it; a group without it is split by what its parameters
    are. Both algorithms' options are in each group.
    """

    takes_model = True

    algorithm: ClassVar[str]
    """The name of the own one."""

    # On the class too, because deepcopy and pickle keep an optimizer's groups and state only.
    _by_adamw: Mapping[Tensor, bool] = {}
    _stacks: frozenset[Tensor] = frozenset()
    _adamw_weight_decay: float | None = None

    def _read(
        self,
        params: Given,
        defaults: dict[str, Any],
        groups: Iterable[dict[str, Any]] | None,
        adamw: str | Sequence[str],
        adamw_weight_decay: float | None,
    ) -> list[Any]:
        """Return the groups of all parameters, and note what is whose.

        Raises:
            ValueError: an option out of range; parameters without names; a pattern that matches
                none of them; a tensor of three dimensions or more of which its name alone does not
                say what it is.
        """
        decay = adamw_weight_decay
        finite = decay is None or 0 <= decay < math.inf
        require(finite, "adamw_weight_decay", "in [0, inf) or None", decay)
        self._check_options(defaults)
        self._adamw_weight_decay = decay
        patterns = _listed(adamw)
        if isinstance(params, nn.Module):
            entries = find_parameters(params)
            _require_matches(patterns, [entry.names for entry in entries])
            self._by_adamw = _by_module(params, entries, patterns)
            kernels = {e.param for e in entries if any(isinstance(m, KERNELS) for m in e.modules)}
            self._stacks = frozenset(
                entry.param
                for entry in entries
                if entry.param.dim() > 2 and entry.param not in kernels
                and not _any_matches(entry.names, patterns)
            )  # fmt: skip
            whole = {"params": [(entry.names[0], entry.param) for entry in entries]}
            return [whole] if groups is None else list(groups)
        require(groups is None, "groups", "None where params is no model", "groups")
        taken: list[Any] = list(params)
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
        _require_matches(patterns, [[name] for name, _ in pairs])
        split = {pair[1] for group in taken if group.get("norm_groups") for pair in group["params"]}
        self._by_adamw = _by_name(pairs, (*NAMES, *patterns), split)
        return taken

    def _require_matrix(self) -> None:
        """Refuse parameters among which there is no hidden matrix."""
        has_matrix = any(group["algorithm"] == self.algorithm for group in self.param_groups)
        owner = type(self).__name__
        require(has_matrix, "params", f"with at least one hidden matrix for {owner}", "none")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch, or two where it has parameters for both algorithms.

        In it, `norm_groups=N`, or a tuple of sizes, splits each of its tensors along `norm_dim`
        into matrices of their own. Parameters that the constructor did not see go by shape:
        matrices and kernels are hidden ones.

        Raises:
            ValueError: an option out of range, a parameter that its algorithm cannot step.
        """
        self._give_names(param_group)
        given = param_group["params"]
        given = [given] if isinstance(given, Tensor) else list(given)
        is_split = param_group.get("norm_groups") is not None
        parts: dict[str, list[Any]] = {self.algorithm: [], ADAMW: []}
        for item in given:
            param = item[1] if isinstance(item, tuple) else item
            by_adamw = self._by_adamw.get(param, param.dim() < 2)
            if param in self._stacks:
                by_adamw = not is_split
            own = param_group.get("algorithm") or (ADAMW if by_adamw else self.algorithm)
            parts.setdefault(own, []).append(item)
        before = len(self.param_groups)
        try:
            for algorithm, items in parts.items():
                if items:
                    group = {**param_group, "params": items, "algorithm": algorithm}
                    if algorithm == ADAMW and self._adamw_weight_decay is not None:
                        group.setdefault("weight_decay", self._adamw_weight_decay)
                    super().add_param_group(group)
        except Exception:  # also where the second of two is refused, by torch or here
            del self.param_groups[before:]
            raise

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options(options)
        ratio = options["adamw_lr_ratio"]
        require(0 <= ratio < math.inf, "adamw_lr_ratio", "in [0, inf)", ratio)
        if "algorithm" in options:
            require_one_of(options, "algorithm", (self.algorithm, ADAMW))

    def _check_param(self, group: Group, name: Name, param: Tensor) -> None:
        super()._check_param(group, name, param)
        if group["algorithm"] == ADAMW:
            return
        owner = f"params of {type(self).__name__}"
        require(param.dim() >= 2, owner, "of two dimensions or more", param.dim())
        if group["norm_groups"] is not None:
            split_sizes(param.shape, name, group["norm_groups"], group["norm_dim"])

    def _rate(self, layer: BlockedLayer, group: Group) -> float | Tensor:
        lr = super()._rate(layer, group)
        return lr * group["adamw_lr_ratio"] if group["algorithm"] == ADAMW else lr

    def _translated(self, state_dict: StateDict) -> StateDict:
        """What a saved group does not say stays as it is."""
        saved, own = state_dict["param_groups"], self.param_groups
        if len(saved) == len(own):  # torch refuses all others
            kept = ("algorithm", *self.defaults)
            options = [{key: group[key] for key in kept if key in group} for group in own]
            filled = [{**known, **group} for known, group in zip(options, saved, strict=True)]
            state_dict = {**state_dict, "param_groups": filled}
        return super()._translated(state_dict)


def left_to_adamw(model: nn.Module, patterns: str | Sequence[str] = ()) -> set[Tensor]:
    """Return the parameters of a model that AdamW steps under these optimizers, unless their groups
    split them.

    Args:
        patterns: of names (`fnmatch`) that it takes too.
    """
    by_adamw = _by_module(model, find_parameters(model), _listed(patterns))
    return {param for param, taken in by_adamw.items() if taken}


def _by_module(
    model: nn.Module, entries: list[ParamEntry], patterns: Sequence[str]
) -> dict[Tensor, bool]:
    """Whether AdamW takes a parameter: vectors, embeddings, the head, what else is no matrix."""
    head = _head(model)

    def by_adamw(entry: ParamEntry) -> bool:
        kernel = any(isinstance(module, KERNELS) for module in entry.modules)
        return (
            entry.param.dim() < 2
            or (entry.param.dim() > 2 and not kernel)
            or any(is_called(EMBEDDING, module) or module is head for module in entry.modules)
            or _any_matches(entry.names, patterns)
        )

    return {entry.param: by_adamw(entry) for entry in entries}


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


def _by_name(
    pairs: Sequence[tuple[str, Tensor]], patterns: Sequence[str], split: set[Tensor]
) -> dict[Tensor, bool]:
    """The same where only names are known; a tensor that may be a kernel is refused.

    Args:
        split: parameters whose groups say how they are split.
    """
    found = {p: p.dim() < 2 or _any_matches([name], patterns) for name, p in pairs}
    for name, param in pairs:
        if param.dim() > 2 and not found[param] and param not in split:
            raise ValueError(
                f"params must tell whether {name!r}, of {param.dim()} dimensions, is a "
                "convolution's kernel: give the model in place of its parameters, or name it in "
                "adamw=(…); a stack of matrices is split by norm_groups of its group"
            )
    rows = {p.shape[0] for name, p in pairs if p.dim() == 2 and "embed" in name}
    *_, last = (None, *(param for _, param in pairs if param.dim() == 2))
    if last is not None and last.shape[0] in rows:
        found[last] = True
    return found


def _listed(patterns: str | Sequence[str]) -> Sequence[str]:
    """One pattern may stand by itself: letter by letter it would be others."""
    return (patterns,) if isinstance(patterns, str) else patterns


def _require_matches(patterns: Sequence[str], names: Sequence[Sequence[str]]) -> None:
    """Refuse a pattern that matches none of the parameters, each with its names."""
    first = [own[0] for own in names]
    for pattern in patterns:
        matched = [_any_matches(own, [pattern]) for own in names]
        require_match(matched, pattern, first, "adamw", "it is of the whole name, as in '*head*'")


def _any_matches(names: Iterable[str], patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)
