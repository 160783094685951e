"""Every key of the configuration with every kind of wrong value: one sentence, or it is right.

In one process and without training: composed, typed, planned, and the parts built.
"""

import math
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import hydra
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from torch import nn

from largebatch.common.errors import ConfigError
from largebatch.conf.build import build, find_target
from largebatch.conf.config import TrainConfig, typed
from largebatch.distributed.ranks import Ranks, pick_device
from largebatch.train.build import build_optimizer, check_batches, try_one_pass
from largebatch.train.engines.model_options import within_memory
from largebatch.train.models import MLP
from largebatch.train.run_spec import checked_plan
from largebatch.train.tasks import check_task

SMALL = ("task=bytes", "task.num_bytes=65536", "task.num_eval=64", "budget.samples=1024")
SCHEDULED = ("task=digits", "budget.samples=1e6")

# Words that compose a run, and the part of it whose keys are tried there.
PARTS: dict[str, tuple[tuple[str, ...], str]] = {
    "the run": (("task=digits", "budget.samples=1024"), ""),
    "task=bytes": (SMALL, "task"),
    "task=dpo": (("task=dpo", "task.pairs.num_train=256", "task.pairs.num_eval=64"), "task"),
    "task=nqm": (("task=nqm", "budget.samples=1024"), "task"),
    "model=byte_mlp": (SMALL, "model"),
    "model=transformer": (("task=text", *SMALL[1:], "model=transformer_tiny"), "model"),
    "mode=lr_find": (("task=digits", "mode=lr_find"), "mode"),
    **{f"optim={name}": ((*SMALL, f"optim={name}"), "optim")
       for name in ("adamw", "sgd", "lamb", "lars", "shampoo", "soap", "kfac", "muon", "kl_soap",
                    "soap_muon", "mano", "muon_hyperball")},
    **{f"lr={name}": ((*SCHEDULED, f"lr={name}", "lr.warmup_samples=256"), "lr")
       for name in ("cosine", "inverse_sqrt", "polynomial", "step", "wsd")},
    **{f"batch={name}": ((*SCHEDULED, f"batch={name}"), "batch")
       for name in ("geometric", "goodput", "late_switch", "loss_triggered", "norm_test", "rampup",
                    "seesaw", "smith", "sqrt_noise", "stages")},
    **{f"scaling={name}": ((*SCHEDULED, f"scaling={name}"), "scaling")
       for name in ("adam_sde", "half_life", "legw", "power", "sqrt")},
}  # fmt: skip

VALUES: list[Any] = [
    None, True, "x", "", math.nan, math.inf, -1, 0, 0.5, 5.0, 1e5, 1e9, 1e12, 1e30, 1e-300, 2**70,
    "4e6", "1e400", [], [8], [0.9, 2], [math.nan], {}, {"a": 1}, "é x",
]  # fmt: skip
SLICES = 5

ALONE = Ranks("none", 0, 1, 0, 1, "127.0.0.1", 0)
ENOUGH = 20.0
"""Seconds of processor time within which any value has to be refused or taken."""


def compose(words: tuple[str, ...]) -> DictConfig:
    with hydra.initialize_config_module("largebatch.conf", version_base="1.3"):
        composed = hydra.compose("train", overrides=list(words))
    OmegaConf.resolve(composed)
    return composed


def check_plan(config: TrainConfig) -> None:
    checked_plan(config, max(1, config.engine.nproc))


def check_optimizer(config: TrainConfig) -> None:
    check_plan(config)
    build_optimizer(config, MLP(8, 4, 2), ALONE)


def check_model(config: TrainConfig) -> None:
    with within_memory(64):  # a model of some gigabytes is right, and too slow for a test
        model = build(config.model, "model", nn.Module)
    try_one_pass(build(config.task, "task"), model)


def check_data(config: TrainConfig) -> None:
    check_task(build(config.task, "task"))


def check_run(config: TrainConfig) -> None:
    plan, _ = checked_plan(config, max(1, config.engine.nproc))
    check_batches(plan, build(config.task, "task"), ALONE)
    find_target(config.engine._target_, "engine._target_")
    try:
        pick_device(config.engine.device, ALONE)
    except ValueError as error:
        raise ConfigError(str(error)) from error


CHECKS: dict[str, Callable[[TrainConfig], None]] = {
    "task": check_data, "model": check_model, "optim": check_optimizer,
    "lr": check_plan, "batch": check_run, "scaling": check_plan, "": check_run, "mode": check_plan,
}  # fmt: skip


def keys(node: Any, above: str = "") -> Iterator[str]:
    for name, below in node.items():
        if isinstance(below, dict) and below:
            yield from keys(below, f"{above}{name}.")
        else:
            yield f"{above}{name}"


def changed(node: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    name, _, below = key.partition(".")
    return {**node, name: changed(node[name], below, value) if below else value}


def outcome(part: str, composed: DictConfig, config: TrainConfig, key: str, value: Any) -> str:
    """What became of a value: "right", or the sentence it is refused with."""
    _, group = PARTS[part]
    signal.setitimer(signal.ITIMER_PROF, ENOUGH)
    try:
        if group in ("task", "model", "optim", "lr", "batch"):  # free of types until they are built
            now = replace(config, **{group: changed(getattr(config, group), key, value)})
        else:
            edited = composed.copy()
            OmegaConf.update(edited, f"{group}.{key}" if group else key, value, merge=False)
            now = typed(edited)
        CHECKS[group](now)
        told = "right"
    except ValueError as error:  # of `typed`, which `replace` goes around, a ConfigError
        told = str(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    assert told.strip()
    assert "\n" not in told, told
    return told


def is_senseless(value: Any) -> bool:
    """Whether a number is none, or none that a device computes with: right nowhere."""
    if isinstance(value, list):
        return any(map(is_senseless, value))
    return isinstance(value, float) and (math.isnan(value) or value == 1e-300)


def too_long(number: int, frame: Any) -> None:
    raise TimeoutError


@pytest.fixture(autouse=True)
def _cheap() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before = signal.signal(signal.SIGPROF, too_long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    signal.signal(signal.SIGPROF, before)
    torch.set_num_threads(threads)


WHOLE = [
    pytest.param(part, place, marks=[pytest.mark.matrix] if place else [])
    for part in PARTS
    for place in range(SLICES)
]


@pytest.mark.parametrize(("part", "place"), WHOLE)
def test_every_key_takes_a_value_or_refuses_it_in_a_sentence(part: str, place: int) -> None:
    words, group = PARTS[part]
    composed = compose(words)
    config = typed(composed)
    CHECKS[group](config)
    plain: Any = OmegaConf.to_container(composed)
    of_groups = {"task", "model", "optim", "lr", "batch", "scaling", "study", "mode", "logger"}
    node = plain[group] if group else {k: v for k, v in plain.items() if k not in of_groups}
    wrong = []
    for number, key in enumerate(keys(node)):
        if key.startswith("reference."):  # the model's own keys, which are tried as the model's
            continue
        for value in VALUES[(number + place) % SLICES :: SLICES]:
            try:
                told = outcome(part, composed, config, key, value)
            except Exception as error:
                wrong.append(f"{group}.{key}={value!r}: {type(error).__name__}: {error}")
                continue
            if told == "right" and is_senseless(value):
                wrong.append(f"{group}.{key}={value!r} is accepted")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["optim.betas=0.9"], ["optim.betas", "0.9", "list of 2"]),
        (["optim=sgd", "optim.weight_decay=null"], ["optim.weight_decay", "number", "null"]),
        (["optim.eps=[]"], ["optim.eps", "number", "[]"]),
        (["optim.fused=x"], ["optim.fused", "true or false", "'x'"]),
        (["optim._partial_=x"], ["optim._partial_", "'x'"]),
        (["optim=sgd", "optim.momentum=nan"], ["optim.momentum", "number", "nan"]),
        (["optim=sgd", "optim.momentum=1.5"], ["optim.momentum", "<= 1", "1.5"]),
        (["optim=soap", "optim.block_size=true"], ["optim.block_size", "whole number", "true"]),
        (["optim=kfac", "optim.damping=true"], ["optim.damping", "number", "true"]),
        (["lr=step", "lr.drop_samples=320"], ["lr.drop_samples", "list", "320"]),
        (["model.context=[8]"], ["model.context", "whole number", "[8]"]),
        (["model.context=5"], ["do not fit", "model.*"]),
        (["model.hidden=1e9"], ["model", "lower its sizes"]),
        (["model=transformer_tiny", "task=text", "model.depth=1e5"], ["model.depth", "100000"]),
        (["model=transformer_tiny", "task=text", "model.tie_embeddings={}"],
         ["model.tie_embeddings", "true or false", "{}"]),
        (["batch.size=1e12"], ["1000000000000 samples", "GiB", "lower batch.size"]),
        (["batch=rampup", "batch.start=1", "batch.increment=1", "batch.size=1e9",
          "budget.samples=1e12", "batch.ramp_samples=1e12"], ["batch.increment"]),
        (["seed=1e30"], ["seed", "2^64", "1e+30"]),
        (["noise.half_life_samples=1e30"], ["noise.half_life_samples", "2^64"]),
        (["task.num_eval=1e9"], ["task.num_eval", "held out", "1000000000"]),
        (["engine.device=''"], ["engine.device", "empty", "null"]),
        (["throughput.formula=''"], ["throughput.formula", "empty"]),
        (["engine.nproc=1e5", "batch.size=1e5"], ["engine.nproc=100000", "GiB", "fewer ranks"]),
        (["clip_norm=1e-300"], ["clip_norm", "FP32", "1e-300"]),
        (["engine=fsdp", "noise.small=auto"],
         ["noise.small=auto means example", "engine=fsdp", "noise.small=rank"]),
        (["optim._target_=torch.nn.Linear"], ["optim", "Linear"]),
        (["lr._target_=collections.Counter"], ["lr", "Counter"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)  # fmt: skip
def test_the_sentence_names_key_and_value(
    words: list[str], named: list[str], train: Callable[..., int], capsys: Any, tmp_path: Any
) -> None:
    assert train(*words, "budget.samples=1024", "hydra.run.dir=run") == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert all(word in told for word in named), told
    assert not [*tmp_path.glob("run/*")]


PLAIN = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=4,
)


@settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(part=st.sampled_from([part for part in PARTS if part.startswith(("optim", "lr", "batch"))]),
       place=st.integers(0, 20), value=PLAIN)  # fmt: skip
def test_whatever_is_written_is_taken_or_refused(part: str, place: int, value: Any) -> None:
    words, group = PARTS[part]
    if part not in _CONFIGS:
        composed = compose(words)
        _CONFIGS[part] = composed, typed(composed)
    composed, config = _CONFIGS[part]
    names = [*keys(getattr(config, group))]
    outcome(part, composed, config, names[place % len(names)], value)


_CONFIGS: dict[str, tuple[DictConfig, TrainConfig]] = {}
