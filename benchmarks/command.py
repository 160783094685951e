"""`largebatch bench NAME …`: a table from benchmark to the module that runs it."""

import importlib
import sys
from difflib import get_close_matches
from typing import Final

from largebatch.common.text import missing

BENCHMARKS: Final = {
    "optim": ("optim", "time of an optimizer step, beside peers"),
    "noise": ("noise.command", "what measuring the noise scale adds to a step"),
    "collectives": ("collectives.command", "all-reduce and its like: values, alpha, beta, advice"),
    "checkpoint": ("checkpoint", "saving and loading, beside the disk and torch.save"),
    "second_order": ("second_order.command", "cost of Shampoo, SOAP and K-FAC beside AdamW"),
    "gauss_newton": ("gauss_newton.command", "fewest steps that a layer-wise method could need"),
    "scale": ("scale.command", "what one rank of 38,400 sends, holds and works out"),
    "time": ("time_to_target.command", "time to target and node-hours of a study on N tiles"),
    "start": ("start", "commands from their start, beside import torch"),
    "loop": ("loop", "what the loop adds to a step, beside a bare one"),
    "study": ("study", "a study beside its training steps in a bare loop"),
    "transfer": ("transfer", "the best rate of a narrow decoder beside that of a wide one"),
    "report": ("report", "reading, fitting and drawing thousands of recorded runs"),
    "statistics": ("statistics.command", "how often a study's intervals cover"),
}
"""By name: the module here with `main(arguments) -> exit code`, and a summary."""


def main(arguments: list[str]) -> int:
    """Run one benchmark; returns its exit code, 2 where there is none of that name."""
    if arguments and arguments[0] in BENCHMARKS:
        return run(arguments[0], arguments[1:])
    wanted = arguments[:1] in (["-h"], ["--help"])
    if arguments and not wanted:
        near = get_close_matches(arguments[0], BENCHMARKS, n=1)
        hint = f": did you mean {near[0]}?" if near else ""
        print(f"largebatch bench: no benchmark {arguments[0]!r}{hint}", file=sys.stderr)
        if near:
            return 2
    rows = "\n".join(f"  {name:12} {summary}" for name, (_, summary) in BENCHMARKS.items())
    print(
        f"usage: largebatch bench NAME …\n\n{rows}\n\nlargebatch bench NAME --help says more",
        file=sys.stdout if wanted else sys.stderr,
    )
    return 0 if wanted else 2


def run(name: str, arguments: list[str]) -> int:
    try:
        benchmark = importlib.import_module(f"largebatch.benchmarks.{BENCHMARKS[name][0]}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("largebatch"):
            raise
        needs = f"bench {name} needs {missing(error)}: pip install 'largebatch[train]'"
        print(f"largebatch: {needs}", file=sys.stderr)
        return 2
    code: int = benchmark.main(arguments)
    return code
