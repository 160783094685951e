"""What is rehearsed, on a real accelerator: `make test-gpu`.

Each run is made on the device and, in FP32, on the CPU; a table says how far apart they end. It is
no part of `make test`, and exits 1 without an accelerator or where a run fails.
"""

import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import rehearsal_cells as cells
import torch
from rehearsal_runs import Outcome, Run, trained

NONE = (
    "make test-gpu: torch finds no accelerator here (torch.accelerator.is_available() is False), "
    "so nothing has run: it needs a device and a build of torch for it."
)
# Of the loss, relative to the CPU's in FP32: an order of sums that second order makes much of.
NEAR, NEAR_IN_16_BITS = 0.02, 0.1


@dataclass(frozen=True)
class Cell:
    name: str
    optimizer: str
    words: tuple[str, ...] = ()
    near: float = NEAR


CELLS = (
    *(Cell(name, name) for name in cells.OPTIMIZERS),
    *(
        Cell(f"{name} bf16", name, ("precision=bf16",), NEAR_IN_16_BITS)
        for name in cells.OPTIMIZERS
    ),
    Cell("lamb fp16", "lamb", ("precision=fp16", *cells.WATCHED), NEAR_IN_16_BITS),
    Cell("shampoo fp16", "shampoo", ("precision=fp16", *cells.WATCHED), NEAR_IN_16_BITS),
    Cell("lamb compiled", "lamb", ("engine.compile=true",)),
    Cell("lamb compiled bf16", "lamb", ("engine.compile=true", "precision=bf16"), NEAR_IN_16_BITS),
    Cell("lamb fsdp", "lamb", ("engine=fsdp",)),
    Cell("shampoo fsdp bf16", "shampoo", ("engine=fsdp", "precision=bf16"), NEAR_IN_16_BITS),
    Cell("kfac saved", "kfac", (*cells.SAVED, "checkpoint.mode=async")),
    Cell("lamb auto", "lamb", ("engine.micro_batch_size=auto",)),
)


def main() -> int:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        print(NONE, file=sys.stderr)
        return 1
    name = torch.get_device_module(accelerator).get_device_name(0)
    print(
        f"{name}, torch {torch.__version__}, {torch.accelerator.device_count()} device(s), one rank"
    )
    print(f"{'':22} {'loss':>9} {'CPU':>9} {'weights':>9} {'samples/s':>10} {'MFU':>6}")
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        expected = {o: _run(f"{o} cpu", o, cells.CPU, Path(folder)) for o in cells.OPTIMIZERS}
        for cell in CELLS:
            found = _run(cell.name, cell.optimizer, cell.words, Path(folder))
            print(_row(cell, found, expected[cell.optimizer]), flush=True)
            failed += not _holds(cell, found, expected[cell.optimizer])
    print(f"{len(CELLS) - failed} of {len(CELLS)} runs hold")
    return 1 if failed else 0


def _run(name: str, optimizer: str, words: tuple[str, ...], folder: Path) -> Outcome:
    said = StringIO()
    run = Run(name, (*cells.TEXT, *cells.FEW, f"optim={optimizer}", *words))
    with redirect_stdout(said), redirect_stderr(said):
        found = trained(run, folder)
    if found.get("code") != 0:
        print(found.get("error", said.getvalue())[-3000:], file=sys.stderr)
    return found


def _holds(cell: Cell, found: Outcome, expected: Outcome) -> bool:
    if found.get("code") != 0 or expected.get("code") != 0:
        return False
    loss, on_cpu = (each["lines"][-1]["loss"] for each in (found, expected))
    return bool(abs(loss - on_cpu) <= cell.near * abs(on_cpu))


def _row(cell: Cell, found: Outcome, expected: Outcome) -> str:
    if found.get("code") != 0 or expected.get("code") != 0:
        return f"{cell.name:22} failed"
    pairs = zip(found["weights"], expected["weights"], strict=True)
    apart = max(float((a - b).abs().max()) for a, b in pairs)
    rates = found["summary"]["throughput"] or {}
    speed, mfu = rates.get("samples_per_second"), rates.get("mfu")
    return (
        f"{cell.name:22} {found['lines'][-1]['loss']:9.5f} {expected['lines'][-1]['loss']:9.5f} "
        f"{apart:9.1e} {'-' if speed is None else f'{speed:.0f}':>10} "
        f"{'-' if mfu is None else f'{mfu:.1%}':>6}"
        f"{'' if _holds(cell, found, expected) else '  too far'}"
    )


if __name__ == "__main__":
    sys.exit(main())
