"""One run from its order to its summary: build the parts, train, close the record."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from largebatch.conf.config import EngineConfig
from largebatch.conf.errors import ConfigError, RanksEnded
from largebatch.schedules.counts import real_number
from largebatch.train.annotations import in_yaml
from largebatch.train.build import build, call, check_arguments, check_kind
from largebatch.train.data_identity import check_data, data_of
from largebatch.train.engines import Engine
from largebatch.train.evaluation import EvaluationGrid, evaluate
from largebatch.train.example_gradients import ExampleGradients
from largebatch.train.flops import flops_of
from largebatch.train.gradient_noise import GradientNoise
from largebatch.train.guard import Guard
from largebatch.train.interruption import Interruption
from largebatch.train.loggers import NoLogger, SafeLogger
from largebatch.train.loop import Loop, Progress
from largebatch.train.lr_find import LRFinder
from largebatch.train.lr_results import publish
from largebatch.train.micro_batch import find_micro_batch_size
from largebatch.train.model_options import checkpoint_activations, compile_blocks, within_memory
from largebatch.train.order import Order
from largebatch.train.peaks import chosen, peaks_of
from largebatch.train.precision import Precision
from largebatch.train.provenance import device_name, provenance
from largebatch.train.ranks import Ranks
from largebatch.train.record import RunFolder, unwritable
from largebatch.train.reporter import Reporter, Silence
from largebatch.train.tasks import Task, check_task, sampler_of
from largebatch.train.team import Team
from largebatch.train.throughput import Throughput
from largebatch.train.trial import MOST_TRIED, check_batches, try_one_pass

if TYPE_CHECKING:
    from largebatch.train.checkpoint import Checkpoints


@dataclass
class Parts:
    task: Task
    engine: Engine
    optimizer: Optimizer
    noise: GradientNoise | None
    num_parameters: int
    data: Mapping[str, str]
    """The task's provenance."""
    progress: Progress = field(default_factory=Progress)


def build_parts(order: Order, ranks: Ranks, device: torch.device) -> Parts:
    """Task, model, engine and optimizer as configured, the model the same on every rank.

    Raises:
        ConfigError: a target that cannot be imported, does not take its arguments or refuses a
        value.
    """
    config = order.config
    task: Task = build(config.task, "task")
    data = check_task(task)
    check_batches(order.plan, task, ranks)
    torch.manual_seed(config.seed)
    trains_here = device.type == "cpu" and not config.engine.needs_group  # its gradients too
    with within_memory(ranks.local_size * (2 if trains_here else 1)):
        model: nn.Module = build(config.model, "model", nn.Module)
    num_parameters = sum(p.numel() for p in model.parameters())
    if num_parameters <= MOST_TRIED:
        try_one_pass(task, model)
    size = config.engine.micro_batch_size
    prepare_model(config.engine, model)
    engine: Engine = build(
        config.engine.target,
        "engine",
        model=model,
        ranks=ranks,
        device=device,
        micro_batch_size=None if size == "auto" else size,
        precision=Precision(config.precision, device),
    )
    optimizer = build_optimizer(config.optim, engine.model, ranks)
    if not engine.can_skip and Guard(config.guard).skips:
        raise ConfigError(
            "engine=deepspeed steps whatever the gradient: set guard.non_finite and guard.spike to "
            "rollback or stop, or use engine=ddp or fsdp"
        )
    try:
        optimizer = engine.attach(optimizer, config.clip_norm)
        if size == "auto":
            sizes = [split.batch_size for split in order.plan.splits(ranks.size, None)]
            engine.set_micro_batch_size(
                find_micro_batch_size(engine, optimizer, task, ranks, sizes)
            )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    noise = build_noise(order, engine, optimizer)
    return Parts(task, engine, optimizer, noise, num_parameters, data)


def prepare_model(config: EngineConfig, model: nn.Module) -> None:
    """What is done to a model whatever the engine.

    Raises:
        ConfigError: it cannot be.
    """
    try:
        if config.activation_checkpointing:
            checkpoint_activations(model)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.compile:
        compile_blocks(model)


def build_throughput(order: Order, task: Task, ranks: Ranks, device: torch.device) -> Throughput:
    """What rates are made with.

    Raises:
        ConfigError: a formula that is not known, or not for this model.
    """
    config, name = order.config.throughput, device_name(device)
    known = peaks_of(name)
    flops = None
    if config.formula is not None or known or config.peak_tflops is not None:
        try:
            flops = flops_of(
                partial(build, order.config.model, "model"), task, config.formula or "auto"
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
    peak = chosen(config.peak_tflops, name)
    others = tuple(other for other in known if other != peak)
    return Throughput(flops, ranks.size, peak, others, config.steps_left_out)


def build_noise(order: Order, engine: Engine, optimizer: Optimizer) -> GradientNoise | None:
    """What measures the noise scale, where it is asked for.

    Raises:
        ConfigError: it cannot be measured so in this run.
    """
    if order.noise_seam is None:
        return None
    noise = order.config.noise
    try:
        seam = engine.small_gradients(order.noise_seam)
        if noise.small == "auto" and isinstance(seam, ExampleGradients) and seam.missed:
            raise ConfigError(
                "noise.small=auto finds no engine.micro_batch_size that cuts the smallest batch, "
                "and layers whose gradients are not known sample by sample "
                f"({', '.join(seam.missed[:3])}, …): set engine.micro_batch_size to at most half "
                "of the smallest batch"
            )
        return GradientNoise(
            seam,
            noise.half_life_samples,
            noise.every,
            by_layer=order.config.record.layers,
            optimizer=optimizer if noise.preconditioned else None,
            copies=engine.gradient_copies,
        )
    except ConfigError:
        raise
    except ValueError as error:
        meant = f"noise.small=auto means {order.noise_seam} in this run, and "
        raise ConfigError(f"{meant if noise.small == 'auto' else ''}{error}") from error


def build_optimizer(node: Mapping[str, Any], model: nn.Module, ranks: Ranks) -> Optimizer:
    """The optimizer over the model's parameters, or over the model where it asks for modules.

    One with a keyword `process_group` is given that of all ranks, to share its work over them.
    """
    if node.get("_partial_") is not True:
        raise ConfigError(
            "optim._partial_ must be true, the parameters come later, got "
            f"{in_yaml(node.get('_partial_'))}"
        )
    make = build(node, "optim")
    try:
        if "momentum" in make.keywords:  # torch's own take any that is not negative
            real_number(make.keywords["momentum"], "optim.momentum", least=0.0, most=1.0)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if ranks.size > 1 and "process_group" in inspect.signature(make.func).parameters:
        make = partial(make.func, **{"process_group": dist.group.WORLD} | make.keywords)
    takes_model = getattr(make.func, "takes_model", False)
    argument = model if takes_model else list(model.named_parameters())
    check_arguments(make.func, (argument,), make.keywords, "optim")
    optimizer: Optimizer = call(partial(make, argument), make.keywords, "optim")
    check_kind(optimizer, Optimizer, "optim._target_", str(node["_target_"]))
    return optimizer


def run(
    order: Order,
    team: Team,
    device: torch.device,
    watch: Callable[[dict[str, Any]], None] = lambda line: None,
) -> dict[str, Any]:
    """Train as ordered; returns the summary, which rank 0 has also written.

    Args:
        watch: sees every line, on rank 0.

    Raises:
        ConfigError: before anything is written.
        RanksEnded: a fault of another rank.
    """
    ranks = team.ranks
    parts = build_parts(order, ranks, device)
    if not ranks.is_first:
        parts.engine.as_first_rank([0.0])  # when rank 0 has opened the record
        return _train(order, parts, ranks, device, Silence())
    throughput = build_throughput(order, parts.task, ranks, device)
    folder, logger = _opened(order, parts.task, parts.engine.data_parallel_size)
    parts.engine.as_first_rank([0.0])
    every = order.config.record.every
    reporter = Reporter(folder, logger, throughput, ranks.size, every, watch)

    def failed(error: BaseException) -> dict[str, Any]:
        parts.progress.status = "failed"
        told = str(error) if isinstance(error, RanksEnded) else f"{type(error).__name__}: {error}"
        return _summary(order, parts, ranks, device, reporter) | {"error": told}

    def abandon(ended: RanksEnded) -> None:
        folder.close(failed(ended))
        reporter.__exit__(type(ended), ended, None)

    with folder, team.closing(abandon):
        try:
            with reporter:
                summary = _train(order, parts, ranks, device, reporter)
        except BaseException as error:
            cause = team.cause(error)
            summary = failed(cause)
            close_record(folder, summary)
            logger.finish(summary)
            if cause is error:
                raise
            raise cause from error
        close_record(folder, summary)
        logger.finish(summary)
    return summary


def close_record(folder: RunFolder, summary: dict[str, Any]) -> None:
    """Write the summary; where that cannot be, the summary says so of itself."""
    try:
        folder.close(summary)
    except OSError as error:
        told = f"the record in {folder.path} could not be completed: {error}"
        summary |= {
            "status": "failed",
            "error": f"{summary['error']}; {told}" if "error" in summary else told,
        }


def _opened(order: Order, task: Task, world: int) -> tuple[RunFolder, SafeLogger]:
    """The run's folder and logger, on rank 0.

    Raises:
        ConfigError: the folder holds another run, or cannot be written.
    """
    resumed, owner = None, None
    if order.resumption is not None:
        resumed, owner = order.resumption.samples, order.resumption.owner
        if order.resumption.checkpoint is not None:
            check_data(order.resumption.checkpoint, task)
    logger = _logger(order)  # first: what is refused leaves a folder as it was
    try:
        return RunFolder(order.folder, order.hydra_files, resumed, owner, world), logger
    except OSError as error:
        raise ConfigError(unwritable(error)) from error


def _train(
    order: Order, parts: Parts, ranks: Ranks, device: torch.device, tell: Silence
) -> dict[str, Any]:
    config = order.config
    before = None if order.resumption is None else order.resumption.checkpoint
    checkpoints = None
    if config.checkpoint.saves or before is not None:
        checkpoints = _checkpoints(order, parts, ranks, tell)
    finder = None if config.mode is None else LRFinder(config.mode)
    most = parts.engine.micro_batch_size(order.plan.final_batch_size)
    with Interruption() as interruption:
        loop = Loop(
            plan=order.plan,
            task=parts.task,
            engine=parts.engine,
            optimizer=parts.optimizer,
            sampler=sampler_of(parts.task, config.seed),
            ranks=ranks,
            evaluate=partial(evaluate, parts.task, parts.engine, ranks, most)
            if finder is None
            else None,
            grid=EvaluationGrid(config.evaluation.growth),
            record=tell.line,
            interruption=interruption,
            noise=parts.noise,
            guard=Guard(config.guard),
            event=tell.event,
            checkpoints=checkpoints if config.checkpoint.saves else None,
            rewind=tell.rewind,
            phase=tell.phase,
            clip_norm=config.clip_norm,
            target_loss=config.target.loss,
            give_up_samples=config.target.give_up_samples,
            record_layers=config.record.layers,
            enough=finder or (lambda line: False),
            progress=parts.progress,
        )
        if checkpoints is not None and before is not None:
            loop.load_state_dict(checkpoints.load(before))
        if order.resumption is not None and order.resumption.hole is not None:
            progress = parts.progress
            told = {"step": progress.steps, "samples": progress.samples}
            tell.event({"kind": "hole", "reason": order.resumption.hole} | told)
        try:
            loop.run()
        except BaseException:
            if checkpoints is not None:
                checkpoints.settle()
            raise
    summary = _summary(order, parts, ranks, device, tell)
    if checkpoints is not None and checkpoints.failures:
        summary["checkpoint_failures"] = checkpoints.failures
    if interruption.signal is not None:
        summary["signal"] = interruption.signal
    if finder is not None:
        summary |= finder.outcome(parts.progress.status)
        if ranks.is_first:
            try:
                publish(order.folder, summary, finder)
            except OSError as error:
                summary |= {"status": "failed", "error": f"what was found was not kept: {error}"}
    return summary


def _checkpoints(order: Order, parts: Parts, ranks: Ranks, tell: Silence) -> "Checkpoints":
    # What it stands on is a quarter of a run's imports: a run without checkpoints does without.
    from largebatch.train.checkpoint import Checkpoints

    tensors, config = parts.engine.tensors(parts.optimizer), order.config.checkpoint
    data = data_of(parts.task) if ranks.is_first and config.saves else {}

    def about() -> dict[str, Any]:
        return {"data": data, "recorded_steps": tell.recorded_steps()}

    return Checkpoints(
        order.folder, ranks, tensors, config, tell.checkpoint_failed, about, tell.flush_to_disk
    )


def _summary(
    order: Order,
    parts: Parts,
    ranks: Ranks,
    device: torch.device,
    tell: Silence,
) -> dict[str, Any]:
    config, progress = order.config, parts.progress
    reached = progress.status == "reached"
    batch_size = order.plan.final_batch_size
    return {
        "status": progress.status,
        "reason": progress.reason,
        "steps_to_target": progress.steps if reached else None,
        "samples_to_target": progress.samples if reached else None,
        "steps": progress.steps,
        "samples": progress.samples,
        "loss": progress.loss,
        "eval_loss": progress.eval_loss,
        "seconds": tell.seconds(),
        "task": order.task,
        "model": order.model,
        "optimizer": order.optimizer,
        "batch_size": batch_size,
        "lr": order.plan.peak_lr,
        "base_lr": config.optim["lr"],
        "scaling": asdict(config.scaling),
        "seed": config.seed,
        "target_loss": config.target.loss,
        "budget_samples": config.budget.samples,
        "give_up_samples": config.target.give_up_samples,
        "data_parallel_size": ranks.size,
        "micro_batch_size": parts.engine.micro_batch_size(batch_size),
        "gradient_accumulation_steps": math.ceil(
            batch_size / (ranks.size * parts.engine.micro_batch_size(batch_size))
        ),
        "precision": config.precision,
        "num_parameters": parts.num_parameters,
        "throughput": tell.rates(),
        "provenance": provenance(ranks, device) | dict(parts.data),
    }


def _logger(order: Order) -> SafeLogger:
    node = order.config.logger
    if node.get("_target_") is None:
        return SafeLogger(NoLogger)
    group = node.get("group") or order.sweep
    return SafeLogger(
        partial(
            build,
            node | {"group": group},
            "logger",
            folder=order.folder,
            config=asdict(order.config),
        )
    )
