"""Variants are bundles of keywords: what they resolve to, what wins, what is refused."""

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import pytest
import torch
from optimizer_rows import same_bits, snapshot, take_steps
from torch import Tensor
from torch.nn import Parameter
from variant_bundles import BUNDLES, LAMB_VALUES, LARS_VALUES, VALUES, each_variant
from variant_cases import Case, make
from variant_lamb import lamb_paper
from variant_scenario import make_grads, make_weights, steps_of, warmup
from variant_threads import one_thread as one_thread

from largebatch.optim import LAMB, LARS

pytestmark = pytest.mark.usefixtures("one_thread")


@each_variant
def test_a_variant_is_its_bundle(kind: type[torch.optim.Optimizer], variant: str) -> None:
    (group,) = kind([Parameter(torch.ones(2))], lr=0.1, variant=variant).param_groups
    bundle = BUNDLES[kind][variant]
    assert {key: group[key] for key in bundle} == bundle


@each_variant
def test_each_keyword_given_wins_over_the_variant_and_leaves_the_others(
    kind: type[torch.optim.Optimizer], variant: str
) -> None:
    bundle = BUNDLES[kind][variant]
    for keyword, values in VALUES[kind].items():
        for value in values:
            options = {"variant": variant, keyword: value}
            (group,) = kind([Parameter(torch.ones(2))], lr=0.1, **options).param_groups
            assert {key: group[key] for key in bundle} == {**bundle, keyword: value}


PAIRS = [(kind, *pair) for kind, bundles in BUNDLES.items() for pair in permutations(bundles, 2)]


@pytest.mark.parametrize(
    ("kind", "variant", "other"), PAIRS, ids=["-".join((k.__name__, *p)) for k, *p in PAIRS]
)
def test_any_variant_given_all_keywords_of_another_is_that_other(
    kind: type[torch.optim.Optimizer], variant: str, other: str
) -> None:
    runs = []
    for options in ({"variant": variant, **BUNDLES[kind][other]}, {"variant": other}):
        params = [Parameter(weight) for weight in make_weights(torch.float32)]
        optimizer = make(Case(other, kind, lamb_paper, options), params)
        take_steps(optimizer, params, make_grads(torch.float32)[:8])
        runs.append(snapshot(optimizer))
    assert same_bits(*runs)


@each_variant
def test_no_keyword_is_without_effect(kind: type[torch.optim.Optimizer], variant: str) -> None:
    def run(**options: Any) -> list[Tensor]:
        params = [Parameter(weight) for weight in make_weights(torch.float32)]
        case = Case(variant, kind, lamb_paper, {"variant": variant, **options})
        optimizer = make(case, params)
        lrs = warmup(case.lr)[:12]
        *_, last = steps_of(optimizer, params, make_grads(torch.float32)[:12], lrs)
        return [weight.clone() for weight in last]

    plain, bundle = run(), BUNDLES[kind][variant]
    for keyword, values in VALUES[kind].items():
        for value in values:
            if value == bundle[keyword] or same_in_the_scenario(bundle, keyword, value):
                continue
            assert not same_bits(plain, run(**{keyword: value})), (keyword, value)


def same_in_the_scenario(bundle: dict[str, Any], keyword: str, value: Any) -> bool:
    """Pairs of values that the scenario cannot tell apart, as each has another test."""
    if keyword == "zero_norm":  # matters only where φ(0) is not 0, or where decay and gradient meet
        return "weight_norm_bounds" in bundle or bundle["denominator"] == "joint"
    # Its default decay is not 0, so every group without decay is one that was excluded.
    alike = {"never", "unless_excluded"}
    return keyword == "adapt_undecayed" and {value, bundle[keyword]} == alike


@each_variant
def test_repr_shows_what_the_variant_resolved_to(
    kind: type[torch.optim.Optimizer], variant: str
) -> None:
    shown = repr(kind([Parameter(torch.ones(2))], lr=0.1, variant=variant))
    lines = {line.strip() for line in shown.splitlines()}
    assert lines >= {f"{keyword}: {value}" for keyword, value in BUNDLES[kind][variant].items()}


@pytest.mark.parametrize("in_group", [False, True])
@pytest.mark.parametrize(
    ("kind", "keyword", "value", "accepted"),
    [
        (LAMB, "bias_correction", "adam", LAMB_VALUES["bias_correction"]),
        (LAMB, "decay", "l2", LAMB_VALUES["decay"]),
        (LAMB, "adapt_undecayed", True, LAMB_VALUES["adapt_undecayed"]),
        (LAMB, "zero_norm", 1.0, LAMB_VALUES["zero_norm"]),
        (LAMB, "eps_inside_sqrt", "yes", (True, False)),
        (LAMB, "weight_norm_bounds", (2.0, 1.0), ("lo", "hi")),
        (LAMB, "weight_norm_bounds", 10.0, ("lo", "hi")),
        (LAMB, "trust_bounds", (-1.0, 1.0), ("lo", "hi")),
        (LAMB, "trust_bounds", (0.0, math.nan), ("lo", "hi")),
        (LAMB, "max_grad_norm", 0.0, ("> 0",)),
        (LAMB, "max_grad_norm", math.nan, ("> 0",)),
        (LARS, "denominator", "max", LARS_VALUES["denominator"]),
        (LARS, "lr_in_buffer", 1, (True, False)),
        (LARS, "clip_to_lr", "no", (True, False)),
        (LARS, "adapt_undecayed", "sometimes", LARS_VALUES["adapt_undecayed"]),
        (LARS, "zero_norm", "phi", LARS_VALUES["zero_norm"]),
        (LARS, "max_grad_norm", -1.0, ("> 0",)),
    ],
)
def test_a_wrong_value_is_one_sentence_that_says_what_is_accepted(
    kind: type[torch.optim.Optimizer],
    keyword: str,
    value: Any,
    accepted: Sequence[Any],
    in_group: bool,
) -> None:
    group: dict[str, Any] = {"params": [Parameter(torch.ones(2))]}
    wrong = {keyword: value}
    groups, options = ([{**group, **wrong}], {}) if in_group else ([group], wrong)
    with pytest.raises(ValueError, match=keyword) as error:
        kind(groups, lr=0.1, **options)
    message = str(error.value)
    assert "\n" not in message
    assert all(str(choice) in message for choice in (value, *accepted))


@pytest.mark.parametrize("kind", BUNDLES)
@pytest.mark.parametrize("variant", ["lamb", "", None, "PAPER"])
def test_an_unknown_variant_is_one_sentence_that_names_the_known_ones(
    kind: type[torch.optim.Optimizer], variant: Any
) -> None:
    with pytest.raises(ValueError, match="variant") as error:
        kind([Parameter(torch.ones(2))], lr=0.1, variant=variant)
    message = str(error.value)
    assert "\n" not in message
    assert all(name in message for name in (repr(variant), *BUNDLES[kind]))
