"""Folders of runs as the trainer writes them, for the tests of what reads them."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BATCHES = [2**power for power in range(6, 15)]
STEPS = {
    "adamw": [520, 250, 146, 83, 49, 37, 30, 28, 26],
    "lamb": [560, 260, 146, 90, 64, 42, 30, 27, 25],
    "lars": [900, 420, 218, 130, 79, 55, 43, 40, 38],
    "sgd": [675, 350, 185, 105, 66, 55, 50, 48, 47],
}
LUCK = (1.0, 1.06, 0.95, 1.02, 0.97)
"""What the seeds 2 to 6 make of a step count."""


def record(folder: Path, steps: float | None, /, **changes: Any) -> Path:
    """Write one run folder; `steps` None is a run that missed, a fraction is interpolated."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    batch = changes.get("batch_size", 64)
    whole = None if steps is None else math.ceil(steps)
    made = whole or 1000
    summary: dict[str, Any] = {
        "status": "exhausted" if steps is None else "reached",
        "optimizer": "adamw",
        "batch_size": batch,
        "seed": 0,
        "lr": 0.01,
        "base_lr": 0.01,
        "scaling": {"rule": "none", "base_batch": 64},
        "target_loss": 2.2,
        "steps": made,
        "samples": made * batch,
        "steps_to_target": whole,
        "samples_to_target": whole and whole * batch,
        "steps_to_target_interpolated": steps,
        "eval_loss": 2.19,
        "loss": 2.1,
        "seconds": 1.5,
        "task": "bytes",
        "provenance": {
            "data_hash": "0f3a" * 16,
            "data": "a text",
            "versions": {"python": "3.12", "torch": "2.13"},
            "device": "cpu",
            "world_size": 1,
        },
        "give_up_samples": None,
        "config": {"optim": {"betas": [0.9, 0.99], "weight_decay": 0.0}, "precision": "fp32"},
        "some_later_key": [1, 2],
    }
    (folder / "summary.json").write_text(json.dumps(summary | changes))
    return folder


def record_curves(
    root: Path, optimizers: Mapping[str, Sequence[float]], seeds: Sequence[int] = (0,)
) -> None:
    """Three learning rates a point, the middle one best and growing as the square root."""
    for name, curve in optimizers.items():
        for index, (batch, steps) in enumerate(zip(BATCHES, curve, strict=True)):
            for trial, penalty in ((-1, 1.3), (0, 1.0), (1, 1.2)):
                lr = 0.01 * 2 ** ((index + trial) / 2)
                for place, seed in enumerate(seeds):
                    folder = root / name / f"{batch}" / f"{trial}-{seed}"
                    luck = LUCK[place % len(LUCK)] ** (1 + 0.1 * ((index + len(name)) % 3))
                    record(
                        folder, steps * penalty * luck, optimizer=name, batch_size=batch, lr=lr,
                        seed=seed,
                    )  # fmt: skip


def record_study(
    root: Path, optimizers: Mapping[str, Sequence[float]], seeds: Sequence[int] = (2, 3, 4, 5, 6)
) -> None:
    """A study whose seeds have roles: 0 and 1 chose the middle rate, `seeds` report it."""
    points = []
    for name, curve in optimizers.items():
        for index, (batch, steps) in enumerate(zip(BATCHES, curve, strict=True)):
            rates = [float(f"{0.01 * 2 ** ((index + trial) / 2):.6g}") for trial in (-1, 0, 1)]

            def run(
                at: int, seed: int, taken: float | None, name: str = name, batch: int = batch,
                rates: Sequence[float] = rates, **changes: Any,
            ) -> None:  # fmt: skip
                folder = root / name / f"batch-{batch}" / f"lr-{rates[at]:.4g}" / f"seed-{seed}"
                common = {"optimizer": name, "batch_size": batch, "lr": rates[at], "seed": seed}
                record(folder, taken, **common, **changes)

            run(0, 0, steps * 1.08)
            run(1, 0, steps)
            limit = int(steps * 1.15)
            run(2, 0, None, steps=limit, samples=limit * batch, give_up_samples=limit * batch)
            run(1, 1, steps * 1.01)
            for place, seed in enumerate(seeds):
                run(1, seed, steps * LUCK[place] ** (1 + 0.1 * ((index + len(name)) % 3)))
            points.append(
                {
                    "optimizer": name, "batch_size": batch, "chosen": {"lr": rates[1]},
                    "dropped": [], "open_below": False, "open_above": False,
                    "trials": 4 + len(seeds),
                }
            )  # fmt: skip
    decisions = {
        "select_seeds": [0, 1],
        "report_seeds": list(seeds),
        "tuned": {name: [] for name in optimizers},
        "points": points,
        "same_rules": [],
    }
    known = {"study": {"most_trials": 64}, "decisions": decisions}
    (root / "study.json").write_text(json.dumps(known))
