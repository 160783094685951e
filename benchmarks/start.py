"""`largebatch bench start`: how long commands take from their start, beside `import torch`.

Each is a process of its own: a run of one step with LAMB and one with torch's AdamW, a report of
160 recorded runs, a plan. Rounds alternate. Python's bytecode is there after the warm-up, in a
folder of the benchmark's own.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

from largebatch.benchmarks import harness
from largebatch.benchmarks.harness import add_options, against, run
from largebatch.benchmarks.report import write_runs

REFERENCE: Final = "import torch"
NUM_RUNS: Final = 160
FORMULAS: Final = {
    "seconds": "median over the rounds of wall-clock time, from start to end of the process",
    "processor": "median of its processor seconds",
    "ratio": f"median over the rounds of seconds by those of {REFERENCE}; then its quartiles",
    "modules": "imported at its end",
    "files": "opened by Python until then, shared libraries left out: on each rank",
}
_RUN: Final = ("train", "task=bytes", "batch.size=64", "budget.samples=64", "target.loss=null")

COUNTED: Final = """
import atexit, os, sys
opened = 0
def count(event, arguments):
    global opened
    opened += event == "open"
def tell():
    counts = len(sys.modules), opened
    with open(os.environ["COUNTED"], "w") as told:
        print(*counts, file=told)
sys.addaudithook(count)
atexit.register(tell)
if sys.argv[1:]:
    from largebatch.cli import main
    sys.exit(main(sys.argv[1:]))
import torch
"""


def main(arguments: Sequence[str]) -> int:
    """`largebatch bench start`; 0, or 2 where an option cannot be."""
    parser = argparse.ArgumentParser(prog="largebatch bench start", description=__doc__)
    add_options(parser, 60.0)
    return run(parser, arguments, measure, show)


def measure(device: torch.device, seconds: float) -> dict[str, Any]:
    """Time all commands, round after round."""
    with tempfile.TemporaryDirectory() as name, harness.progress_bar() as begin:
        folder = Path(name)
        write_runs(folder / "runs", NUM_RUNS)
        words = {
            REFERENCE: [],
            "train, LAMB": [*_RUN, "optim=lamb"],
            "train, AdamW": [*_RUN, "optim=adamw"],
            f"report, {NUM_RUNS} runs": ["report", "runs"],
            "plan": ["plan", "--no-picture", *_RUN[1:]],
        }
        samplers = {each: partial(once, words[each], folder) for each in words}
        found = harness.run_rounds(samplers, seconds, begin("start", seconds), num_warm_up=1)
    reference = [wall for wall, *_ in found[REFERENCE]]
    rows = {
        each: against([wall for wall, *_ in samples], reference)
        | {
            "processor_seconds": statistics.median(sample[1] for sample in samples),
            "modules": samples[-1][2],
            "files": samples[-1][3],
        }
        for each, samples in found.items()
    }
    return harness.head_of("start", device, FORMULAS) | {"rows": rows}


def once(words: Sequence[str], folder: Path) -> tuple[float, float, int, int]:
    """Run a command; return its seconds, processor seconds, and its modules and files.

    Raises:
        RuntimeError: it fails.
    """
    with tempfile.TemporaryDirectory(dir=folder) as own:
        counted = Path(own, "counted")
        command = [sys.executable, "-c", COUNTED, *words]
        if words[:1] == ["train"]:
            command.append(f"hydra.run.dir={own}/run")
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.perf_counter()
        done = subprocess.run(
            command, cwd=folder, env={**environment(folder), "COUNTED": str(counted)},
            capture_output=True, text=True,
        )  # fmt: skip
        wall = time.perf_counter() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr}")
        modules, files = map(int, counted.read_text().split())
    worked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, worked, modules, files


def environment(folder: Path) -> Mapping[str, str]:
    """This process's, with bytecode kept in `folder`."""
    shared = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return shared | {"PYTHONPYCACHEPREFIX": str(folder / "bytecode")}


def show(record: dict[str, Any], console: Console) -> None:
    """Print the table."""
    harness.show_head(record, console, "each command a process of its own")
    heads = ("seconds", "processor", "ratio", "quartiles", "modules", "files")
    table = harness.make_table(f"beside {REFERENCE}", "command", heads)
    for name, row in record["rows"].items():
        low, high = row["ratio_quartiles"]
        table.add_row(
            name, f"{row['seconds']:.2f}", f"{row['processor_seconds']:.2f}",
            f"{row['ratio']:.2f}", f"{low:.2f}-{high:.2f}",
            str(row["modules"]), str(row["files"]),
        )  # fmt: skip
    console.print(table)
