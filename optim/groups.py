"""Parameter groups: which parameters decay, which adapt, and which hold several layers in one.

LARS and LAMB are run without weight decay and without a trust ratio on biases, on the gains and
shifts of normalisation, and on whatever else has fewer than two dimensions: gates, layer scales,
temperatures. Those start at 0, at 1 or very small, so that a step measured against their own norm
says little: a scalar whose every step is a fraction of itself never changes its sign. LAMB's
authors keep the two exclusions apart in their code, and so does a group here: `weight_decay=0` is
one thing, `adapt=False` the other. Embeddings decay and adapt unless asked not to.

A selector picks parameters. It is one of four words,

    "bias"        a parameter called bias, in whatever module: bias, in_proj_bias, bias_hh_l0, …
    "norm"        of a normalisation module: torch's own, or a class with Norm in its name (or in a
                  base's), there without the weight matrices that a fused layer holds beside it
    "embedding"   of nn.Embedding, nn.EmbeddingBag, or another class named …Embedding
    "vector"      any with one dimension or none

or else a regular expression, searched for in the name with `re.search`: `head` matches anywhere,
`^head` at the start. A tied parameter is listed once, under its first name, and is picked by any of
its names and owners. Shapes are those of the whole tensor: a DTensor's (FSDP2, tensor parallelism)
and that of a parameter which DeepSpeed ZeRO-3 has partitioned; FSDP1 hides them from this.
"""

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Options = Mapping[str, Any]
Sizes = int | Sequence[int]

USUAL = ("vector", "bias", "norm")

BIAS = re.compile(r"(^|_)bias(es)?(_|$)")  # in the last part of a name, where _ parts words
# In the name of a class, where capitals part words: LlamaRMSNorm and LayerNorm2d, not NormalInit.
NORM = re.compile(r"Norm(alization)?(?![a-z])")
EMBEDDING = re.compile(r"Embedding(Bag)?$")


@dataclass(frozen=True)
class ParamEntry:
    """A parameter with all its names and, where a model was given, the modules it belongs to."""

    param: Tensor
    names: list[str] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)


def param_groups(
    model: nn.Module | Iterable[tuple[str, Tensor]],
    weight_decay: float | None = None,
    *,
    no_decay: str | Iterable[str] | None = None,
    no_adapt: str | Iterable[str] | None = None,
    norm_groups: Mapping[str, Sizes | Mapping[str, Any]] | None = None,
    precondition: str | Iterable[str] | None = None,
    rows: Iterable[tuple[str, Options]] | None = None,
) -> list[dict[str, Any]]:
    """Groups of a model's trainable parameters, by name, for any optimizer: ours or torch's.

    `weight_decay` is that of the parameters that decay; None leaves it to the optimizer.
    `no_decay` and `no_adapt` are selectors: what the former pick gets `weight_decay=0`, what the
    latter pick gets `adapt=False`, an option that torch's optimizers carry along and do not read.
    None means "vector", "bias" and "norm", as far as there are any; `()` means nothing.
    `norm_groups` splits fused tensors into layers with a trust ratio each: `{"qkv": 3}` is three in
    one. Under a selector stands the number of equal parts, their sizes, or
    `{"sizes": …, "dim": …}` to split along another dimension than the first. The first selector
    that matches a parameter decides; parameters that do not adapt are passed over.
    `precondition` selects what Shampoo and SOAP precondition, of what has two dimensions or more:
    the others get `precondition=False`. None leaves the option out: they precondition all they can.
    `rows`, in place of the four, are (selector, options of a group): each parameter goes into the
    group of the first row that matches it; `weight_decay` fills the rows that have none.

    Parameters and groups keep the model's order, frozen parameters and empty groups are left out.
    In place of a model its `named_parameters()` will do where no word asks for its modules.

    Raises ValueError for a selector that matches nothing (frozen parameters count), for a row or
    an entry of `norm_groups` that earlier ones leave nothing to, and, with `rows`, for a trainable
    parameter that no row matches.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    >>> for group in param_groups(model, weight_decay=0.01):
    ...     print([name for name, _ in group.pop("params")], group)
    ['0.weight'] {'weight_decay': 0.01}
    ['0.bias', '1.weight', '1.bias'] {'weight_decay': 0.0, 'adapt': False}
    """
    entries = find_parameters(model)
    if rows is None:
        choices = usual_options(entries, no_decay, no_adapt, norm_groups or {}, precondition)
    else:
        others = {
            "no_decay": no_decay, "no_adapt": no_adapt, "norm_groups": norm_groups,
            "precondition": precondition,
        }  # fmt: skip
        given = [keyword for keyword, value in others.items() if value is not None]
        if given:
            raise ValueError(
                f"rows decide alone, got {' and '.join(given)} beside them: put weight_decay, "
                "adapt and norm_groups into the options of the rows."
            )
        choices = row_options(entries, list(rows))

    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    groups: dict[Hashable, dict[str, Any]] = {}
    for entry, (key, options) in zip(entries, choices, strict=True):
        if entry.param.requires_grad:
            group = groups.setdefault(key, {**decay, **options, "params": []})
            group["params"].append((entry.names[0], entry.param))
    return list(groups.values())


def find_parameters(model: nn.Module | Iterable[tuple[str, Tensor]]) -> list[ParamEntry]:
    """Every parameter once, in the model's order."""
    entries: dict[Tensor, ParamEntry] = {}
    if not isinstance(model, nn.Module):
        for pair in model:
            if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
                raise ValueError(
                    "param_groups takes a model or (name, parameter) pairs such as "
                    f"model.named_parameters(), got a {type(pair).__name__} among them."
                )
            entries.setdefault(pair[1], ParamEntry(pair[1])).names.append(pair[0])
        return list(entries.values())

    # Duplicates are asked for: they are the further names and owners of tied parameters.
    for path, module in model.named_modules(remove_duplicate=False):
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            entry = entries.setdefault(param, ParamEntry(param))
            entry.names.append(f"{path}.{name}" if path else name)
            entry.modules.append(module)
    return list(entries.values())


def usual_options(
    entries: list[ParamEntry],
    no_decay: str | Iterable[str] | None,
    no_adapt: str | Iterable[str] | None,
    norm_groups: Mapping[str, Sizes | Mapping[str, Any]],
    precondition: str | Iterable[str] | None,
) -> list[tuple[Hashable, Options]]:
    """For each entry its options, and what tells them from others."""
    undecayed = picked(no_decay, entries, "no_decay")
    unadapted = picked(no_adapt, entries, "no_adapt")
    everything = [True] * len(entries)
    wanted = everything if precondition is None else picked(precondition, entries, "precondition")
    adapted = [entry for entry, left_out in zip(entries, unadapted, strict=True) if not left_out]
    numbers = iter(first_matches(list(norm_groups), adapted, "norm_groups"))
    splits = [split_options(*item) for item in norm_groups.items()]

    choices: list[tuple[Hashable, Options]] = []
    for without_decay, without_adapt, with_factors in zip(
        undecayed, unadapted, wanted, strict=True
    ):
        number = None if without_adapt else next(numbers)
        options = {
            **({"weight_decay": 0.0} if without_decay else {}),
            **({"adapt": False} if without_adapt else {}),
            **({} if number is None else splits[number]),
            **({} if with_factors else {"precondition": False}),
        }
        choices.append(((without_decay, without_adapt, number, with_factors), options))
    return choices


def row_options(
    entries: list[ParamEntry], rows: list[tuple[str, Options]]
) -> list[tuple[Hashable, Options]]:
    """For each entry the number and the options of the first row that matches it."""
    choices: list[tuple[Hashable, Options]] = []
    numbers = first_matches([selector for selector, _ in rows], entries, "rows")
    for entry, number in zip(entries, numbers, strict=True):
        if number is None and entry.param.requires_grad:
            raise ValueError(
                f"rows: no row matches parameter {entry.names[0]!r}; a last row "
                '("", {}) would take whatever is left.'
            )
        choices.append((number, {} if number is None else rows[number][1]))
    return choices


def split_options(selector: str, value: Sizes | Mapping[str, Any]) -> Options:
    """One value of `norm_groups` as the options of a group; the optimizer checks the sizes."""
    spec = value if isinstance(value, Mapping) else {"sizes": value}
    if not {"sizes"} <= spec.keys() <= {"sizes", "dim"}:
        raise ValueError(
            f"norm_groups[{selector!r}] must be a number of parts, their sizes, or a mapping with "
            f"'sizes' and, if need be, 'dim', got {value!r}."
        )
    sizes = spec["sizes"]
    dim = {"norm_dim": spec["dim"]} if "dim" in spec else {}
    return {"norm_groups": sizes if isinstance(sizes, int) else tuple(sizes), **dim}


def picked(
    selectors: str | Iterable[str] | None, entries: list[ParamEntry], keyword: str
) -> list[bool]:
    """For each entry, whether one of the selectors picks it; None is the usual ones, if any."""
    if selectors is None:
        return [any(selects(word, entry, keyword) for word in USUAL) for entry in entries]
    listed = [selectors] if isinstance(selectors, str) else selectors
    columns = [matches(selector, entries, keyword) for selector in listed]
    return [any(row) for row in zip(*columns, strict=True)] if columns else [False] * len(entries)


def first_matches(
    selectors: list[str], entries: list[ParamEntry], keyword: str
) -> list[int | None]:
    """For each entry the number of the first selector that picks it."""
    columns = [matches(selector, entries, keyword) for selector in selectors]
    numbers = [
        next((number for number, column in enumerate(columns) if column[place]), None)
        for place in range(len(entries))
    ]
    for number, selector in enumerate(selectors):
        if number not in numbers:
            raise ValueError(
                f"{keyword}: earlier selectors take every parameter that {selector!r} matches; "
                "move it up, or leave it out."
            )
    return numbers


def matches(selector: str, entries: list[ParamEntry], keyword: str) -> list[bool]:
    """For each entry, whether the selector picks it; refused where it picks none."""
    column = [selects(selector, entry, keyword) for entry in entries]
    names = [entry.names[0] for entry in entries]
    of_words = selector in ("bias", "norm", "embedding", "vector")
    how = "none is of that kind" if of_words else "it is searched for anywhere in a name"
    require_match(column, selector, names, keyword, how)
    return column


def require_match(
    column: Sequence[bool], pattern: str, names: Sequence[str], keyword: str, how: str
) -> None:
    """Refuse a pattern that matches none of the parameters.

    Args:
        column: for each, whether it does.
        how: the pattern is read.
    """
    if not any(column):
        raise ValueError(
            f"{keyword}: {pattern!r} matches none of the {len(names)} parameters "
            f"({', '.join(names[:3])}{', …' if len(names) > 3 else ''}): {how}; correct it, or "
            "leave it out."
        )


def selects(selector: str, entry: ParamEntry, keyword: str) -> bool:
    """Whether a word or a regular expression picks a parameter."""
    shape = getattr(entry.param, "ds_shape", entry.param.shape)  # ZeRO-3 leaves an empty tensor
    if selector == "vector":
        return len(shape) <= 1
    if selector == "bias":
        return any(BIAS.search(name.rpartition(".")[2]) for name in entry.names)
    if selector in ("norm", "embedding"):
        if not entry.modules:
            raise ValueError(
                f"{keyword}: {selector!r} is decided from the modules of a model, got its named "
                "parameters only: give the model, or select by name or by 'vector'."
            )
        if selector == "embedding":
            return any(is_called(EMBEDDING, module) for module in entry.modules)
        vector_like = sum(size > 1 for size in shape) <= 1  # (channels, 1, 1) is one too
        return any(
            isinstance(module, nn.LayerNorm | nn.RMSNorm)
            or (vector_like and is_called(NORM, module))
            for module in entry.modules
        )
    try:
        return any(re.search(selector, name) for name in entry.names)
    except re.error as error:
        raise ValueError(
            f"{keyword}: {selector!r} is neither one of the words bias, norm, embedding and "
            f"vector nor a regular expression: {error}."
        ) from error


def is_called(word: re.Pattern[str], module: nn.Module) -> bool:
    """Whether the module's class or one of its bases has the word in its name."""
    return any(word.search(cls.__name__) for cls in type(module).__mro__)
