"""The options that benchmarks share, and the way from them to a table and a record."""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

Record = dict[str, Any]


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
    show(record, Console())
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
