"""Studies run as a launcher runs them, without training: every folder is written in earnest."""

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from largebatch.conf.sweep_config import StudyConfig
from largebatch.records.record import RunFolder
from largebatch.study.protocol.conduct import More
from largebatch.study.protocol.protocol import Protocol
from largebatch.study.protocol.search import Result

Simulate = Callable[[str, int, float, int, int], Result]

ARGUMENTS = ["study=bytes", "target.loss=2.2"]


def make_protocol(**study: Any) -> Protocol:
    config = {
        "optimizers": ["adamw", "hopeless"],
        "batch_sizes": [32, 64, 128],
        "start_batch": 64,
        "rules": ["linear"],
        "rule_batches": [128],
    }
    optimizers = {"adamw": {"lr": 0.016}, "sgd": {"lr": 0.45}, "hopeless": {"lr": 0.1}}
    return Protocol(StudyConfig(**config | study), optimizers, budget_samples=20_000)


class Killed(BaseException):
    """Stands for a SIGKILL, or a power cut."""


class Workers:
    """Run jobs as Hydra's launcher does, without training; every folder is written as in earnest.

    Attributes:
        dies_at: the run, counted from 0, in the middle of which everything ends.
        interrupts: whether that run is still told, and closes its record as interrupted.
    """

    def __init__(
        self,
        folder: Path,
        simulate: Simulate,
        dies_at: int | None = None,
        interrupts: bool = False,
    ) -> None:
        self.folder, self.simulate = folder, simulate
        self.dies_at, self.interrupts = dies_at, interrupts
        self.launched: list[str] = []
        self.watch: Callable[[], None] = lambda: None

    def __call__(self, jobs: Sequence[Sequence[str]], more: More = lambda place: []) -> None:
        waiting, num_jobs = dict(enumerate(jobs)), len(jobs)
        while waiting:
            # Which of several runs ends first is chance.
            place = random.Random(len(self.launched)).choice(list(waiting))
            overrides = waiting.pop(place)
            assert list(overrides[: len(ARGUMENTS)]) == ARGUMENTS
            self._run(dict(override.split("=", 1) for override in overrides[len(ARGUMENTS) :]))
            self.watch()
            new = more(place)
            waiting |= dict(enumerate(new, num_jobs))
            num_jobs += len(new)

    def _run(self, job: dict[str, str]) -> None:
        name = job["hydra.sweep.subdir"]
        self.launched.append(name)
        optimizer, batch_size, lr = job["optim"], int(job["batch.size"]), float(job["optim.lr"])
        seed, give_up_samples = int(job["seed"]), int(job["target.give_up_samples"])
        base_batch = int(job.get("scaling.base_batch", batch_size))
        peak_lr = lr * batch_size / base_batch
        steps, loss = self.simulate(
            optimizer, batch_size, peak_lr, seed, give_up_samples // batch_size
        )
        summary = {
            "status": "diverged" if loss == math.inf else "reached" if steps else "exhausted",
            "steps_to_target": steps and math.ceil(steps),
            "steps_to_target_interpolated": steps,
            "eval_loss": loss,
            "optimizer": optimizer,
            "batch_size": batch_size,
            "lr": peak_lr,
            "base_lr": lr,
            "seed": seed,
            "give_up_samples": give_up_samples,
        }
        with RunFolder(self.folder / name, {"config.yaml": "seed: 0\n"}) as record:
            record.write({"step": 1})
            if len(self.launched) - 1 == self.dies_at:
                if self.interrupts:
                    record.close(summary | {"status": "interrupted", "steps_to_target": None})
                raise Killed
            record.close(summary)


def records(folder: Path) -> dict[str, Any]:
    """Every summary below the folder."""
    return {
        str(path.parent.relative_to(folder)): json.loads(path.read_text())
        for path in sorted(folder.rglob("summary.json"))
    }
