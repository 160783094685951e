"""`largebatch bench loop`: what the training loop adds to a step, beside a bare loop.

The bare loop takes the same samples of the same task through the same model and optimizer in five
lines. The loop has its defaults: a line in metrics.jsonl, the gradient norm, guard and heartbeat at
every step. Both without evaluations, and both with those of `evaluation.growth`.
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from torch import nn
from torch.optim import AdamW, Optimizer

from largebatch.benchmarks import harness
from largebatch.benchmarks.harness import add_options, against, run, timed
from largebatch.benchmarks.workloads import Bytewise, Decoding, Workload, describe
from largebatch.distributed.ranks import Ranks
from largebatch.optim import LAMB
from largebatch.records.record import RunFolder
from largebatch.schedules import Constant, ConstantBatch, Plan
from largebatch.train.engines.ddp import DDP
from largebatch.train.evaluation import Evaluation, EvaluationGrid, evaluate
from largebatch.train.loop import Loop
from largebatch.train.parts import Parts
from largebatch.train.reporting.reporter import Reporter
from largebatch.train.reporting.throughput import Throughput
from largebatch.train.tasks import sampler_of
from largebatch.train.trackers.safe import NoLogger, SafeLogger

REFERENCE: Final = "bare"
FORMULAS: Final = {
    "ms": "median over the rounds of milliseconds a step, over all steps of a run",
    "added": "median over the rounds of what it takes more than the bare loop with or without "
    "evaluations, as it has itself",
    "ratio": "median over the rounds of its time by that of the bare loop; then its quartiles",
}
WORKLOADS: Final = (
    (Bytewise(64), 400), (Bytewise(512), 200), (Decoding(batch_size=4, places=64, width=128), 20),
)  # fmt: skip
"""What is trained, and for how many steps a sample."""

GROWTH: Final = 1.03
RATE: Final = 1e-4
OPTIMIZERS: Final[Mapping[str, Callable[[nn.Module], Optimizer]]] = {
    "AdamW": lambda model: AdamW(model.named_parameters(), lr=RATE, fused=True),
    "LAMB": lambda model: LAMB(model.named_parameters(), lr=RATE),
}


def main(arguments: Sequence[str]) -> int:
    """`largebatch bench loop`; 0, or 2 where an option cannot be."""
    parser = argparse.ArgumentParser(prog="largebatch bench loop", description=__doc__)
    add_options(parser, 60.0)
    return run(parser, arguments, measure, show)


def measure(device: torch.device, seconds: float) -> dict[str, Any]:
    """Time every workload with every optimizer, the seconds shared out evenly."""
    tables = []
    share = seconds / (len(WORKLOADS) * len(OPTIMIZERS))
    with harness.progress_bar() as begin:
        for workload, num_steps in WORKLOADS:
            for name, make in OPTIMIZERS.items():
                part = f"{workload.name}, {name}"
                rows = rows_of(workload, make, num_steps, device, share, begin(part, share))
                tables.append({"workload": describe(workload), "optimizer": name, "rows": rows})
    return harness.head_of("loop", device, FORMULAS) | {"tables": tables}


def rows_of(
    workload: Workload, make: Callable[[nn.Module], Optimizer], num_steps: int,
    device: torch.device, seconds: float, note: harness.Note,
) -> dict[str, Any]:  # fmt: skip
    """Time a step of each kind of loop; the seconds are of a whole run, by its steps."""
    sample = partial(step_seconds, workload, make, num_steps, device)
    samplers = {
        "bare": partial(sample, False, False),
        "loop": partial(sample, True, False),
        "bare, evaluated": partial(sample, False, True),
        "loop, evaluated": partial(sample, True, True),
    }
    found = harness.run_rounds(samplers, seconds, note, num_warm_up=1)
    rows = {}
    for name, times in found.items():
        bare = found["bare, evaluated" if "evaluated" in name else "bare"]
        rows[name] = against(times, bare)
        added = sorted(own - other for own, other in zip(times, bare, strict=True))
        rows[name]["added_seconds"] = added[len(added) // 2]
    return rows


def step_seconds(
    workload: Workload, make: Callable[[nn.Module], Optimizer], num_steps: int,
    device: torch.device, in_loop: bool, evaluated: bool,
) -> float:  # fmt: skip
    """Make a run, and return its seconds a step."""
    parts = parts_of(workload, make, device)
    evaluation = None
    if evaluated:
        find = partial(evaluate, parts.task, parts.engine, Ranks())
        evaluation = Evaluation(find, EvaluationGrid(GROWTH))
    call = looped if in_loop else bare
    with call(parts, workload.batch_size, num_steps, evaluation) as steps:
        return timed(steps, device) / num_steps


def parts_of(
    workload: Workload, make: Callable[[nn.Module], Optimizer], device: torch.device
) -> Parts:
    """Make what is trained, always from the same start."""
    torch.manual_seed(0)
    engine = DDP(workload.model(), Ranks(), device)
    return Parts(workload.task(), engine, make(engine.model))


@contextmanager
def looped(
    parts: Parts, batch_size: int, num_steps: int, evaluation: Evaluation | None
) -> Iterator[Callable[[], object]]:
    """The project's loop, with its record in a folder."""
    plan = Plan(
        ramp=ConstantBatch(size=batch_size),
        curve=Constant(),
        budget_samples=num_steps * batch_size,
        base_lr=RATE,
        base_batch=batch_size,
    )
    sampler = sampler_of(parts.task, 0)
    with tempfile.TemporaryDirectory() as name, RunFolder(Path(name, "run"), {}) as folder:
        logger = SafeLogger(NoLogger)
        with Reporter(folder, logger, Throughput(None, 1), 1, 1, lambda line: None) as reporter:
            yield Loop(plan, parts, sampler, Ranks(), evaluation, reporter).run
        folder.close({"status": "exhausted"})


@contextmanager
def bare(
    parts: Parts, batch_size: int, num_steps: int, evaluation: Evaluation | None
) -> Iterator[Callable[[], object]]:
    """A script's loop, which reads the loss after every step."""
    task, model, optimizer = parts.task, parts.engine.model, parts.optimizer
    sampler = sampler_of(task, 0)

    def steps() -> None:
        for step in range(num_steps):
            batch = task.train_batch(sampler.take(step * batch_size, batch_size))
            loss = task.loss(model, batch)
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            assert math.isfinite(loss.item())
            if evaluation is not None and evaluation.grid.is_due(step + 1):
                evaluation.find()
                evaluation.grid.advance(step + 1)

    yield steps


def show(record: dict[str, Any], console: Console) -> None:
    """Print a table a workload and optimizer."""
    harness.show_head(record, console, "one rank")
    for table in record["tables"]:
        workload = table["workload"]
        title = (
            f"{workload['name']}, {workload['num_parameters']:,} parameters, {table['optimizer']}"
        )
        shown = harness.make_table(title, "loop", ("ms", "added", "ratio", "quartiles"))
        for name, row in table["rows"].items():
            low, high = row["ratio_quartiles"]
            shown.add_row(
                name, f"{1e3 * row['seconds']:.3f}", f"{1e3 * row['added_seconds']:+.3f}",
                f"{row['ratio']:.2f}", f"{low:.2f}-{high:.2f}",
            )  # fmt: skip
        console.print(shown)
