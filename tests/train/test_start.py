"""What a process has imported when its first step is made: each file is opened on each rank."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from largebatch.common.loading import load

CODE = """
import gc, sys
from largebatch.cli import main
assert main(sys.argv[1:]) == 0
assert gc.isenabled()
print(gc.get_freeze_count())
print(*sys.modules)
"""
RUN = (
    "task=bytes", "batch.size=64", "budget.samples=128", "target.loss=null", "hydra.run.dir=run",
)  # fmt: skip
LATE = (
    "torch._dynamo", "torch._inductor", "torch.distributed.checkpoint", "torch.distributed.fsdp",
    "torch.distributed.tensor", "sympy", "matplotlib", "scipy", "sklearn", "wandb", "pandas",
)  # fmt: skip


@pytest.mark.parametrize("optimizer", ["lamb", "kfac"])
def test_a_run_imports_no_compiler_no_checkpoints_and_no_pictures(
    optimizer: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, "train", f"optim={optimizer}", *RUN],
        cwd=tmp_path, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *_, frozen, modules = done.stdout.splitlines()
    loaded = set(modules.split())
    assert "torch" in loaded
    assert loaded & {*LATE} == set()
    assert int(frozen) > 100_000  # what torch alone makes, which no later collection looks through


def test_garbage_is_collected_after_a_module_that_is_not_there() -> None:
    with pytest.raises(ModuleNotFoundError):
        load("largebatch.none_such")
    assert gc.isenabled()
