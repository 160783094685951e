"""Any optimizer by its name, over the usual groups of a model's parameters.

A name makes what `largebatch train optim=NAME` makes, with the same defaults: those of the class,
but for what `NAMED` says. The classes themselves have the defaults of their papers, or torch's.
A learning rate has no default here: it belongs to a model, a data set and a batch size.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from largebatch.optim.groups import Sizes, param_groups
from largebatch.optim.kfac import KFAC
from largebatch.optim.lamb import LAMB
from largebatch.optim.lars import LARS
from largebatch.optim.mano import Mano
from largebatch.optim.muon import Muon
from largebatch.optim.shampoo import Shampoo
from largebatch.optim.soap import SOAP
from largebatch.optim.soap_muon import SOAPMuon


class Named(NamedTuple):
    """What a name stands for."""

    kind: type[Optimizer]
    defaults: Mapping[str, Any] = MappingProxyType({})
    """Where they are not those of the class."""


# Large batches make short runs: an average over 1,000 steps (β₂ = 0.999) may see no more than its
# own beginning. Muon's and Mano's AdamW is to be the AdamW that they are compared with.
SHORT: Final = MappingProxyType({"betas": (0.9, 0.99)})

NAMED: Final = MappingProxyType(
    {
        "adamw": Named(torch.optim.AdamW, SHORT),
        "kfac": Named(KFAC),
        # Khona et al. 2026, arXiv:2607.20548: bases refined at every step.
        "kl_soap": Named(SOAP, {"factors": "kl", "factor_beta": 0.95, "precondition_interval": 1}),
        "lamb": Named(LAMB, SHORT),
        # Ten times the paper's, so that rates are of the size of SGD's.
        "lars": Named(LARS, {"trust_coefficient": 0.01}),
        "mano": Named(Mano, SHORT),
        "muon": Named(Muon, SHORT),
        "muon_hyperball": Named(Muon, {**SHORT, "hyperball": True}),
        # As large batches are trained with SGD; the class has neither.
        "sgd": Named(torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        "shampoo": Named(Shampoo),
        # What its runs at large batches were best with (study=second_order).
        "soap": Named(SOAP, {"betas": (0.7, 0.99)}),
        "soap_muon": Named(SOAPMuon),
    }
)


def names() -> list[str]:
    """Return the names that `create` takes, which are those of `largebatch train optim=NAME`.

    >>> print(*names())
    adamw kfac kl_soap lamb lars mano muon muon_hyperball sgd shampoo soap soap_muon
    """
    return sorted(NAMED)


def create(
    model: nn.Module,
    name: str,
    *,
    lr: float | Tensor,
    weight_decay: float = 0.0,
    no_decay: str | Iterable[str] | None = None,
    no_adapt: str | Iterable[str] | None = None,
    norm_groups: Mapping[str, Sizes | Mapping[str, Any]] | None = None,
    precondition: str | Iterable[str] | None = None,
    **options: Any,
) -> Optimizer:
    """Make an optimizer over a model's parameters, in the usual groups.

    Biases, norms and whatever else has fewer than two dimensions neither decay nor adapt;
    `no_decay`, `no_adapt`, `norm_groups` and `precondition` are those of `param_groups`.
    `weight_decay` is 0 for every optimizer unless given, torch's among them. `options` go to the
    class.

    Raises ValueError for a name that is none of `names()`, a selector that matches nothing, or an
    option out of range, and TypeError for an option that the class does not have.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    >>> optimizer = create(model, "lamb", lr=0.02, weight_decay=0.01, variant="nvlamb")
    >>> for group in optimizer.param_groups:
    ...     print(group["param_names"], group["weight_decay"], group["adapt"])
    ['0.weight'] 0.01 True
    ['0.bias', '1.weight', '1.bias'] 0.0 False
    >>> type(create(model, "adamw", lr=1e-3)).__name__
    'AdamW'
    """
    if name not in NAMED:
        near = get_close_matches(str(name).lower(), NAMED, n=1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"name must be one of {', '.join(names())}, got {name!r}{hint}")
    kind, defaults = NAMED[name]
    groups = param_groups(  # without the decay, which an option of the class may take the place of
        model,
        no_decay=no_decay,
        no_adapt=no_adapt,
        norm_groups=norm_groups,
        precondition=precondition,
    )
    make: Any = kind
    keywords = {**defaults, "weight_decay": weight_decay, **options}
    if getattr(kind, "takes_model", False):
        over = "params" if issubclass(kind, KFAC) else "groups"
        made: Optimizer = make(model, lr, **{over: groups}, **keywords)
    else:
        made = make(groups, lr, **keywords)
    return made
