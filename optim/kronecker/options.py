"""The options of K-FAC: what is refused."""

import math
from collections.abc import Mapping
from typing import Any

from largebatch.optim.kronecker.damping import FORMS
from largebatch.optim.kronecker.rules import RULES, Rule
from largebatch.optim.math.grafting import GRAFTINGS
from largebatch.optim.options import require, require_one_of


def check_group(options: dict[str, Any]) -> None:
    """Refuse options of a group, or the defaults, that only K-FAC has, out of range."""
    for name in ("damping", "ridge"):
        require(0 <= options[name] < math.inf, name, "in [0, inf)", options[name])
    for name in ("final_damping", "damping_items", "kl_clip"):
        value = options[name]
        require(value is None or 0 < value < math.inf, name, "in (0, inf) or None", value)
    if (options["final_damping"] is None) != (options["damping_items"] is None):
        given = "final_damping" if options["damping_items"] is None else "damping_items"
        raise ValueError(f"final_damping and damping_items go together, got {given} alone")
    if options["final_damping"] is not None:
        accepted = "> 0 where final_damping is given"
        require(options["damping"] > 0, "damping", accepted, options["damping"])
    factor_decay = options["factor_decay"]
    require(0 <= factor_decay < 1, "factor_decay", "in [0, 1)", factor_decay)
    for name in ("relative_damping", "nesterov", "maximize"):
        require_one_of(options, name, (False, True))
    require_one_of(options, "form", FORMS)
    require_one_of(options, "graft", GRAFTINGS)


def check_whole(options: Mapping[str, Any]) -> None:
    """Refuse options of the whole optimizer that are out of range."""
    require_one_of(options, "fisher", ("empirical", "true"))
    for name in ("factor_interval", "inverse_interval", "max_factor_size"):
        count = options[name]
        whole = isinstance(count, int) and not isinstance(count, bool)
        require(whole and count >= 1, name, "a whole number >= 1", count)


def rule_of(name: str, rule: str | Rule) -> Rule:
    """The rule that an option means."""
    if isinstance(rule, Rule):
        return rule
    require(rule in RULES, name, f"a Rule or one of {', '.join(RULES)}", repr(rule))
    return RULES[rule]
