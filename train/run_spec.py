"""What rank 0 orders of a run, checked as far as it can be without torch."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf

from largebatch.common.errors import ConfigError, format_config_error, refusing
from largebatch.common.memory import RANK_BYTES, check_memory
from largebatch.conf.build import build
from largebatch.conf.config import ScalingConfig, TrainConfig, typed
from largebatch.conf.yaml_text import to_yaml
from largebatch.distributed.ranks import Ranks
from largebatch.records.checkpoints import samples_of
from largebatch.records.record import check_free
from largebatch.schedules import (
    RULES,
    BatchSplit,
    CoupledRamp,
    Curve,
    Hyper,
    NoiseRamp,
    Plan,
    Ramp,
    Rule,
)
from largebatch.schedules.scaling import check_options
from largebatch.train.checkpoints.branch import find_branch
from largebatch.train.checkpoints.files import check_elsewhere
from largebatch.train.checkpoints.resume import Resumption, find_resumption
from largebatch.train.lr_find.results import check_table
from largebatch.train.lr_find.search import as_sweep, sweep_plan
from largebatch.train.sweeps import planned_sweep

if TYPE_CHECKING:
    from torch import nn

    from largebatch.train.tasks import Task


@dataclass(frozen=True)
class RunSpec:
    """All that rank 0 tells the others: the resolved configuration, the plan, the folder, the
    names.
    """

    config: TrainConfig
    plan: Plan
    folder: Path
    optimizer: str
    """Name of the optimizer's choice, as records carry it."""
    task: str
    model: str
    """Name of the model's choice, or the class of a custom one."""
    sweep: str | None = None
    """Name of the sweep or study that the run belongs to."""
    name: str = ""
    """What the run is called in a tracker: what sets it apart in its sweep, or its own words."""
    hydra_files: Mapping[str, str] = field(default_factory=dict)
    """Content of the files in `.hydra/`."""
    noise_source: str | None = None
    """Which small gradients the noise scale is measured with, `auto` resolved."""
    resumption: Resumption | None = None
    """Of the run that is in the folder already."""
    origin: Path | None = None
    """The checkpoint of another run that this one begins from."""
    current: Path | None = None
    """Where paths are relative to, with hydra.job.chdir; None: where each rank was started."""
    words: Mapping[str, Any] = field(default_factory=dict)
    """What the other ranks are sent, in values of JSON."""
    given: "Given | None" = None
    """Objects in the place of those that the configuration names."""


@dataclass(frozen=True)
class Given:
    """What the caller of a run in Python has made; None: the run makes it by the configuration."""

    task: "Task | None" = None
    model: "nn.Module | None" = None
    skeleton: "nn.Module | None" = None
    """The model on the meta device, where it can be copied."""


def received_spec(words: Mapping[str, Any]) -> RunSpec:
    """The spec that rank 0 has sent as `words`; without what rank 0 alone has to do with."""
    if words["begun_in"] not in sys.path:  # where the user's own classes are
        sys.path.insert(0, words["begun_in"])
    config = typed(OmegaConf.create(words["config"]))
    plan = make_plan(config)
    if config.mode is not None:
        config = as_sweep(config, plan)
    resumed = words["resumed"]
    return RunSpec(
        config=config,
        plan=plan,
        folder=Path(words["folder"]),
        **words["names"],
        noise_source=words["noise_source"],
        current=words["current"] and Path(words["current"]),
        resumption=resumed and Resumption(resumed[0] and Path(resumed[0]), resumed[1]),
        origin=words["origin"] and Path(words["origin"]),
        words=words,
    )


def resolve_run(composed: DictConfig, ranks: Ranks, settings: Any = None) -> RunSpec:
    """The order of the run that Hydra has composed.

    Args:
        settings: Hydra's own; None: those of the program that Hydra runs.
    """
    settings = HydraConfig.get() if settings is None else settings
    config = typed(composed)
    single = settings.mode == RunMode.RUN
    if single and config.study is not None:
        raise ConfigError("a study is many runs: use largebatch sweep study=…")
    if config.engine.nproc > 1 and ranks.size > 1:
        raise ConfigError(
            f"engine.nproc={config.engine.nproc} starts its own ranks, but {ranks.launcher} has "
            f"started {ranks.size} already: leave it at 1"
        )
    with refusing():
        ranks_here = f"engine.nproc={config.engine.nproc}"
        check_memory(config.engine.nproc * RANK_BYTES, ranks_here, "start fewer ranks")
    plan, source = checked_plan(config, max(ranks.size, config.engine.nproc))
    folder = Path(settings.runtime.output_dir)
    if config.mode is not None:
        config = as_sweep(config, plan)
        check_table(folder)
    values = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    overrides, hydras = (
        OmegaConf.to_container(part, enum_to_str=True)
        for part in (settings.overrides.task, settings)
    )
    hydra_files = {
        "config.yaml": to_yaml(values),
        "overrides.yaml": to_yaml(overrides),
        "hydra.yaml": to_yaml({"hydra": hydras}),
    }
    if config.checkpoint.folder is not None:
        check_elsewhere(folder, config.checkpoint.folder)
    resumption = None
    if config.resume == "auto" or not single:  # a sweep resumes in its folder
        world = max(ranks.size, config.engine.nproc)
        resumption = find_resumption(folder, hydra_files["config.yaml"], world, plan)
    if resumption is None:
        check_free(folder)
    try:
        world, begun_in = max(ranks.size, config.engine.nproc), Path(settings.runtime.cwd)
        origin = _origin(config, composed, resumption, world, begun_in)
    except BaseException:
        if resumption is not None:
            resumption.release()
        raise
    names: dict[str, Any] = {
        "optimizer": str(settings.runtime.choices["optim"]),
        "task": _choice(config.task, str(settings.runtime.choices["task"])),
        "model": _choice(config.model, str(settings.runtime.choices["model"])),
        "sweep": None if single else Path(settings.sweep.dir).name,
        "name": _name(settings, folder),
    }
    checkpoint = None if resumption is None else resumption.checkpoint
    words = {
        "config": values,
        "current": str(Path.cwd()) if settings.job.chdir else None,
        "begun_in": settings.runtime.cwd,
        "folder": str(folder),
        "names": names,
        "noise_source": source,
        "resumed": resumption and [checkpoint and str(checkpoint), resumption.samples],
        "origin": origin and str(origin),
    }
    return RunSpec(
        config=config,
        plan=plan,
        folder=folder,
        **names,
        hydra_files=hydra_files,
        noise_source=source,
        resumption=resumption,
        origin=origin,
        current=Path.cwd() if settings.job.chdir else None,
        words=words,
    )


def _name(settings: Any, folder: Path) -> str:
    words = [str(word) for word in settings.overrides.task if "logger" not in word]
    if settings.mode != RunMode.RUN:
        planned = planned_sweep()
        if planned is None:  # a study's, which says in its folders what sets its runs apart
            return str(settings.sweep.subdir)
        words = [word for word in words if word not in planned["common"]]
    return " ".join(words) or "/".join(folder.parts[-2:])


def _origin(
    config: TrainConfig, composed: DictConfig, resumption: Resumption | None, world: int,
    begun_in: Path,
) -> Path | None:  # fmt: skip
    """Where the run branches from; None: nowhere, or it resumes from a checkpoint of its own."""
    if config.branch_from is None or (resumption is not None and resumption.checkpoint is not None):
        return None
    resolved = OmegaConf.create(to_yaml(OmegaConf.to_container(composed, resolve=True)))
    origin = find_branch(config.branch_from, begun_in, resolved, world)
    seen, budget = samples_of(origin), config.budget.samples
    until = min(budget, config.target.give_up_samples or budget)
    if seen >= until:
        raise ConfigError(
            f"branch_from={config.branch_from} has seen {seen} samples, and this run ends at "
            f"{until}: raise budget.samples above it, or branch from an earlier checkpoint"
        )
    return origin


def checked_plan(config: TrainConfig, data_parallel_size: int) -> tuple[Plan, str | None]:
    """The run's plan, and which small gradients its noise scale is measured with."""
    plan = make_plan(config)
    config.outer.check_world(data_parallel_size)
    with refusing():
        micro_batch_size = config.engine.known_micro_batch_size
        plan.check_divisible(data_parallel_size, micro_batch_size)
        splits = plan.splits(data_parallel_size, micro_batch_size)
        groups = config.outer.groups
        source = noise_source(
            config.noise.small, data_parallel_size, splits, micro_batch_size, groups
        )
    if source is None and isinstance(plan.ramp, NoiseRamp):
        raise ConfigError(
            "the ramp follows the noise scale, which noise.small=null does not measure: use "
            "noise.small=auto, or a ramp that is planned"
        )
    return plan, source


def noise_source(
    small: str | None,
    data_parallel_size: int,
    splits: Sequence[BatchSplit],
    micro_batch_size: int | None,
    groups: int = 1,
) -> str | None:
    """Which small gradients `noise.small` means in this run; `auto` the same in a world of any
    size, so that a run resumed in another one measures the same.

    Args:
        groups: of ranks, each with a gradient of its own part of the batch.

    Raises:
        ConfigError: ones that are the whole batch somewhere in it, from which nothing follows.
    """
    if small == "auto":
        smallest = min(split.global_batch_size for split in splits) // groups
        cut = micro_batch_size is not None and 2 * micro_batch_size <= smallest
        return "micro_batch" if cut else "example"
    if small in (None, "example"):
        return small
    accumulating = small != "rank"
    alone = [
        split.global_batch_size
        for split in splits
        if data_parallel_size // groups * (split.gradient_accumulation_steps if accumulating else 1)
        < 2
    ]
    if not alone:
        return small
    raise ConfigError(
        f"noise.small={small} sees one gradient in a batch of {alone[0]}, and noise shows in the "
        "difference of several: use more ranks, a smaller engine.micro_batch_size, or "
        "noise.small=example"
    )


def _choice(node: Mapping[str, Any], choice: str) -> str:
    """The name of a choice; of a class of the user's own, that class."""
    return str(node["_target_"]) if choice == "custom" else choice


def make_plan(config: TrainConfig) -> Plan:
    """The run's plan; with mode=lr_find that of the sweep at its last batch size."""
    optim, scaling = config.optim, config.scaling
    with refusing():
        plan = Plan(
            ramp=build(config.batch, "batch", (Ramp, CoupledRamp)),
            curve=build(config.lr, "lr", Curve),
            budget_samples=config.budget.samples,
            base_lr=optim["lr"],
            base_batch=scaling.base_batch,
            rule=_rule(scaling),
            hold=scaling.hold,
            base_samples=scaling.base_samples,
            duration_exponent=scaling.duration_exponent or 0.0,
            hyper=Hyper.of_group(optim, optim["lr"]),
            tokens_per_sample=config.budget.tokens_per_sample,
        )
        return plan if config.mode is None else sweep_plan(plan, config.mode)


def _rule(scaling: ScalingConfig) -> Rule:
    if scaling.function is None:
        rule = RULES[scaling.rule]
    else:
        try:
            rule = get_method(scaling.function)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"scaling.function: {format_config_error(error)}") from error
        check_options(rule, scaling.options)
    return partial(rule, **scaling.options) if scaling.options else rule
