"""The average and the outer steps of the weights, built as they are configured."""

import inspect
from pkgutil import resolve_name

from largebatch.common.errors import ConfigError
from largebatch.conf.build import find_target
from largebatch.conf.config import TrainConfig
from largebatch.distributed.groups import RankGroups, split_ranks
from largebatch.distributed.ranks import Ranks
from largebatch.train.engines.base import Engine
from largebatch.train.weights.average import WeightAverage
from largebatch.train.weights.outer import OuterSteps


def build_average(config: TrainConfig, engine: Engine) -> WeightAverage | None:
    """The average of the weights, where one is asked for."""
    if config.average.kind is None:
        return None
    refuse_deepspeed(engine, "average")
    return WeightAverage(config.average, engine.model)


def build_outer(config: TrainConfig, engine: Engine) -> OuterSteps | None:
    """Outer steps of the weights, where they are asked for."""
    if config.outer.kind is None:
        return None
    refuse_deepspeed(engine, "outer")
    return OuterSteps(config.outer, engine.model, engine.across, engine.precision.agree)


def refuse_deepspeed(engine: Engine, group: str) -> None:
    """Refuse a group of the configuration that moves the weights beside the optimizer."""
    if not engine.can_skip:
        raise ConfigError(
            f"{group} is not for engine=deepspeed, which keeps the weights that it steps to "
            f"itself: use engine=ddp or fsdp, or {group}=none"
        )


def parted_ranks(config: TrainConfig, ranks: Ranks) -> RankGroups | None:
    """The groups of ranks that have weights of their own between outer steps; None: there is one.

    Raises:
        ConfigError: an engine that cannot keep its gradients within a group.
    """
    number, target = config.outer.groups, config.engine._target_
    if number == 1:
        return None
    find_target(target, "engine._target_")
    if "groups" not in inspect.signature(resolve_name(target)).parameters:
        raise ConfigError(
            f"outer.groups={number} is for engine=ddp and fsdp, whose gradients can stay within a "
            f"group of ranks, and not for {target}: use one of them, or outer.groups=1"
        )
    return split_ranks(ranks, number)
