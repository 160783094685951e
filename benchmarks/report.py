"""`largebatch bench report`: what reading, fitting and drawing many recorded runs costs.

Made-up runs of `study=bytes`, by default 5,000: every optimizer at nine batch sizes and eight
learning rates, with as many seeds as that takes. Their summaries are as long as those of real runs.
Processor seconds, so that another program on the machine counts little.
"""

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice, product
from pathlib import Path
from typing import Any, Final

from largebatch.benchmarks.harness import check
from largebatch.records.names import METRICS, SUMMARY

OPTIMIZERS: Final = 8
BATCH_SIZES: Final = tuple(2**power for power in range(6, 15))
RATES: Final = range(-4, 4)  # from the best one, in factors of sqrt(2)


def main(arguments: Sequence[str]) -> int:
    """`largebatch bench report`; 0, or 2 where an option cannot be."""
    parser = argparse.ArgumentParser(prog="largebatch bench report", description=__doc__)
    parser.add_argument("--runs", type=int, default=5000, help="recorded ones (default: 5000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args(arguments)
    try:
        check(options.runs >= 1000, "--runs", "1000 or more", options.runs)
        folder = Path() if options.json is None else options.json.parent
        check(folder.is_dir(), "--json", "a file in a folder that exists", options.json)
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    record = {"benchmark": "report", "runs": options.runs} | measure(options.runs)
    print(
        f"{options.runs} runs: {record['read_seconds']:.1f} s of processor to read and to fit, "
        f"{record['seconds']:.1f} s with pictures and page"
    )
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(num_runs: int) -> dict[str, float]:
    """Processor seconds of reading and fitting, and of the whole report."""
    from largebatch.study.report import write_report
    from largebatch.study.section_study import read_study

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_runs(folder / "runs", num_runs)
        begin = time.process_time()
        read_study(folder / "runs")
        read = time.process_time() - begin
        begin = time.process_time()
        write_report(folder / "runs", out=folder)
        return {"read_seconds": read, "seconds": time.process_time() - begin}


def write_runs(folder: Path, num_runs: int) -> None:
    """Write the records of runs that reached their target."""
    shared = _summary()
    chance = random.Random(0)
    # Seed by seed, so that every point has as many as another, or one less.
    runs = islice(
        product(range(num_runs), range(OPTIMIZERS), enumerate(BATCH_SIZES), RATES), num_runs
    )
    for place, (seed, optimizer, (power, batch), rate) in enumerate(runs):
        lr = 0.01 * 2 ** ((power + rate) / 2)
        luck = math.exp(chance.gauss(0.08 * rate**2, 0.06))
        steps = (20 + 30_000 / batch) * (1 + 0.1 * optimizer) * luck
        whole = math.ceil(steps)
        run = folder / f"optimizer-{optimizer}" / f"batch-{batch}" / f"{place}-lr-{lr:.4g}"
        run.mkdir(parents=True)
        (run / METRICS).write_text('{"step": 1}\n', encoding="utf-8")
        changes = {
            "optimizer": f"optimizer-{optimizer}", "batch_size": batch, "seed": seed,
            "lr": lr, "base_lr": lr, "steps": whole, "samples": whole * batch,
            "steps_to_target": whole, "samples_to_target": whole * batch,
            "steps_to_target_interpolated": steps,
        }  # fmt: skip
        (run / SUMMARY).write_text(json.dumps(shared | changes), encoding="utf-8")


def _summary() -> dict[str, Any]:
    """What all runs say of themselves, the whole configuration with it."""
    from hydra import compose, initialize_config_module

    from largebatch.conf.config import typed

    with initialize_config_module("largebatch.conf", version_base="1.3"):
        config = asdict(typed(compose("train", ["study=bytes"])))
    return {
        "status": "reached", "task": "bytes", "model": "byte_mlp", "target_loss": 2.2,
        "eval_loss": 2.19, "loss": 2.1, "seconds": 1.5, "give_up_samples": None,
        "scaling": config["scaling"], "config": config,
        "provenance": {"data_hash": "0f3a" * 16, "versions": {"torch": "2.13"}, "device": "cpu"},
    }  # fmt: skip
