"""`fit`: a model trained on a task, with the loop and the records of `largebatch train`."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import count
from numbers import Real
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn

from largebatch.common.errors import ConfigError, hydra_word
from largebatch.distributed.ranks import find_ranks
from largebatch.distributed.team import Team
from largebatch.records.summary import SummaryRecord
from largebatch.train.api.compose import composed_run, undisturbed
from largebatch.train.command import told, train_as_told
from largebatch.train.run_spec import Given, resolve_run
from largebatch.train.tasks import Task

_numbers: Final = count()
"""Of the teams of this process, in which several ranks meet."""


@dataclass(frozen=True)
class FitResult:
    """What a run came to.

    Attributes:
        folder: its record, which `largebatch report` draws.
        status: reached, exhausted (the budget is spent), diverged or interrupted; `reason` says
            why, where there is more to say.
        reached: whether the target was reached, after `steps_to_target` steps.
        loss: the last step's, before its update.
        eval_loss, metrics: of the last evaluation.
        seconds: since training began; 0 on ranks other than the first.
        model: the caller's, trained, on the device that it was trained on.
        summary: all of `summary.json`.
    """

    folder: Path
    status: str
    reason: str | None
    reached: bool
    steps_to_target: int | None
    steps: int
    samples: int
    loss: float | None
    eval_loss: float | None
    metrics: Mapping[str, float]
    seconds: float
    model: nn.Module = field(repr=False)
    summary: SummaryRecord = field(repr=False)


def fit(
    model: nn.Module,
    task: Task | str,
    *,
    optimizer: str = "adamw",
    batch_size: int | None = None,
    lr: float | None = None,
    samples: float | None = None,
    target: float | Mapping[str, float] | None = None,
    seed: int = 0,
    folder: Path | str | None = None,
    overrides: Sequence[str] = (),
    progress: bool = True,
) -> FitResult:
    """Train `model` in place, and write the record of the run.

    What is not given is as `largebatch train` has it. Ctrl-C ends the run between two steps, as
    interrupted. Several ranks are started by a launcher (torchrun, mpiexec), and call this alike;
    under `engine=fsdp` and `deepspeed` the model stays sharded: its checkpoint has the weights.

    Args:
        task: an object with the members of `largebatch.train.tasks.Task`, or the name of a task of
            this package (`"digits"`), with its budget and target.
        optimizer: by name, as `optim=NAME` takes it.
        batch_size: global.
        lr: peak learning rate; None: the optimizer's own.
        samples: the budget.
        target: an evaluation loss, or {metric: value}; the run ends there.
        seed: of the order of the samples, and of what is drawn in a step.
        folder: of the record; None: a new one below `runs/`.
        overrides: more of the command line's words, such as `["lr=cosine", "clip_norm=1"]`.
        progress: show on stderr how far the run is.

    Raises:
        ConfigError: a `ValueError`, before the first step: what is asked cannot be run.

    Example:
        >>> import torch
        >>> from largebatch.train import fit
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 10))
        >>> result = fit(
        ...     model, "digits", optimizer="lamb", batch_size=256, samples=2560, progress=False
        ... )
        >>> result.status, result.steps, sorted(result.metrics)
        ('exhausted', 10, ['accuracy'])
    """
    _check(model, task)
    words = [
        *_named("task", task),
        *_named("model", model),
        f"optim={hydra_word(optimizer)}",
        *_given("batch.size", batch_size),
        *_given("optim.lr", lr),
        *_given("budget.samples", samples),
        *_aim(target),
        f"seed={seed}",
        *_given("hydra.run.dir", None if folder is None else hydra_word(str(folder))),
        *overrides,
    ]
    given = Given(None if isinstance(task, str) else task, model, skeleton_of(model))
    ranks = find_ranks()
    with undisturbed(), Team(ranks, f"fit-{next(_numbers)}") as team, ExitStack() as stack:
        spec = None
        if ranks.is_first:
            composed, settings = composed_run(words)
            _check_processes(composed)
            spec = resolve_run(composed, ranks, settings)
            if spec.resumption is not None:
                stack.callback(spec.resumption.release)
        spec = replace(told(team, spec), given=given)
        summary = train_as_told(team, spec, progress and ranks.is_first)
    return FitResult(
        folder=spec.folder,
        status=summary["status"],
        reason=summary["reason"],
        reached=summary["status"] == "reached",
        steps_to_target=summary["steps_to_target"],
        steps=summary["steps"],
        samples=summary["samples"],
        loss=summary["loss"],
        eval_loss=summary["eval_loss"],
        metrics=summary.get("metrics", {}),
        seconds=summary["seconds"],
        model=model,
        summary=summary,
    )


def skeleton_of(model: nn.Module) -> nn.Module | None:
    """The model without memory, of which the arithmetic of a sample is counted; None where it
    cannot be copied.
    """
    tensors = (*model.parameters(), *model.buffers())
    memo: dict[int, Any] = {}
    for tensor in tensors:
        empty = torch.empty_like(tensor, device="meta")
        is_param = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_param else empty
    try:
        return deepcopy(model, memo)
    except Exception:  # of any class: it is the caller's
        return None


def _check(model: Any, task: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got a {type(model).__name__}")
    if isinstance(task, type):
        raise ConfigError(f"task must be an object: write {task.__name__}(…), got the class")
    if dist.is_initialized():
        raise ConfigError(
            "fit makes the process group of its ranks itself: call it before init_process_group, "
            "or after destroy_process_group"
        )


def _check_processes(composed: Any) -> None:
    if composed.engine.nproc != 1:
        raise ConfigError(
            f"engine.nproc={composed.engine.nproc} starts processes that have no model of the "
            "caller's: start them by a launcher, as in `torchrun --nproc-per-node=2 SCRIPT`"
        )


def _named(group: str, given: object) -> list[str]:
    """A name of this package's, or the class of an object."""
    if isinstance(given, str):
        return [f"{group}={hydra_word(given)}"]
    name = f"{type(given).__module__}.{type(given).__qualname__}"
    return [f"{group}=custom", f"{group}._target_={hydra_word(name)}"]


def _given(key: str, value: object) -> list[str]:
    return [] if value is None else [f"{key}={value}"]


def _aim(target: float | Mapping[str, float] | None) -> list[str]:
    if target is None:
        return []
    if isinstance(target, Real):
        return [f"target.loss={float(target)!r}"]
    if not isinstance(target, Mapping) or len(target) != 1:
        raise ConfigError(
            f'target must be a loss, or one metric as in {{"accuracy": 0.97}}, got {target!r}'
        )
    ((metric, value),) = target.items()
    return [f"target.metric={hydra_word(str(metric))}", f"target.value={value}"]
