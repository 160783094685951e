"""What can be tried of a task and a model before the run's folder is made."""

from typing import Final

import numpy as np
import torch
from torch import nn

from largebatch.common.errors import ConfigError, refusing
from largebatch.common.memory import check_memory, ran_out
from largebatch.common.text import one_line
from largebatch.conf.build import is_known
from largebatch.distributed.ranks import Ranks
from largebatch.schedules import Plan
from largebatch.train.tasks import Task, loss_of

MOST_TRIED: Final = 10_000_000
"""Parameters of a model that is tried on the host first, which is milliseconds."""


def check_batches(plan: Plan, task: Task, ranks: Ranks) -> None:
    """Refuse batches whose samples alone are more than this node's memory.

    Raises:
        ConfigError: with the batch size.
    """
    sample = sum(part.nbytes for part in task.train_batch(np.zeros(1, np.int64)))
    size = max(split.global_batch_size for split in plan.splits(ranks.size, None))
    held = size // ranks.size * ranks.local_size * (sample + 8)  # and their places, int64
    with refusing():
        check_memory(held, f"a global batch of {size} samples", "lower batch.size")


def try_one_pass(task: Task, model: nn.Module) -> None:
    """Compute the loss of a few samples, and leave nothing behind: whether model and task fit.

    Raises:
        ConfigError: a model and a task of this package's do not; others' errors are their own.
    """
    batch = task.train_batch(np.arange(min(32, task.num_train), dtype=np.int64))
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            loss_of(task, model, batch)
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
