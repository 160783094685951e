"""One run from its order to its summary: build the parts, train, close the record."""

import inspect
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from largebatch.conf.config import ConfigError, EngineConfig
from largebatch.train.build import build, check_arguments
from largebatch.train.checkpoint import Checkpoints
from largebatch.train.engines import Engine
from largebatch.train.evaluation import EvaluationGrid, evaluate
from largebatch.train.example_gradients import ExampleGradients
from largebatch.train.gradient_noise import GradientNoise
from largebatch.train.interruption import Interruption
from largebatch.train.loggers import Logger, NoLogger
from largebatch.train.loop import Loop, Progress
from largebatch.train.lr_find import LRFinder
from largebatch.train.lr_results import publish
from largebatch.train.model_options import checkpoint_activations, compile_blocks
from largebatch.train.order import Order
from largebatch.train.precision import Precision
from largebatch.train.provenance import provenance
from largebatch.train.ranks import Ranks
from largebatch.train.record import RunFolder
from largebatch.train.sampler import Sampler
from largebatch.train.tasks import Task


@dataclass
class Parts:
    task: Task
    engine: Engine
    optimizer: Optimizer
    noise: GradientNoise | None
    progress: Progress = field(default_factory=Progress)


def build_parts(order: Order, ranks: Ranks, device: torch.device) -> Parts:
    """Task, model, engine and optimizer as configured, the model the same on every rank.

    Raises:
        ConfigError: a target that cannot be imported, does not take its arguments or refuses a
        value.
    """
    config = order.config
    task: Task = build(config.task, "task")
    torch.manual_seed(config.seed)
    model: nn.Module = build(config.model, "model")
    prepare_model(config.engine, model)
    engine: Engine = build(
        config.engine.target,
        "engine",
        model=model,
        ranks=ranks,
        device=device,
        micro_batch_size=config.engine.micro_batch_size,
        precision=Precision(config.precision, device),
    )
    optimizer = build_optimizer(config.optim, engine.model, ranks)
    try:
        optimizer = engine.attach(optimizer, config.clip_norm)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Parts(task, engine, optimizer, build_noise(order, engine, optimizer))


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
    except ValueError as error:
        raise ConfigError(str(error)) from error


def build_optimizer(node: Mapping[str, Any], model: nn.Module, ranks: Ranks) -> Optimizer:
    """The optimizer over the model's parameters, or over the model where it asks for modules.

    One with a keyword `process_group` is given that of all ranks, to share its work over them.
    """
    make = build(node, "optim")
    if ranks.size > 1 and "process_group" in inspect.signature(make.func).parameters:
        make = partial(make.func, **{"process_group": dist.group.WORLD} | make.keywords)
    takes_model = getattr(make.func, "takes_model", False)
    argument = model if takes_model else list(model.named_parameters())
    check_arguments(make.func, (argument,), make.keywords, "optim")
    try:
        optimizer: Optimizer = make(argument)
    except ValueError as error:
        raise ConfigError(f"optim: {error}") from error
    return optimizer


def run(
    order: Order,
    ranks: Ranks,
    device: torch.device,
    watch: Callable[[dict[str, Any]], None] = lambda line: None,
) -> dict[str, Any]:
    """Train as ordered; returns the summary, which rank 0 has also written.

    Args:
        watch: sees every line, on rank 0.

    Raises:
        ConfigError: before anything is written.
    """
    parts = build_parts(order, ranks, device)
    if not ranks.is_first:
        (opened,) = parts.engine.as_first_rank([0.0])
        if not opened:
            raise ConfigError("rank 0 was refused the run's folder")
        return _train(order, parts, ranks, device, lambda line: None, time.perf_counter())
    folder, logger = _opened(order, parts.engine)
    with folder:
        every, begin = order.config.record.every, time.perf_counter() - folder.seconds

        def record(line: dict[str, Any]) -> None:
            line["seconds"] = round(time.perf_counter() - begin, 4)
            if line["step"] % every == 0 or "eval_loss" in line or "batch_change" in line:
                folder.write(line)
                logger.log(line)
            watch(line)

        try:
            summary = _train(order, parts, ranks, device, record, begin, folder)
        except BaseException as error:
            parts.progress.status = "failed"
            failed = _summary(order, parts, ranks, device, begin)
            summary = failed | {"error": f"{type(error).__name__}: {error}"}
            raise
        finally:
            folder.close(summary)
            logger.finish(summary)
        return summary


def _opened(order: Order, engine: Engine) -> tuple[RunFolder, Logger]:
    """The run's folder and logger, on rank 0; the others hear whether there are any."""
    resumed = None if order.resumption is None else order.resumption.samples
    try:
        logger = _logger(order)  # first: what it refuses leaves a folder as it was
        folder = RunFolder(order.folder, order.hydra_files, resumed)
    except BaseException:
        engine.as_first_rank([0.0])
        raise
    engine.as_first_rank([1.0])
    return folder, logger


def _train(
    order: Order,
    parts: Parts,
    ranks: Ranks,
    device: torch.device,
    record: Callable[[dict[str, Any]], None],
    begin: float,
    folder: RunFolder | None = None,
) -> dict[str, Any]:
    config = order.config
    checkpoints = Checkpoints(
        order.folder, ranks, parts.engine.model, parts.optimizer, config.checkpoint.keep
    )

    def save(state: dict[str, Any]) -> None:
        if folder is not None:
            folder.flush_to_disk()  # a checkpoint must not outlive the lines before it
        checkpoints.save(state)

    finder = None if config.mode is None else LRFinder(config.mode)
    with Interruption() as interruption:
        loop = Loop(
            plan=order.plan,
            task=parts.task,
            engine=parts.engine,
            optimizer=parts.optimizer,
            sampler=Sampler(parts.task.num_train, config.seed, parts.task.replacement),
            ranks=ranks,
            evaluate=partial(
                evaluate, parts.task, parts.engine, ranks, config.engine.micro_batch_size
            )
            if finder is None
            else None,
            grid=EvaluationGrid(config.evaluation.growth),
            record=record,
            interruption=interruption,
            noise=parts.noise,
            save=save,
            save_every_samples=config.checkpoint.every_samples,
            clip_norm=config.clip_norm,
            target_loss=config.target.loss,
            give_up_samples=config.target.give_up_samples,
            record_layers=config.record.layers,
            enough=finder or (lambda line: False),
            progress=parts.progress,
        )
        if order.resumption is not None and order.resumption.checkpoint is not None:
            loop.load_state_dict(checkpoints.load(order.resumption.checkpoint))
        loop.run()
    summary = _summary(order, parts, ranks, device, begin)
    if interruption.signal is not None:
        summary["signal"] = interruption.signal
    if finder is not None:
        summary |= finder.outcome(parts.progress.status)
        if ranks.is_first:
            publish(order.folder, summary, finder)
    return summary


def _summary(
    order: Order,
    parts: Parts,
    ranks: Ranks,
    device: torch.device,
    begin: float,
) -> dict[str, Any]:
    config, progress = order.config, parts.progress
    reached = progress.status == "reached"
    batch_size = order.plan.final_batch_size
    return {
        "status": progress.status,
        "steps_to_target": progress.steps if reached else None,
        "samples_to_target": progress.samples if reached else None,
        "steps": progress.steps,
        "samples": progress.samples,
        "loss": progress.loss,
        "eval_loss": progress.eval_loss,
        "seconds": round(time.perf_counter() - begin, 4),
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
        "num_parameters": sum(p.numel() for p in parts.engine.model.parameters()),
        "provenance": provenance(ranks, device) | dict(parts.task.provenance()),
    }


def _logger(order: Order) -> Logger:
    node = order.config.logger
    if node.get("_target_") is None:
        return NoLogger()
    logger: Logger = build(
        node | {"group": node.get("group") or order.sweep},
        "logger",
        folder=order.folder,
        config=asdict(order.config),
    )
    return logger
