"""One run from its order to its summary: build the parts, train, close the record."""

import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from largebatch.common.errors import ConfigError, RanksEnded
from largebatch.common.memory import ran_out
from largebatch.conf.build import build
from largebatch.distributed.ranks import Ranks
from largebatch.distributed.team import Team
from largebatch.distributed.walltime import find_stop
from largebatch.records.record import RunFolder, unwritable
from largebatch.train.checkpoints.data_identity import check_data, data_of
from largebatch.train.evaluation import EvaluationGrid, evaluate
from largebatch.train.guard import Guard
from largebatch.train.loop import Loop
from largebatch.train.lr_find.results import publish
from largebatch.train.lr_find.search import LRFinder
from largebatch.train.parts import Parts, build_parts, build_throughput
from largebatch.train.reporting.loggers import NoLogger, SafeLogger
from largebatch.train.reporting.provenance import provenance
from largebatch.train.reporting.reporter import NullReporter, Reporter
from largebatch.train.run_spec import RunSpec
from largebatch.train.stop_signal import StopSignal
from largebatch.train.tasks import Task, sampler_of

if TYPE_CHECKING:
    from largebatch.train.checkpoints.checkpoint import Checkpoints


def run(
    spec: RunSpec,
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
    parts = build_parts(spec, ranks, device)
    if not ranks.is_first:
        parts.engine.as_first_rank([0.0])  # when rank 0 has opened the record
        return _train(spec, parts, ranks, device, NullReporter())
    throughput = build_throughput(spec, parts.task, ranks, device)
    folder, logger = _opened(spec, parts.task, parts.engine.data_parallel_size)
    parts.engine.as_first_rank([0.0])
    every = spec.config.record.every
    reporter = Reporter(folder, logger, throughput, ranks.size, every, watch)

    def failed(error: BaseException) -> dict[str, Any]:
        parts.progress.status = "failed"
        message = (
            str(error) if isinstance(error, RanksEnded) else f"{type(error).__name__}: {error}"
        )
        return _summary(spec, parts, ranks, device, reporter) | {"error": message}

    def abandon(ended: RanksEnded) -> None:
        folder.close(failed(ended))
        reporter.__exit__(type(ended), ended, None)

    with folder, team.closing(abandon):
        try:
            with reporter:
                summary = _train(spec, parts, ranks, device, reporter)
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
        message = f"the record in {folder.path} could not be completed: {error}"
        summary |= {
            "status": "failed",
            "error": f"{summary['error']}; {message}" if "error" in summary else message,
        }


def _opened(spec: RunSpec, task: Task, world: int) -> tuple[RunFolder, SafeLogger]:
    """The run's folder and logger, on rank 0.

    Raises:
        ConfigError: the folder holds another run, or cannot be written.
    """
    resumed, lock = None, None
    if spec.resumption is not None:
        resumed, lock = spec.resumption.samples, spec.resumption.lock
        if spec.resumption.checkpoint is not None:
            check_data(spec.resumption.checkpoint, task)
    logger = _logger(spec)  # first: what is refused leaves a folder as it was
    try:
        return RunFolder(spec.folder, spec.hydra_files, resumed, lock, world), logger
    except OSError as error:
        raise ConfigError(unwritable(error)) from error


def _train(
    spec: RunSpec, parts: Parts, ranks: Ranks, device: torch.device, tell: NullReporter
) -> dict[str, Any]:
    config = spec.config
    before = None if spec.resumption is None else spec.resumption.checkpoint
    checkpoints = None
    if config.checkpoint.saves or before is not None:
        checkpoints = _checkpoints(spec, parts, ranks, tell)
    finder = None if config.mode is None else LRFinder(config.mode)
    most = parts.engine.micro_batch_size(spec.plan.final_batch_size)
    # One rank's clock is enough: what one finds due, all do.
    stop = find_stop(config.stop_at, config.stop_before_walltime) if ranks.is_first else None
    with StopSignal(math.inf if stop is None else stop.at) as stop_signal:
        loop = Loop(
            plan=spec.plan,
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
            stop_signal=stop_signal,
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
        if spec.resumption is not None and spec.resumption.hole is not None:
            progress = parts.progress
            at = {"step": progress.steps, "samples": progress.samples}
            tell.event({"kind": "hole", "reason": spec.resumption.hole} | at)
        try:
            loop.run()
        except BaseException as error:
            if checkpoints is not None:
                checkpoints.settle()
            if ran_out(error):
                raise MemoryError(_too_much(device, most, error)) from error
            raise
    if stop is not None and parts.progress.status == "interrupted" and stop_signal.is_time:
        parts.progress.reason = stop.why
    summary = _summary(spec, parts, ranks, device, tell)
    if checkpoints is not None and checkpoints.failures:
        summary["checkpoint_failures"] = checkpoints.failures
    if stop_signal.signal is not None:
        summary["signal"] = stop_signal.signal
    if finder is not None:
        summary |= finder.outcome(parts.progress.status)
        if ranks.is_first:
            try:
                publish(spec.folder, summary, finder)
            except OSError as error:
                summary |= {"status": "failed", "error": f"what was found was not kept: {error}"}
    return summary


def _too_much(device: torch.device, micro_batch_size: int, error: BaseException) -> str:
    why = (" ".join(str(error).split()) or type(error).__name__)[:200]
    return (
        f"a step takes more memory than {device} has ({why}): lower engine.micro_batch_size, now "
        f"{micro_batch_size}, set engine.activation_checkpointing=true, or shard the model "
        "(engine=fsdp)"
    )


def _checkpoints(spec: RunSpec, parts: Parts, ranks: Ranks, tell: NullReporter) -> "Checkpoints":
    # What it stands on is a quarter of a run's imports: a run without checkpoints does without.
    from largebatch.train.checkpoints.checkpoint import Checkpoints

    tensors, config = parts.engine.tensors(parts.optimizer), spec.config.checkpoint
    data = data_of(parts.task) if ranks.is_first and config.saves else {}

    def about() -> dict[str, Any]:
        return {"data": data, "recorded_steps": tell.recorded_steps()}

    return Checkpoints(
        spec.folder, ranks, tensors, config, tell.checkpoint_failed, about, tell.flush_to_disk
    )


def _summary(
    spec: RunSpec,
    parts: Parts,
    ranks: Ranks,
    device: torch.device,
    tell: NullReporter,
) -> dict[str, Any]:
    config, progress = spec.config, parts.progress
    reached = progress.status == "reached"
    batch_size = spec.plan.final_batch_size
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
        "task": spec.task,
        "model": spec.model,
        "optimizer": spec.optimizer,
        "batch_size": batch_size,
        "lr": spec.plan.peak_lr,
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


def _logger(spec: RunSpec) -> SafeLogger:
    node = spec.config.logger
    if node.get("_target_") is None:
        return SafeLogger(NoLogger)
    group = node.get("group") or spec.sweep
    return SafeLogger(
        partial(
            build,
            node | {"group": group},
            "logger",
            folder=spec.folder,
            config=asdict(spec.config),
        )
    )
