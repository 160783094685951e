"""Other libraries' state dicts: continued as their own, or refused in a sentence."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_rows import make_grads, make_layers, same_bits, snapshot, take_steps
from torch import Tensor
from torch.nn import Parameter

from largebatch.optim import LAMB, LARS
from largebatch.optim.layerwise.state_import import to_native

StateDict = dict[str, Any]
NUM_STEPS = 5
# None of them an optimizer's default: what is not taken from the dict is seen.
LAMB_OPTIONS = {"lr": 0.03, "betas": (0.8, 0.97), "eps": 1e-3, "weight_decay": 0.1}
LARS_OPTIONS = {"lr": 0.4, "momentum": 0.8, "eps": 1e-3, "weight_decay": 0.05, "nesterov": True}
RATIO = {"trust_coefficient": 0.02}  # LARS's own, in no foreign dict under this name
SHARED = {"lr", "betas", "eps", "weight_decay", "momentum", "nesterov", "params"}


def in_two_groups(params: list[Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:4]}, {"params": params[4:], "weight_decay": 0.0}]


def trained(make: Callable[..., Any], options: dict[str, Any], **more: Any) -> Any:
    """An optimizer of ours after a few steps, and its parameters."""
    params = make_layers()
    optimizer = make(in_two_groups(params), **options, **more)
    take_steps(optimizer, params, make_grads(NUM_STEPS))
    return optimizer, params


def untrained(make: Callable[..., Any], params: list[Parameter], **options: Any) -> Any:
    """A new optimizer of copies of the parameters, with other options, and the copies."""
    copies = [Parameter(param.detach().clone()) for param in params]
    return make(in_two_groups(copies), **{"lr": 9.0, **options}), copies


def described(
    native: StateDict,
    entries: Callable[[dict[str, Any]], dict[str, Any]],
    options: Callable[[], dict[str, Any]] = dict,
) -> StateDict:
    """A foreign dict from a native one: `entries` of a parameter, further `options` of a group."""
    native = copy.deepcopy(native)
    return {
        "state": {key: entries(state) for key, state in native["state"].items()},
        "param_groups": [
            {**{key: value for key, value in group.items() if key in SHARED}, **options()}
            for group in native["param_groups"]
        ],
    }


def moments(state: dict[str, Any]) -> dict[str, Any]:
    return {key: state[key] for key in ("exp_avg", "exp_avg_sq")}


def int_step(state: dict[str, Any]) -> dict[str, Any]:
    return {"step": int(state["step"])}


NORMS = {"weight_norm": torch.tensor(1.0), "adam_norm": torch.tensor(2.0), "trust_ratio": 1}


def timm_lamb(native: StateDict) -> StateDict:
    options = {
        "bias_correction": True,
        "grad_averaging": True,
        "max_grad_norm": 1.0,
        "trust_clip": False,
        "always_adapt": False,
        "caution": False,
        "decoupled_decay": False,
        "corrected_weight_decay": False,
    }
    return described(native, moments, lambda: {**options, "step": torch.tensor(float(NUM_STEPS))})


def apex_fused_lamb(native: StateDict) -> StateDict:
    options = {"bias_correction": True, "grad_averaging": True, "max_grad_norm": 1.0}
    return described(native, moments, lambda: {**options, "step": NUM_STEPS})


def apex_mixed_precision_lamb(native: StateDict) -> StateDict:
    foreign = apex_fused_lamb(native)
    for group in foreign["param_groups"]:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float32)
        group["step"] = torch.tensor([NUM_STEPS], dtype=torch.int)
    return foreign


def apex_ref_lamb(native: StateDict) -> StateDict:
    norms = {"w_norm": torch.tensor(1.0), "g_norm": torch.tensor(2.0), "trust_ratio": 1.0}
    return described(
        native,
        lambda state: {**int_step(state), "m": state["exp_avg"], "v": state["exp_avg_sq"], **norms},
    )


def deepspeed_fused_lamb(native: StateDict) -> StateDict:
    options = {"bias_correction": True, "max_grad_norm": 0.0, "max_coeff": 10.0, "min_coeff": 0.01}
    return described(native, lambda state: {**int_step(state), **moments(state)}, lambda: options)


def ipex_lamb(native: StateDict) -> StateDict:
    return described(
        native, lambda state: {**int_step(state), **moments(state)}, lambda: {"fused": False}
    )


def colossalai_lamb(native: StateDict) -> StateDict:
    return described(native, lambda state: {**int_step(state), **moments(state), **NORMS})


def kozistr_lamb(native: StateDict) -> StateDict:
    options = {"weight_decouple": True, "fixed_decay": False, "rectify": False, "adam": False}
    options |= {"grad_averaging": True, "max_grad_norm": 1.0, "foreach": None, "step": NUM_STEPS}
    return described(native, lambda state: {**moments(state), **NORMS}, lambda: options)


def timm_lars(native: StateDict) -> StateDict:
    options = {"dampening": 0.0, "trust_coeff": 1.0, "trust_clip": True, "always_adapt": False}
    return described(native, dict, lambda: options)


def kozistr_lars(native: StateDict) -> StateDict:
    options = {"dampening": 0.0, "trust_coefficient": 1.0, "step": NUM_STEPS}
    return without(["eps"], described(native, dict, lambda: options))


def mae_lars(native: StateDict) -> StateDict:
    foreign = described(
        native,
        lambda state: {"mu": state["momentum_buffer"]},
        lambda: {"trust_coefficient": 1.0},
    )
    return without(["eps", "nesterov"], foreign)


def without(options: list[str], foreign: StateDict) -> StateDict:
    for group in foreign["param_groups"]:
        for option in options:
            del group[option]
    return foreign


INTO_LAMB = [
    timm_lamb,
    apex_fused_lamb,
    apex_mixed_precision_lamb,
    apex_ref_lamb,
    deepspeed_fused_lamb,
    ipex_lamb,
    colossalai_lamb,
    kozistr_lamb,
]
INTO_LARS = [timm_lars, kozistr_lars, mae_lars]


# Continued -----------------------------------------------------------------------------------


def assert_continues(optimizer: Any, params: list[Parameter], resumed: Any, copies: Any) -> None:
    assert same_bits(snapshot(optimizer), snapshot(resumed))
    for number in range(3):
        grads = make_grads(NUM_STEPS + 3)[NUM_STEPS + number :][:1]
        take_steps(optimizer, params, grads)
        take_steps(resumed, copies, grads)
        assert same_bits(snapshot(optimizer), snapshot(resumed))


@pytest.mark.parametrize("foreign_of", INTO_LAMB, ids=lambda it: it.__name__)
def test_lamb_continues_a_foreign_state_as_its_own_to_the_bit(
    foreign_of: Callable[[StateDict], StateDict],
) -> None:
    optimizer, params = trained(LAMB, LAMB_OPTIONS)
    resumed, copies = untrained(LAMB, params)
    resumed.load_state_dict(to_native(foreign_of(optimizer.state_dict()), resumed))
    assert_continues(optimizer, params, resumed, copies)


@pytest.mark.parametrize(
    ("foreign_of", "lacks"),
    [(timm_lars, []), (kozistr_lars, ["eps"]), (mae_lars, ["eps", "nesterov"])],
)
def test_lars_continues_a_foreign_state_as_its_own_to_the_bit(
    foreign_of: Callable[[StateDict], StateDict], lacks: list[str]
) -> None:
    optimizer, params = trained(LARS, LARS_OPTIONS, **RATIO)
    own = {key: LARS_OPTIONS[key] for key in lacks}
    resumed, copies = untrained(LARS, params, **RATIO, **own)
    resumed.load_state_dict(to_native(foreign_of(optimizer.state_dict()), resumed))
    assert_continues(optimizer, params, resumed, copies)


@pytest.mark.parametrize(
    ("theirs", "ours", "options"),
    [
        (torch.optim.AdamW, LAMB, LAMB_OPTIONS),
        (torch.optim.SGD, LARS, {"lr": 0.4, "momentum": 0.8, "weight_decay": 0.05}),
    ],
)
@pytest.mark.parametrize("scheduled", [False, True])
def test_layers_that_do_not_adapt_go_on_as_torchs_own_optimizer(
    theirs: Any, ours: Any, options: dict[str, Any], scheduled: bool
) -> None:
    params, grads = make_layers(), make_grads(10)
    optimizer = theirs(params, **options)
    if scheduled:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    take_steps(optimizer, params, grads[:5])
    copies = [Parameter(param.detach().clone()) for param in params]
    resumed = ours([{"params": copies, "adapt": False}], lr=9.0)
    resumed.load_state_dict(to_native(copy.deepcopy(optimizer.state_dict()), resumed))
    if scheduled:  # would refuse groups without their initial_lr
        scheduler = torch.optim.lr_scheduler.LambdaLR(resumed, lambda step: 1.0, last_epoch=5)
        assert scheduler.base_lrs == [options["lr"]]
    take_steps(optimizer, params, grads[5:])
    take_steps(resumed, copies, grads[5:])
    torch.testing.assert_close(copies, params, rtol=1e-5, atol=1e-6)
    assert not any(map(torch.equal, params, make_layers()))


def test_a_buffer_without_lr_goes_on_in_a_lars_that_has_lr_in_its_buffer() -> None:
    options = {**LARS_OPTIONS, "nesterov": False, "eps": 0.0}
    optimizer, params = trained(LARS, options, **RATIO)
    resumed, copies = untrained(LARS, params, **RATIO, variant="lr_inside")
    foreign = described(optimizer.state_dict(), dict)
    resumed.load_state_dict(to_native(foreign, resumed))
    grads = make_grads(NUM_STEPS + 3)[NUM_STEPS:]
    take_steps(optimizer, params, grads)
    take_steps(resumed, copies, grads)
    torch.testing.assert_close(copies, params, rtol=1e-5, atol=1e-6)
    for param, twin in zip(params, copies, strict=True):
        inside = resumed.state[twin]["momentum_buffer"]
        torch.testing.assert_close(inside, 0.4 * optimizer.state[param]["momentum_buffer"])


# What is taken -------------------------------------------------------------------------------


def test_only_the_shared_options_are_taken_and_the_rest_stays_the_optimizers_own() -> None:
    optimizer, params = trained(LAMB, LAMB_OPTIONS)
    resumed, _ = untrained(LAMB, params, maximize=False)
    resumed.param_groups[0]["adapt"] = False
    foreign = timm_lamb(optimizer.state_dict())
    foreign["param_groups"][1].update(initial_lr=0.5, nesterov=True)
    native = to_native(foreign, resumed)
    for group, own, theirs in zip(
        native["param_groups"], resumed.param_groups, foreign["param_groups"], strict=True
    ):
        taken = {key: theirs[key] for key in ("lr", "betas", "eps", "weight_decay")}
        assert {key: group[key] for key in taken} == taken
        left = own.keys() - taken.keys() - {"params"}
        assert {key: group[key] for key in left} == {key: own[key] for key in left}
        assert group.keys() - own.keys() <= {"initial_lr"}
        assert group["params"] == theirs["params"]
    assert [group.get("initial_lr") for group in native["param_groups"]] == [None, 0.5]


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_learning_rate_comes_as_the_optimizer_has_it(as_tensor: bool) -> None:
    optimizer, params = trained(LAMB, LAMB_OPTIONS)
    resumed, _ = untrained(LAMB, params, lr=torch.tensor(9.0) if as_tensor else 9.0)
    for foreign_of in (timm_lamb, apex_mixed_precision_lamb):
        native = to_native(foreign_of(optimizer.state_dict()), resumed)
        for group in native["param_groups"]:
            assert isinstance(group["lr"], Tensor if as_tensor else float)
            torch.testing.assert_close(torch.as_tensor(group["lr"]), torch.tensor(0.03))


def test_state_is_fp32_and_each_parameter_has_a_step_of_its_own() -> None:
    optimizer, params = trained(LAMB, LAMB_OPTIONS)
    resumed, _ = untrained(LAMB, [Parameter(param.to(torch.bfloat16)) for param in params])
    foreign = timm_lamb(optimizer.state_dict())
    for state in foreign["state"].values():  # timm's have the dtype of the parameters
        state.update({key: value.to(torch.bfloat16) for key, value in state.items()})
    states = to_native(foreign, resumed)["state"].values()
    assert all(value.dtype == torch.float32 for state in states for value in state.values())
    assert all(state["step"].shape == () and state["step"] == NUM_STEPS for state in states)
    assert len({state["step"].data_ptr() for state in states}) == len(params)


def test_a_parameter_that_has_had_no_gradient_yet_has_no_state_to_take() -> None:
    optimizer, params = trained(LAMB, LAMB_OPTIONS)
    foreign = timm_lamb(optimizer.state_dict())
    del foreign["state"][2]
    foreign["state"][3] = {}
    resumed, _ = untrained(LAMB, params)
    assert to_native(foreign, resumed)["state"].keys() == {0, 1, 4, 5}

    plain = torch.optim.SGD(make_layers(), lr=0.1)
    plain_state = plain.state_dict()
    plain_state["state"] = {0: {"momentum_buffer": None}}  # as older versions of torch write it
    without_momentum = LARS(make_layers(), lr=0.1)
    native = to_native(plain_state, without_momentum)
    assert native["state"] == {}
    assert native["param_groups"][0]["momentum"] == 0


def test_a_dict_keyed_by_names_is_converted_by_its_order() -> None:
    optimizer, params = trained(LAMB, LAMB_OPTIONS)
    foreign = apex_fused_lamb(optimizer.state_dict())
    foreign["state"] = {f"layer{key}": state for key, state in foreign["state"].items()}
    for group in foreign["param_groups"]:
        group["params"] = [f"layer{key}" for key in group["params"]]
    resumed, copies = untrained(LAMB, params)
    resumed.load_state_dict(to_native(foreign, resumed))
    assert_continues(optimizer, params, resumed, copies)


@pytest.mark.parametrize(
    ("make", "options", "foreign_of"),
    [(LAMB, LAMB_OPTIONS, it) for it in INTO_LAMB] + [(LARS, LARS_OPTIONS, it) for it in INTO_LARS],
)
def test_the_given_dict_is_left_as_it_was_and_converting_twice_is_converting_once(
    make: Any, options: dict[str, Any], foreign_of: Callable[[StateDict], StateDict]
) -> None:
    optimizer, params = trained(make, options)
    resumed, _ = untrained(make, params)
    foreign = foreign_of(optimizer.state_dict())
    before = copy.deepcopy(foreign)
    once = to_native(foreign, resumed)
    assert equal(foreign, before)
    assert equal(to_native(once, resumed), once)
    assert equal(to_native(once, optimizer), once)


def equal(one: Any, other: Any) -> bool:
    """Nested equality, of tensors with their dtypes and shapes."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and same_bits([one], [other])
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


# Our own -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "options"), [(LAMB, LAMB_OPTIONS), (LARS, LARS_OPTIONS)])
def test_one_of_our_own_is_returned_as_it_is(make: Any, options: dict[str, Any]) -> None:
    optimizer, params = trained(make, options)
    optimizer.param_groups[0]["name"] = "decayed"  # a user's own
    optimizer.state[params[0]]["note"] = "a user's own"
    resumed, _ = untrained(make, params, maximize=True)
    saved = optimizer.state_dict()
    assert equal(to_native(saved, resumed), saved)
    fewer = {"state": {}, "param_groups": []}
    assert equal(to_native(fewer, resumed), fewer)


def test_options_that_an_older_version_did_not_write_are_the_optimizers() -> None:
    optimizer, params = trained(LAMB, LAMB_OPTIONS)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group.update(weight_decay=0.25, adapt=False)
        del group["eps"]
    resumed, _ = untrained(LAMB, params, eps=0.5)
    for group in to_native(saved, resumed)["param_groups"]:
        assert (group["eps"], group["weight_decay"], group["adapt"]) == (0.5, 0.25, False)


def test_torchs_groups_with_adapt_in_them_are_not_taken_for_ours() -> None:
    theirs = torch.optim.AdamW([{"params": make_layers(), "adapt": False}], maximize=True)
    ours = LAMB(make_layers(), maximize=True)
    (group,) = to_native(theirs.state_dict(), ours)["param_groups"]
    assert group["adapt"] is True
    assert group.keys() == ours.param_groups[0].keys()


# Refused -------------------------------------------------------------------------------------


def changed(foreign: StateDict, **entries: Any) -> StateDict:
    """With other entries for parameter 1; None removes one."""
    state = foreign["state"][1]
    state.update(entries)
    foreign["state"][1] = {key: value for key, value in state.items() if value is not None}
    return foreign


def regrouped(foreign: StateDict, **options: Any) -> StateDict:
    for group in foreign["param_groups"]:
        group.update(options)
    return foreign


FLAT = torch.zeros(40)
ONE_BIT = {"lamb_coeff_freeze": 1.0, "last_factor": 1.0, "exp_avg_sq_fresh": torch.zeros(1)}


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda it: {"step": 5, "fp32_p": FLAT, "fp32_m": FLAT, "fp32_v": FLAT},
            r"one rank's flat shards \(step, fp32_p, fp32_m, fp32_v\)",
        ),
        (
            lambda it: {"optimizer_state_dict": it, "fp32_groups": [FLAT]},
            r"has 'state' and 'param_groups', got \['optimizer_state_dict', 'fp32_groups'\]",
        ),
        (
            lambda it: changed(timm_lamb(it), exp_avg=FLAT),
            r"state of parameter 1: exp_avg has shape \(40,\), the parameter \(1,\)",
        ),
        (
            lambda it: changed(timm_lamb(it), exp_avg=0.5),
            r"state of parameter 1: exp_avg has shape float, the parameter \(1,\)",
        ),
        (
            lambda it: changed(deepspeed_fused_lamb(it), **ONE_BIT),
            r"parameter 1: 1-bit LAMB's moments belong to its frozen .* LAMB does not have",
        ),
        (
            lambda it: changed(timm_lamb(it), exp_inf=FLAT),
            r"1: LAMB needs exp_avg, exp_avg_sq, step .* got exp_avg, exp_avg_sq, exp_inf, step",
        ),
        (
            lambda it: changed(timm_lamb(it), exp_avg_sq=None),
            r"parameter 1: LAMB needs exp_avg, exp_avg_sq, step .* got exp_avg, step\.",
        ),
        (
            lambda it: changed(ipex_lamb(it), step=None),
            r"parameter 1: LAMB needs exp_avg, exp_avg_sq, step .* got exp_avg, exp_avg_sq\.",
        ),
        (
            lambda it: changed(timm_lamb(it), exp_avg=None, exp_avg_sq=None, momentum_buffer=FLAT),
            r"parameter 1: LAMB needs exp_avg, exp_avg_sq, step .* got momentum_buffer, step\.",
        ),
        (
            lambda it: regrouped(timm_lamb(it), grad_averaging=False),
            r"cannot be continued: grad_averaging=False sums gradients into exp_avg without",
        ),
        (
            lambda it: regrouped(timm_lamb(it), maximize=True),
            r"cannot be continued: maximize=True, the optimizer's is False",
        ),
        (
            lambda it: {**timm_lamb(it), "state": {**timm_lamb(it)["state"], "buckets": {}}},
            r"holds state of 'buckets', which none of its groups has",
        ),
        (
            lambda it: {**timm_lamb(it), "param_groups": timm_lamb(it)["param_groups"][:1]},
            r"has groups of \[4\] parameters and the optimizer of \[4, 2\]",
        ),
    ],
)
def test_what_cannot_be_right_is_refused_in_a_sentence(
    break_it: Callable[[StateDict], StateDict], message: str
) -> None:
    optimizer, params = trained(LAMB, LAMB_OPTIONS)
    resumed, _ = untrained(LAMB, params)
    with pytest.raises(ValueError, match=message):
        to_native(break_it(optimizer.state_dict()), resumed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dampening": 0.1}, "cannot be continued: dampening scales what enters the momentum_buff"),
        (
            {"lars": True, "eeta": 1e-3, "epsilon": 0.0},
            "cannot be continued: this LARS (IPEX) keeps the trust ratio out of its moment",
        ),
        ({"maximize": True}, "cannot be continued: maximize=True, the optimizer's is False"),
    ],
)
def test_a_momentum_gathered_by_another_rule_is_refused(
    options: dict[str, Any], message: str
) -> None:
    optimizer, params = trained(LARS, LARS_OPTIONS)
    resumed, _ = untrained(LARS, params)
    with pytest.raises(ValueError, match=re.escape(message)):
        to_native(regrouped(timm_lars(optimizer.state_dict()), **options), resumed)


def test_an_amsgrad_or_a_decayed_momentum_of_torch_is_refused() -> None:
    for optimizer in (
        torch.optim.AdamW(make_layers(), amsgrad=True),
        torch.optim.NAdam(make_layers()),
    ):
        take_steps(optimizer, optimizer.param_groups[0]["params"], make_grads(1))
        with pytest.raises(ValueError, match=r"LAMB needs .* got .*(max_exp_avg_sq|mu_product)"):
            to_native(optimizer.state_dict(), LAMB(make_layers()))


@pytest.mark.parametrize("trained_first", [False, True])
def test_lambs_state_is_refused_by_lars_and_the_reverse(trained_first: bool) -> None:
    lamb, lars = LAMB(make_layers()), LARS(make_layers(), lr=0.1)
    adam = torch.optim.Adam(make_layers())
    sgd = torch.optim.SGD(make_layers(), lr=0.1, momentum=0.9)
    if trained_first:
        for optimizer in (lamb, lars, adam, sgd):
            take_steps(optimizer, optimizer.param_groups[0]["params"], make_grads(1))
    for other in (lamb, adam):
        with pytest.raises(
            ValueError, match=r"LARS has 'momentum' in .* 'betas': load it into LAMB"
        ):
            to_native(other.state_dict(), lars)
    for other in (lars, sgd):
        with pytest.raises(
            ValueError, match=r"LAMB has 'betas' in .* 'momentum': load it into LARS"
        ):
            to_native(other.state_dict(), lamb)
