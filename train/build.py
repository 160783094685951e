"""What a run is made of, built as its configuration says: task, model, engine, optimizer."""

import inspect
from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from functools import partial
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from largebatch.common.errors import ConfigError, refusing
from largebatch.common.memory import check_memory, ran_out
from largebatch.common.numbers import real_number
from largebatch.common.text import one_line, say
from largebatch.conf.annotations import in_yaml
from largebatch.conf.build import build, call, check_arguments, check_kind, is_known
from largebatch.conf.config import TrainConfig
from largebatch.conf.engine_config import EngineConfig
from largebatch.distributed.groups import RankGroups
from largebatch.distributed.ranks import Ranks
from largebatch.optim import param_groups
from largebatch.records.target import Target
from largebatch.schedules import Plan
from largebatch.train.engines.base import Engine
from largebatch.train.engines.initial_values import InitialValues, NotRecorded, record
from largebatch.train.engines.micro_batch import find_micro_batch_size
from largebatch.train.engines.model_options import (
    checkpoint_activations,
    compile_blocks,
    wants_checkpointing,
    within_memory,
)
from largebatch.train.engines.precision import Precision
from largebatch.train.guard import Guard
from largebatch.train.noise.example_gradients import ExampleGradients
from largebatch.train.noise.gradient_noise import GradientNoise
from largebatch.train.parts import Parts
from largebatch.train.progress import Evaluated
from largebatch.train.reporting.flops import flops_of
from largebatch.train.reporting.provenance import device_name
from largebatch.train.reporting.sites import NoSites, Sites
from largebatch.train.reporting.throughput import Throughput, chosen, peaks_of
from largebatch.train.run_spec import Given, RunSpec
from largebatch.train.tasks import Task, check_mean, check_task, loss_of, to_device
from largebatch.train.tasks.metrics import metrics_of
from largebatch.train.transfer.groups import transferred
from largebatch.train.weights.build import build_average, build_outer, parted_ranks

MOST_TRIED: Final = 10_000_000
"""Parameters of a model that is tried on the host first, which is milliseconds."""


def build_parts(spec: RunSpec, ranks: Ranks, device: torch.device) -> Parts:
    """Task, model, engine and optimizer as configured, the model the same on every rank."""
    config, given = spec.config, spec.given or Given()
    task: Task = build(config.task, "task") if given.task is None else given.task
    data = check_task(task)
    check_batches(spec.plan, task, ranks)
    torch.manual_seed(config.seed)
    if given.model is None:
        model, values = build_model(config, ranks, device)
    else:
        model, values = taken_over(given.model, ranks, device), None
    num_parameters = sum(p.numel() for p in model.parameters())
    names = try_one_pass(task, model) if num_parameters <= MOST_TRIED else None
    check_aim(config.target.aim, task, names)
    if config.record.sites and config.engine.compile:
        raise ConfigError(
            "record.sites=true looks into modules, which engine.compile=true joins: set one of "
            "them to false"
        )
    prepare_model(config.engine, model, device, ranks)
    parted = parted_ranks(config, ranks)
    engine: Engine = build(
        config.engine.target,
        "engine",
        model=model,
        ranks=ranks,
        device=device,
        micro_batch_size=config.engine.known_micro_batch_size,
        precision=Precision(config.precision, device),
        **({} if values is None else {"values": values}),
        **({} if parted is None else {"groups": parted}),
    )
    optimizer = build_optimizer(config, engine.model, ranks, parted)
    groups = describe_groups(optimizer)
    if not engine.can_skip and Guard(config.guard).skips:
        raise ConfigError(
            "engine=deepspeed steps whatever the gradient: set guard.non_finite and guard.spike to "
            "rollback or stop, or use engine=ddp or fsdp"
        )
    with refusing():
        optimizer = engine.attach(optimizer, config.clip_norm)
        if config.engine.micro_batch_size == "auto":
            sizes = [split.global_batch_size for split in spec.plan.splits(ranks.size, None)]
            engine.set_micro_batch_size(
                find_micro_batch_size(engine, optimizer, task, ranks, sizes)
            )
    noise = build_noise(spec, engine, optimizer)
    average, outer = build_average(config, engine), build_outer(config, engine)
    sites = build_sites(config, engine)
    return Parts(
        task, engine, optimizer, noise, average, outer, num_parameters, data, groups, sites
    )


def build_sites(config: TrainConfig, engine: Engine) -> NoSites:
    """What watches single modules, where that is asked for."""
    if not config.record.sites:
        return NoSites()
    if not engine.can_skip:
        raise ConfigError(
            "record.sites=true is not for engine=deepspeed, which keeps the weights that it steps "
            "to itself: use engine=ddp or fsdp"
        )
    return Sites(engine.model, engine.gradient_copies)


def check_batches(plan: Plan, task: Task, ranks: Ranks) -> None:
    """Refuse batches whose samples alone are more than this node's memory."""
    sample = sum(part.nbytes for part in task.train_batch(np.zeros(1, np.int64)))
    size = max(split.global_batch_size for split in plan.splits(ranks.size, None))
    held = size // ranks.size * ranks.local_size * (sample + 8)  # and their places, int64
    with refusing():
        check_memory(held, f"a global batch of {size} samples", "lower batch.size")


def check_aim(aim: Target | None, task: Task, names: Collection[str] | None) -> None:
    """Refuse a target that is no metric of the task's.

    Args:
        names: of its metrics; None: not known before the first evaluation.
    """
    if aim is not None and (names is not None or not hasattr(task, "metrics")):
        Evaluated(0.0, dict.fromkeys(names or (), 0.0)).value(aim.metric)


def try_one_pass(task: Task, model: nn.Module) -> list[str]:
    """Compute loss and metrics of a few samples, and leave nothing behind: whether model and task
    fit. Returns the metrics' names.

    Raises:
        ConfigError: a model and a task of this package's do not, or a loss that is none; others'
            errors are their own.
    """
    batch = task.train_batch(np.arange(min(32, task.num_train), dtype=np.int64))
    first = next(model.parameters(), None)  # a caller's model may be on a device already
    batch = batch if first is None else to_device(batch, first.device)
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            loss = loss_of(task, model, batch)
            with torch.no_grad():
                names = [*metrics_of(task, model, batch)]
            if not is_known(type(task)):
                check_mean(task, model, batch, loss)
    except ConfigError:
        raise
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if ran_out(error) or not (is_known(type(task)) and is_known(type(model))):
            raise
        why = one_line(error)
        raise ConfigError(
            f"model and task do not fit each other ({why}): what task.* says of its data and "
            "what model.* takes must be the same"
        ) from error
    model.train()
    return names


def build_model(
    config: TrainConfig, ranks: Ranks, device: torch.device
) -> tuple[nn.Module, InitialValues | None]:
    """The model; on the meta device and beside its values where ranks each keep a shard of them.

    A model that is small enough to be tried on the host is whole there.
    """
    make: Callable[[], nn.Module] = partial(build, config.model, "model", nn.Module)
    why = ""
    if config.engine.shards_weights:
        try:
            model, values = record(make)
        except NotRecorded as error:
            why = str(error)
        else:
            held = sum(p.numel() * p.element_size() for p in model.parameters())
            if sum(p.numel() for p in model.parameters()) > MOST_TRIED:
                check_held(held, values, ranks, device)
                return model, values
    trains_here = device.type == "cpu" and not config.engine.needs_group  # its gradients too
    with within_memory(ranks.local_size * (2 if trains_here else 1)):
        model = make()
    if why and ranks.is_first and sum(p.numel() for p in model.parameters()) > MOST_TRIED:
        say(f"each rank builds the whole model before it is sharded ({why})")
    return model, None


def taken_over(model: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """A model of the caller's, the values of rank 0's on every rank."""
    for tensor in (*model.parameters(), *model.buffers()) if ranks.size > 1 else ():
        value = tensor.detach().to(device)
        dist.broadcast(value, 0)
        tensor.detach().copy_(value)
    return model


def check_held(num_bytes: int, values: InitialValues, ranks: Ranks, device: torch.device) -> None:
    """Refuse a model of whose values this node cannot hold what its ranks take on the host."""
    shards = num_bytes // ranks.size if device.type == "cpu" else 0
    with refusing():
        check_memory(
            (values.peak_bytes + shards) * ranks.local_size, "the model", "lower its sizes"
        )


def prepare_model(
    config: EngineConfig, model: nn.Module, device: torch.device, ranks: Ranks
) -> None:
    """What is done to a model whatever the engine."""
    with refusing():
        if wants_checkpointing(config.activation_checkpointing, model, device):
            checkpoint_activations(model)
            if config.activation_checkpointing is None and ranks.is_first:
                say(
                    f"attention has no fused backward pass on {device.type}, so each "
                    "block is computed again in the backward pass, for memory; "
                    "engine.activation_checkpointing=false leaves that off"
                )
    if config.compile:
        compile_blocks(model)


def build_throughput(spec: RunSpec, task: Task, ranks: Ranks, device: torch.device) -> Throughput:
    """What rates are made with."""
    config, name = spec.config.throughput, device_name(device)
    known = peaks_of(name)
    flops = None
    if config.formula is not None or known or config.peak_tflops is not None:
        with refusing():
            given = spec.given or Given()
            make = partial(build, spec.config.model, "model")
            if given.skeleton is not None:
                make = partial(copied, given.skeleton)
            if given.model is None or given.skeleton is not None:
                flops = flops_of(make, task, config.formula or "auto")
    peak = chosen(config.peak_tflops, name)
    others = tuple(other for other in known if other != peak)
    return Throughput(flops, ranks.size, peak, others, config.steps_left_out)


def copied(skeleton: nn.Module) -> nn.Module:
    """A model of zeros from one on the meta device, on the device that is the default."""
    model = deepcopy(skeleton).to_empty(device=torch.get_default_device())
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    return model


def build_noise(spec: RunSpec, engine: Engine, optimizer: Optimizer) -> GradientNoise | None:
    """What measures the noise scale, where it is asked for."""
    if spec.noise_source is None:
        return None
    noise = spec.config.noise
    try:
        source = engine.small_gradients(spec.noise_source)
        if noise.small == "auto" and isinstance(source, ExampleGradients) and source.missed:
            raise ConfigError(
                "noise.small=auto finds no engine.micro_batch_size that cuts the smallest batch, "
                "and layers whose gradients are not known sample by sample "
                f"({', '.join(source.missed[:3])}, …): set engine.micro_batch_size to at most half "
                "of the smallest batch"
            )
        return GradientNoise(
            source,
            noise.half_life_samples,
            noise.every,
            by_layer=spec.config.record.layers,
            optimizer=optimizer if noise.preconditioned else None,
            copies=engine.gradient_copies,
            groups=1 if engine.groups is None else engine.groups.number,
        )
    except ConfigError:
        raise
    except ValueError as error:
        meant = f"noise.small=auto means {spec.noise_source} in this run, and "
        raise ConfigError(f"{meant if noise.small == 'auto' else ''}{error}") from error


def build_optimizer(
    config: TrainConfig, model: nn.Module, ranks: Ranks, parted: RankGroups | None = None
) -> Optimizer:
    """Build the optimizer over groups of the model's parameters, as `optim.groups` makes them and
    `scaling` brings them to the model's size, and over the model itself where it asks for modules.

    One with a keyword `process_group` is given that of all ranks, or of this rank's group, to share
    its work over them.
    """
    node = config.optim
    if node.get("_partial_") is not True:
        raise ConfigError(
            "optim._partial_ must be true, the parameters come later, got "
            f"{in_yaml(node.get('_partial_'))}"
        )
    asked = node.get("groups") or {}
    groups = transferred(build_groups(asked, model), model, config)
    make = build({key: value for key, value in node.items() if key != "groups"}, "optim")
    with refusing():
        if "momentum" in make.keywords:  # torch's own take any that is not negative
            real_number(make.keywords["momentum"], "optim.momentum", least=0.0, most=1.0)
    if ranks.size > 1 and "process_group" in inspect.signature(make.func).parameters:
        own = dist.group.WORLD if parted is None else parted.own
        make = partial(make.func, **{"process_group": own} | make.keywords)
    argument: Any = groups
    if getattr(make.func, "takes_model", False):
        argument = model
        name = "groups" if "groups" in inspect.signature(make.func).parameters else "params"
        make = partial(make.func, **make.keywords | {name: groups})
    check_arguments(make.func, (argument,), make.keywords, "optim")
    optimizer: Optimizer = call(partial(make, argument), make.keywords, "optim")
    check_kind(optimizer, Optimizer, "optim._target_", str(node["_target_"]))
    if asked.get("precondition") is not None and "precondition" not in optimizer.defaults:
        raise ConfigError(
            "optim.groups.precondition is for optim=shampoo and optim=soap; "
            f"{type(optimizer).__name__} does not read it: leave it at null"
        )
    return optimizer


def build_groups(asked: Mapping[str, Any], model: nn.Module) -> list[dict[str, Any]]:
    """Build the groups that `optim.groups` asks for."""
    check_arguments(param_groups, (model,), asked, "optim.groups")
    for name in ("weight_decay", "rows"):
        if name in asked:
            raise ConfigError(f"optim.groups.{name} is for Python: set optim.weight_decay")
    made: list[dict[str, Any]] = call(partial(param_groups, model, **asked), asked, "optim.groups")
    return made


def describe_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What tells an optimizer's groups from one another, for the summary."""
    return [
        {
            "parameters": len(group["params"]),
            "elements": sum(param.numel() for param in group["params"]),
            "weight_decay": float(group.get("weight_decay", 0.0)),
        }
        | {name: group[name] for name in ("adapt", "precondition") if name in optimizer.defaults}
        | {
            name: group[name]
            for name, usual in (("lr_factor", 1.0), ("eps", optimizer.defaults.get("eps")))
            if group.get(name, usual) != usual
        }
        for group in optimizer.param_groups
    ]
