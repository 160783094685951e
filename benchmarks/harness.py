"""What benchmarks share: options, interleaved rounds, ranks of their own, tables, records.

Every row of a table is sampled once a round, A B C, A B C, …, so that what slows the machine slows
them all. A sample is timed from an idle device to an idle device.
"""

import argparse
import gc
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from torch.utils._python_dispatch import TorchDispatchMode

from largebatch.common.console import output_console
from largebatch.common.files import read_json
from largebatch.common.progress import BAR
from largebatch.distributed.ranks import Ranks
from largebatch.train.reporting.provenance import provenance

NUM_WARM_UP: Final = 2  # the first step makes the state
FEWEST_ROUNDS: Final = 3
MEMORY_BYTES: Final = 2**28
"""Moved by one sample of the memory's speed, far more than a cache holds."""

Result = TypeVar("Result")
Record = dict[str, Any]

Note = Callable[[float, str], None]
"""Takes the seconds spent so far, and what runs."""


def run(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str],
    measure: Callable[[torch.device, float], Record],
    show: Callable[[Record, Console], None],
) -> int:
    """Measure on the device, for the seconds asked for; print the tables, write the record.

    Args:
        parser: with `add_options`.

    Returns:
        The exit code: 0, or 2 where an option cannot be.
    """
    options = parser.parse_args(arguments)
    threads: int | None = options.threads
    try:
        device = device_named(options.device)
        check(threads is None or threads >= 1, "--threads", "1 or more", threads)
        check(0 < options.seconds < math.inf, "--seconds", "> 0", options.seconds)
        folder = Path() if options.json is None else options.json.parent
        check(folder.is_dir(), "--json", "a file in a folder that exists", options.json)
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    if threads is not None:
        torch.set_num_threads(threads)
    record = measure(device, options.seconds)
    show(record, output_console())
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def add_options(
    parser: argparse.ArgumentParser, seconds: float, of_threads: str = "", of_seconds: str = ""
) -> None:
    """--device, --threads, --seconds and --json; the last two words are added to their help."""
    parser.add_argument("--device", help="cpu, or the accelerator's type (default: it, if any)")
    parser.add_argument(
        "--threads", type=int, help=f"of torch on the CPU{of_threads} (default: torch's own)"
    )
    parser.add_argument(
        "--seconds", type=float, default=seconds,
        help=f"to spend (default: {seconds:g}){of_seconds}",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")


def device_named(name: str | None) -> torch.device:
    """Raises ValueError for a device that this torch does not have."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    here = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    check(name is None or name in here, "--device", f"one of {', '.join(here)} here", name)
    return torch.device(name or here[-1])


def check(holds: bool, option: str, accepted: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{option} must be {accepted}, got {value}")


def run_rounds(
    samplers: Mapping[str, Callable[[], Result]],
    seconds: float,
    note: Note,
    *,
    num_warm_up: int = NUM_WARM_UP,
    interval: int = 1,
    warm_up: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, list[Result]]:
    """Call all samplers in turn, round after round; return what each has returned in each round.

    As many intervals of rounds as fit into `seconds`, warm-up included, but never less than
    FEWEST_ROUNDS rounds. On ranks, rank 0 decides for all.

    Args:
        warm_up: what is called before the first round; None: the samplers, and nothing is kept.
    """
    began = time.perf_counter()
    for _ in range(num_warm_up):
        for name, call in (warm_up or samplers).items():
            note(time.perf_counter() - began, f"warm-up, {name}")
            call()
    found: dict[str, list[Result]] = {name: [] for name in samplers}
    num_rounds, length = 0, 0.0
    while num_rounds < FEWEST_ROUNDS or as_on_rank_0(
        time.perf_counter() - began + length < seconds
    ):
        interval_began = time.perf_counter()
        for _ in range(interval):
            num_rounds += 1
            for name, sample in samplers.items():
                note(time.perf_counter() - began, f"round {num_rounds}, {name}")
                found[name].append(sample())
        length = time.perf_counter() - interval_began
    return found


def against(times: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """Times of one row by those of another in the same rounds, for a record."""
    ratios = [a / b for a, b in zip(times, reference, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "seconds": statistics.median(times), "ratio": middle, "ratio_quartiles": (low, high),
    }  # fmt: skip


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of `work`, what it left on the device's queue included."""
    wait_for(device)
    began = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - began


def timed_on_ranks(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds of `work`, begun by all ranks together, and this process's processor seconds."""
    wait_for_ranks()
    worked = time.process_time()
    seconds = timed(work, device)
    return seconds, time.process_time() - worked


def wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def wait_for_ranks() -> None:
    if dist.is_initialized():
        dist.barrier()


def as_on_rank_0(here: bool) -> bool:
    """Rank 0's answer, on all ranks."""
    answer = torch.tensor(here)
    if dist.is_initialized():
        dist.broadcast(answer, 0)
    return bool(answer)


def in_processes(num: int, work: Callable[..., Any], *words: Any) -> list[Any]:
    """Call `work(number, *words)`, which can be pickled, in processes of its own; return what each
    found, as JSON.
    """
    # A forked process need not import torch again; torch ends the others where one of them fails.
    multiprocessing.set_forkserver_preload([__name__, work.__module__])
    with tempfile.TemporaryDirectory() as folder:
        start_processes(  # type: ignore[no-untyped-call] # torch's own is not annotated
            _in_process, args=(work, words, folder), nprocs=num, start_method="forkserver"
        )
        return [read_json(Path(folder, f"{number}.json")) for number in range(num)]


def _in_process(number: int, work: Callable[..., Any], words: Sequence[Any], folder: str) -> None:
    found = json.dumps(work(number, *words))
    Path(folder, f"{number}.json").write_text(found, encoding="utf-8")


def on_ranks(
    num_ranks: int, num_threads: int, measure: Callable[..., Any], *words: Any
) -> list[Any]:
    """`in_processes` with gloo ranks of so many threads each: `measure(ranks, *words)`."""
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        return in_processes(num_ranks, _as_rank, num_ranks, num_threads, store, measure, words)


def _as_rank(
    rank: int,
    num_ranks: int,
    num_threads: int,
    store: str,
    measure: Callable[..., Any],
    words: Sequence[Any],
) -> Any:
    torch.set_num_threads(num_threads)
    # FSDP2 advises on in-place operations after a linear layer; no model here has one.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=num_ranks)
    try:
        ranks = Ranks(rank=rank, size=num_ranks, local_rank=rank, local_size=num_ranks)
        found = measure(ranks, *words)
        gc.collect()  # models and their hooks hold one another, and the group that is to go
        dist.barrier()
        return found
    finally:
        dist.destroy_process_group()


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's own is not annotated
    """Notes the collectives that this process begins."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.collectives: list[tuple[str, int, int]] = []
        """Of each its name, the bytes that this rank puts in, and the ranks that it sends to where
        that is its own choice, else 0."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            names = (argument.name for argument in func._schema.arguments)
            named = dict(zip(names, args, strict=False))
            # Those that reduce or broadcast in place have one name, others another for each side.
            inputs = ("tensors", "input", "input_tensor", "input_tensors")
            sent = sum(bytes_in(named.get(name)) for name in inputs)
            partners = sum(1 for split in named.get("input_split_sizes", ()) if split)
            name = func._schema.name.removeprefix("c10d::").rstrip("_")
            self.collectives.append((name, sent, partners))
        return func(*args, **(kwargs or {}))


def bytes_in(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(bytes_in, value)) if isinstance(value, list | tuple) else 0


@contextmanager
def progress_bar() -> Iterator[Callable[[str, float | None], Note]]:
    """A bar on stderr, where that is a terminal. `begin(part, seconds)` starts a part anew."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(BAR), console=console, transient=True,
        disable=not console.is_terminal,
    )  # fmt: skip

    def begin(part: str, seconds: float | None) -> Note:
        for task in bar.task_ids:
            bar.remove_task(task)
        task = bar.add_task(part, total=seconds)
        return lambda elapsed, what: bar.update(
            task, completed=elapsed, description=f"{part}: {what}"
        )

    with bar:
        yield begin


def head_of(benchmark: str, device: torch.device, formulas: Mapping[str, str]) -> Record:
    """The part of a record that says what was measured with, and how."""
    return {
        "benchmark": benchmark,
        "provenance": provenance(Ranks(), device),
        "load_average": os.getloadavg()[0],
        "num_cores": os.cpu_count(),
        "num_warm_up": NUM_WARM_UP,
        "formulas": formulas,
    }


def show_head(
    record: Record, console: Console, how: str, versions: dict[str, Any] | None = None
) -> None:
    """Print the part of a record that `head_of` makes.

    Args:
        how: what is measured, in a few words.
        versions: of further libraries; None: not installed.
    """
    made = record["provenance"]
    known = made["versions"] | (versions or {})
    say(
        console,
        ", ".join(f"{name} {number}" for name, number in known.items() if number),
        f"{made['device']}, {record['num_cores']} cores, {made['num_threads']} threads; {how}; "
        f"load average {record['load_average']:.1f} at the start, best below 0.5",
        *(f"{name}: {formula}" for name, formula in record["formulas"].items()),
    )


def say(console: Console, *lines: str) -> None:
    for text in lines:
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def make_table(title: str, name: str, heads: Sequence[str]) -> Table:
    """An empty table: a column of names, and columns of numbers."""
    shown = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    shown.add_column(name, no_wrap=True)
    for head in heads:
        shown.add_column(head, justify="right", no_wrap=True)
    return shown


def plural(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count > 1)}"
