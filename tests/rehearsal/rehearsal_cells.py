"""What is rehearsed: runs as data."""

from collections.abc import Iterable
from typing import Any

from rehearsal_runs import Run

# A transformer of twelve tensors; a step's loss is of 16 sequences of 16 bytes.
TEXT = (
    "task=text", "task.num_bytes=65536", "task.sequence_length=16", "task.num_eval=16",
    "model.dim=32", "model.depth=1", "model.heads=2", "target.loss=null", "batch.size=16",
    "evaluation.growth=1000", "record.layers=true", "record.sites=true",
)  # fmt: skip
# As many as show refreshes, steady steps between them, and a save on the way.
STEPS = 6
PLAIN_STEPS = 5
FEW = (f"budget.samples={16 * STEPS}",)
OPTIMIZERS = ("adamw", "sgd", "lars", "lamb", "muon", "shampoo", "soap", "kfac")
MORE_OPTIMIZERS = ("soap_muon", "mano")
"""Whose steps are rehearsed, on text; what runs do besides is alike for all."""
SECOND_ORDER = ("shampoo", "soap", "kfac", "soap_muon")
CPU = ("engine.device=cpu",)

# Everything that watches a step; nothing of it may make the host wait.
GUARDED = ("clip_norm=1", "guard.non_finite=skip", "guard.grad_norm_multiple=20")
WATCHED = (*GUARDED, "noise.small=micro_batch", "engine.micro_batch_size=8")
SAVED = (
    f"checkpoint.every_samples={16 * STEPS // 2}",
    "checkpoint.required=true",
    "checkpoint.keep=9",
)
SPOILED = (
    "task=digits", "task._target_=guarded_tasks.Spoiled", "+task.position=200", "batch.size=64",
    "target.loss=null", "budget.samples=512", "guard.non_finite=skip",
)  # fmt: skip
FINDER_BATCH = 64
FINDER = (
    "mode=lr_find", "mode.points=9", "mode.low=1e-5", "mode.high=1e3", "mode.blow_up=1.5",
    f"batch.size={FINDER_BATCH}", "engine.micro_batch_size=auto",
)  # fmt: skip
# Half a batch fits. K-FAC takes more at once than passes of one and two samples foretell.
MEMORY = dict.fromkeys(OPTIMIZERS, 7 << 19) | {"kfac": 3 << 20}

# With four tensors, the same of the MLP over bytes.
BYTES = (
    "task=bytes", "task.num_bytes=65536", "task.num_eval=64", "target.loss=null", "batch.size=16",
    "evaluation.growth=1000", "record.layers=true",
)  # fmt: skip
TASKS = {"text": TEXT, "bytes": BYTES}

# Options with which a few steps show what they are to show.
OPTIONS = {
    # Norms of a device are summed in FP64: what that rounds otherwise is not to be divided by ~0.
    "lamb": ("optim.eps=1e-3",),
    # Of so many blocks, one would have its turn in every step.
    "shampoo": ("optim.precondition_interval=100",),
    "soap": ("optim.precondition_interval=100",),
    "soap_muon": ("optim.precondition_interval=100",),
}
# An interval of one step, and everything that is decomposed comes a step late.
BESIDE = {
    "shampoo": ("optim.precondition_interval=1", "optim.refresh=beside"),
    "kfac": ("optim.inverse_interval=1", "optim.refresh=beside"),
}
# Whose state has the second moment of every parameter.
WITH_MOMENTS = ("adamw", "lamb")


def _run(name: str, task: str, optimizer: str, *words: str, **options: Any) -> Run:
    chosen = (f"optim={optimizer}", *OPTIONS.get(optimizer, ()))
    return Run(name, (*TASKS[task], *chosen, *words), **options)


def plain() -> list[Run]:
    """Each optimizer on each task, on the device."""
    few = f"budget.samples={16 * PLAIN_STEPS}"
    runs = [_run(f"{task} {n}", task, n, few) for task in TASKS for n in OPTIMIZERS]
    runs += [_run(f"text {n}", "text", n, few) for n in MORE_OPTIMIZERS]
    return [*runs, *(_run(f"beside {n}", "text", n, few, *BESIDE[n]) for n in BESIDE)]


def on_the_cpu(runs: Iterable[Run]) -> list[Run]:
    """The same, there."""
    return [Run(f"{run.name} cpu", (*run.words, *CPU)) for run in runs]


def featured() -> list[Run]:
    """The features of a run, several in each, with each optimizer."""
    runs = []
    for name in OPTIMIZERS:
        metric = f"noise.preconditioned={name in WITH_MOMENTS}"
        fp16 = (*FEW, *WATCHED, metric, "precision=fp16", *SAVED, "checkpoint.mode=async")
        runs += [
            _run(f"{name} fp16", "text", name, *fp16, "resume=auto"),
            _run(f"{name} resumed", "text", name, *fp16, "resume=auto", folder=f"{name} fp16"),
            _run(f"{name} bf16", "bytes", name, *FEW, *WATCHED, "precision=bf16", *SAVED),
            _run(f"{name} found", "text", name, *FINDER, limit=MEMORY[name]),
        ]
    spoiled = {
        "skip": (*SPOILED, "optim=soap"),
        "rollback": (*SPOILED, "optim=lamb", "guard.non_finite=rollback",
                     "checkpoint.every_samples=128", "checkpoint.keep=9"),
    }  # fmt: skip
    return [*runs, *(Run(name, words) for name, words in spoiled.items())]


def on_two_ranks() -> list[Run]:
    """DDP and FSDP2 on the device, saved in step or beside training."""
    runs = []
    for engine, name, mode in (
        ("ddp", "lamb", "sync"),
        ("ddp", "kfac", "async"),
        ("fsdp", "lamb", "sync"),
        ("fsdp", "shampoo", "async"),
        ("fsdp", "kfac", "async"),
    ):
        saved = (*SAVED, f"checkpoint.mode={mode}", "checkpoint.every_samples=32", "resume=auto")
        words = ("budget.samples=64", f"engine={engine}", "noise.small=rank", "clip_norm=1", *saved)
        runs.append(_run(f"{engine} {name}", "text", name, *words))
    return runs
