"""What is rehearsed: runs as data."""

from rehearsal_runs import Run

# A transformer of twelve tensors; a step's loss is of 16 sequences of 16 bytes.
TEXT = (
    "task=text", "task.num_bytes=65536", "task.sequence_length=16", "task.num_eval=16",
    "model.dim=32", "model.depth=1", "model.heads=2", "target.loss=null", "batch.size=16",
    "evaluation.growth=1000", "record.layers=true",
)  # fmt: skip
STEPS = 8
FEW = (f"budget.samples={16 * STEPS}",)
OPTIMIZERS = ("adamw", "sgd", "lars", "lamb", "muon", "shampoo", "soap", "kfac")
SECOND_ORDER = ("shampoo", "soap", "kfac")
CPU = ("engine.device=cpu",)

# Everything that watches a step; nothing of it may make the host wait.
GUARDED = ("clip_norm=1", "guard.non_finite=skip", "guard.grad_norm_multiple=20")
WATCHED = (*GUARDED, "noise.small=micro_batch", "engine.micro_batch_size=8")
SAVED = ("checkpoint.every_samples=64", "checkpoint.required=true", "checkpoint.keep=9")
SPOILED = (
    "task=digits", "task._target_=guarded_tasks.Spoiled", "+task.position=200", "batch.size=64",
    "target.loss=null", "budget.samples=512", "guard.non_finite=skip",
)  # fmt: skip
MEMORY = 5 << 20


# Few matrices, so that not every one of the first steps has a refresh.
BYTES = (
    "task=bytes", "task.num_bytes=65536", "task.num_eval=64", "target.loss=null", "batch.size=16",
    "evaluation.growth=1000", "record.layers=true",
)  # fmt: skip


def plain() -> list[Run]:
    """Each optimizer on the device; LARS and LAMB on the CPU too."""
    tasks = {"shampoo": BYTES, "soap": BYTES}
    runs = [Run(n, (*tasks.get(n, TEXT), *FEW, f"optim={n}")) for n in OPTIMIZERS]
    return runs + [Run(f"{n} cpu", (*TEXT, *FEW, f"optim={n}", *CPU)) for n in ("lars", "lamb")]


def featured() -> list[Run]:
    """The features of a run, several in each."""
    watched = (*TEXT, *FEW, *WATCHED)
    resumed = ("optim=shampoo", "precision=fp16", *SAVED, "resume=auto")
    fp16 = ("optim=lamb", "precision=fp16", "noise.preconditioned=true", *SAVED)
    auto = ("optim=lamb", "batch.size=64", "budget.samples=192", "engine.micro_batch_size=auto")
    finder = ("task=bytes", "mode=lr_find", "mode.points=12", "optim=lamb", "task.num_bytes=65536")
    return [
        Run("lamb fp16", (*watched, *fp16, "checkpoint.mode=async")),
        Run("kfac bf16", (*TEXT, *FEW, *GUARDED, "optim=kfac", "precision=bf16", *SAVED)),
        Run("whole", (*watched, *resumed, "checkpoint.mode=async")),
        Run("resumed", (*watched, *resumed, "checkpoint.mode=async"), folder="whole"),
        Run("auto", (*TEXT, *auto), limit=MEMORY),
        Run("lr_find", (*finder, "batch.size=256")),
        Run("bytes", ("task=bytes", "optim=lars", "task.num_bytes=65536", "batch.size=256",
                      "budget.samples=4096", "precision=bf16", "target.loss=null")),
        Run("skip", (*SPOILED, "optim=soap")),
        Run("rollback", (*SPOILED, "optim=lamb", "guard.non_finite=rollback",
                         "checkpoint.every_samples=128", "checkpoint.keep=9")),
    ]  # fmt: skip


def on_two_ranks() -> list[Run]:
    """DDP and FSDP2 on the device."""
    runs = []
    for engine, optimizer in (("ddp", "lamb"), ("fsdp", "lamb"), ("fsdp", "shampoo")):
        words = (*TEXT, "budget.samples=32", f"engine={engine}", f"optim={optimizer}")
        runs.append(Run(f"{engine} {optimizer}", (*words, "noise.small=rank", "clip_norm=1")))
    return runs
