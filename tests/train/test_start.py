"""What a process has imported when its first step is made: each file is opened on each rank."""

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
from largebatch.cli import main
assert main(sys.argv[1:]) == 0
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
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "torch" in loaded
    assert loaded & {*LATE} == set()
