"""One run from its spec to its summary: build the parts, train, close the record."""

import inspect
import math
import pkgutil
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from largebatch.common.errors import ConfigError, RanksEnded
from largebatch.common.memory import ran_out
from largebatch.common.text import one_line
from largebatch.conf.build import build, find_target
from largebatch.distributed.ranks import Ranks
from largebatch.distributed.team import Team
from largebatch.distributed.walltime import find_stop
from largebatch.records.record import RunFolder, unwritable
from largebatch.records.summary import SummaryRecord, aim_fields
from largebatch.train.build import build_parts, build_throughput
from largebatch.train.checkpoints.data_identity import check_data, data_of
from largebatch.train.evaluation import Evaluation, EvaluationGrid, evaluate
from largebatch.train.guard import Guard
from largebatch.train.loop import Loop
from largebatch.train.lr_find.results import publish
from largebatch.train.lr_find.search import LRFinder
from largebatch.train.parts import Parts
from largebatch.train.progress import RunProgress, of_trunk
from largebatch.train.reporting.provenance import git_commit, provenance
from largebatch.train.reporting.reporter import NullReporter, Reporter
from largebatch.train.run_spec import RunSpec
from largebatch.train.stop_signal import Stopping, StopSignal
from largebatch.train.tasks import Task, sampler_of
from largebatch.train.trackers.base import Labels
from largebatch.train.trackers.safe import NoLogger, SafeLogger

if TYPE_CHECKING:
    from largebatch.train.checkpoints.checkpoint import Checkpoints
    from largebatch.train.reporting.display import Display


def run(
    spec: RunSpec,
    team: Team,
    device: torch.device,
    display: "Display | None" = None,
) -> SummaryRecord:
    """Train as `spec` says; returns the summary, which rank 0 has also written.

    Args:
        display: what rank 0 shows while the run goes.

    Raises:
        ConfigError: before anything is written.
        RanksEnded: a fault of another rank.
    """
    ranks = team.ranks
    parts = build_parts(spec, ranks, device)
    if not ranks.is_first:
        parts.engine.as_first_rank([0.0])  # when rank 0 has opened the record
        return Run(spec, parts, ranks, device, NullReporter()).train()
    throughput = build_throughput(spec, parts.task, ranks, device)
    folder, logger = _opened(spec, parts.task, parts.engine.data_parallel_size)
    parts.engine.as_first_rank([0.0])
    every = spec.config.record.every
    watch = _nothing if display is None else display
    reporter = Reporter(folder, logger, throughput, ranks.size, every, watch)
    this = Run(spec, parts, ranks, device, reporter)
    if display is not None:
        display.begin(parts.num_parameters, this.micro_batch_size, ranks.size, device)

    def abandon(ended: RanksEnded) -> None:
        folder.close(this.failed(ended))
        reporter.__exit__(type(ended), ended, None)

    with folder, team.closing(abandon):
        try:
            with reporter:
                summary = this.train()
        except BaseException as error:
            cause = team.cause(error)
            summary = this.failed(cause)
            close_record(folder, summary)
            logger.finish(summary)
            if cause is error:
                raise
            raise cause from error
        close_record(folder, summary)
        logger.finish(summary)
    return summary


def _nothing(line: dict[str, Any]) -> None:
    """What a run that shows nothing does with its lines."""


def close_record(folder: RunFolder, summary: SummaryRecord) -> None:
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
    """The run's folder and logger, on rank 0."""
    resumed, lock = None, None
    if spec.resumption is not None:
        resumed, lock = spec.resumption.samples, spec.resumption.lock
        if spec.resumption.checkpoint is not None:
            check_data(spec.resumption.checkpoint, task)
    if spec.origin is not None:
        check_data(spec.origin, task)
    logger = _logger(spec)  # first: what is refused leaves a folder as it was
    try:
        return RunFolder(spec.folder, spec.hydra_files, resumed, lock, world), logger
    except OSError as error:
        raise ConfigError(unwritable(error)) from error


@dataclass
class Run:
    """One rank's part in a run, from the parts to the summary."""

    spec: RunSpec
    parts: Parts
    ranks: Ranks
    device: torch.device
    reporter: NullReporter
    progress: RunProgress = field(default_factory=RunProgress)

    def train(self) -> SummaryRecord:
        """Make the steps; returns the summary."""
        config, spec = self.spec.config, self.spec
        before = None if spec.resumption is None else spec.resumption.checkpoint
        before = spec.origin or before
        checkpoints = self.checkpoints() if config.checkpoint.saves or before is not None else None
        finder = None if config.mode is None else LRFinder(config.mode)
        # One rank's clock is enough: what one finds due, all do.
        first = self.ranks.is_first
        stop = find_stop(config.stop_at, config.stop_before_walltime) if first else None
        with StopSignal(math.inf if stop is None else stop.at) as signal:
            loop = self.loop(signal, finder, checkpoints if config.checkpoint.saves else None)
            if checkpoints is not None and before is not None:
                state = checkpoints.load(before)
                taken = state if spec.origin is None else of_trunk(state, loop.state_dict())
                loop.load_state_dict(taken)
            if spec.resumption is not None and spec.resumption.hole is not None:
                at = {"step": self.progress.steps, "samples": self.progress.samples}
                self.reporter.event({"kind": "hole", "reason": spec.resumption.hole} | at)
            try:
                loop.run()
            except BaseException as error:
                if checkpoints is not None:
                    checkpoints.settle()
                if ran_out(error):
                    micro_batch_size = self.micro_batch_size
                    raise MemoryError(_too_much(self.device, micro_batch_size, error)) from error
                raise
        if self.spec.given is not None:
            self.hand_back()
        if stop is not None and self.progress.status == "interrupted" and signal.is_time:
            self.progress.reason = stop.why
        summary = self.summary()
        if checkpoints is not None and checkpoints.failures:
            summary["checkpoint_failures"] = checkpoints.failures
        if signal.signal is not None:
            summary["signal"] = signal.signal
        if finder is not None:
            summary |= finder.outcome(self.progress.status)
            if first:
                try:
                    publish(spec.folder, summary, finder)
                except OSError as error:
                    failure = f"what was found was not kept: {error}"
                    summary |= {"status": "failed", "error": failure}
        return summary

    def loop(
        self, signal: StopSignal, finder: LRFinder | None, checkpoints: "Checkpoints | None"
    ) -> Loop:
        """The loop; a sweep of learning rates is not evaluated."""
        config, parts = self.spec.config, self.parts
        most = config.evaluation.micro_batch_size or self.micro_batch_size
        find = partial(evaluate, parts.task, parts.engine, self.ranks, most)
        evaluation = Evaluation(
            find if parts.average is None else partial(parts.average.evaluated, find),
            EvaluationGrid(config.evaluation.growth),
            config.evaluation.within,
        )
        stopping = Stopping(signal, config.target.aim, config.target.give_up_samples)
        return Loop(
            plan=self.spec.plan,
            parts=parts,
            sampler=sampler_of(parts.task, config.seed),
            ranks=self.ranks,
            evaluation=evaluation if finder is None else None,
            reporter=self.reporter,
            stopping=stopping if finder is None else replace(stopping, enough=finder),
            guard=Guard(config.guard),
            checkpoints=checkpoints,
            clip_norm=config.clip_norm,
            record_layers=config.record.layers,
            progress=self.progress,
        )

    def hand_back(self) -> None:
        """Leave the caller's model without the run's hooks, the average for its weights."""
        if self.parts.noise is not None:
            self.parts.noise.source.remove()
        if self.parts.average is not None:
            self.parts.average.settle()

    def checkpoints(self) -> "Checkpoints":
        """Where this run is saved, and resumed from."""
        # What it stands on is a quarter of a run's imports: a run without checkpoints does without.
        from largebatch.train.checkpoints.checkpoint import Checkpoints

        config, tell = self.spec.config.checkpoint, self.reporter
        tensors = self.parts.engine.tensors(self.parts.optimizer)
        if self.parts.average is not None:
            tensors.hold("average", self.parts.average.tensors())
        if self.parts.outer is not None:
            tensors.hold("outer", self.parts.outer.tensors())
        data = data_of(self.parts.task) if self.ranks.is_first and config.saves else {}

        def about() -> dict[str, Any]:
            return {"data": data, "recorded_steps": tell.recorded_steps()}

        return Checkpoints(
            self.spec.folder, self.ranks, tensors, config, tell.checkpoint_failed, about,
            tell.flush_to_disk,
        )  # fmt: skip

    def failed(self, error: BaseException) -> SummaryRecord:
        """The summary of a run that an error ends."""
        self.progress.status = "failed"
        message = str(error)
        if not isinstance(error, RanksEnded):
            message = f"{type(error).__name__}: {error}"
        return self.summary() | {"error": message}

    @property
    def micro_batch_size(self) -> int:
        """At the ramp's last batch size."""
        return self.parts.engine.micro_batch_size(self.spec.plan.final_batch_size)

    def summary(self) -> SummaryRecord:
        """What `summary.json` says as of now."""
        config, progress = self.spec.config, self.progress
        reached = progress.status == "reached"
        batch_size = self.spec.plan.final_batch_size
        found: SummaryRecord = {
            "status": progress.status,
            "reason": progress.reason,
            "steps_to_target": progress.steps if reached else None,
            "samples_to_target": progress.samples if reached else None,
            "steps_to_target_interpolated": progress.crossed_at if reached else None,
            "steps": progress.steps,
            "samples": progress.samples,
            "loss": progress.loss,
            "eval_loss": progress.eval_loss,
            "seconds": self.reporter.seconds(),
            "evaluation_seconds": round(progress.evaluation_seconds, 4),
            "record_seconds": self.reporter.record_seconds(),
            "task": self.spec.task,
            "model": self.spec.model,
            "optimizer": self.spec.optimizer,
            "batch_size": batch_size,
            "lr": self.spec.plan.peak_lr,
            "base_lr": config.optim["lr"],
            "scaling": asdict(config.scaling),
            "seed": config.seed,
            "target_loss": config.target.loss,
            "budget_samples": config.budget.samples,
            "give_up_samples": config.target.give_up_samples,
            "data_parallel_size": self.ranks.size,
            "micro_batch_size": self.micro_batch_size,
            "gradient_accumulation_steps": math.ceil(
                batch_size / (self.ranks.size * self.micro_batch_size)
            ),
            "precision": config.precision,
            "num_parameters": self.parts.num_parameters,
            "groups": self.parts.groups,
            "throughput": self.reporter.rates(),
            "provenance": provenance(self.ranks, self.device) | dict(self.parts.data),
            "config": asdict(config),
        }
        found |= aim_fields(config.target.aim)
        if progress.metrics:
            found["metrics"] = dict(progress.metrics)
        return found


def _too_much(device: torch.device, micro_batch_size: int, error: BaseException) -> str:
    why = one_line(error)[:200]
    return (
        f"a step takes more memory than {device} has ({why}): lower engine.micro_batch_size, now "
        f"{micro_batch_size}, set engine.activation_checkpointing=true, or shard the model "
        "(engine=fsdp)"
    )


def _logger(spec: RunSpec) -> SafeLogger:
    node = spec.config.logger
    if node.get("_target_") is None:
        return SafeLogger(NoLogger)
    find_target(node["_target_"], "logger._target_")
    takes = inspect.signature(pkgutil.resolve_name(node["_target_"])).parameters
    if "group" in takes:
        node = node | {"group": node.get("group") or spec.sweep}
    more: dict[str, Any] = {"folder": spec.folder, "config": asdict(spec.config)}
    if "labels" in takes:
        more["labels"] = Labels(
            name=spec.name,
            group=spec.sweep,
            optimizer=spec.optimizer,
            task=spec.task,
            model=spec.model,
            batch_size=spec.plan.final_batch_size,
            lr=spec.plan.peak_lr,
            seed=spec.config.seed,
            commit=git_commit(),
        )
    return SafeLogger(partial(build, node, "logger", **more))
