"""Lets all tests, and the processes they spawn, import the modules in shared/."""

import gc
import os
import subprocess
import sys
from fcntl import LOCK_EX, flock
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "shared"))

import composed_once
import copied_plainly
import forked
import parsed_once

# What a launcher, a batch system, a tracker or a user has left in the shell decides nothing here.
_LEFT_OVER = ("LARGEBATCH_", "LOCAL_", "MASTER_", "OMPI_", "PALS_", "PBS_", "PMI", "RANK", "SLURM_",
              "TORCHELASTIC_", "WANDB_", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "ZE_AFFINITY_MASK",
              "ROCR_VISIBLE_DEVICES", "HYDRA_FULL_ERROR", "PYTHONIOENCODING")  # fmt: skip
_KEPT = ("LARGEBATCH_TEST_SLURM",)  # which CI sets for the tests themselves
for _name in [name for name in os.environ if name.startswith(_LEFT_OVER) and name not in _KEPT]:
    del os.environ[_name]

os.environ["PET_STANDALONE"] = "1"  # torchrun meets at a free port, and not at one for all

forked.set_up()
copied_plainly.set_up()
parsed_once.set_up()
composed_once.set_up(Path(os.environ[forked.FOLDER]))

gc.disable()  # what collection makes stays to the end, and looking it through takes a sixth of it


# Which wait for long, or compute: first, so that none of them is left over at the end, alone.
LONG = (
    "launch/test_watch.py", "launch/test_submit_jobs.py", "rehearsal/test_rehearsed_features.py",
    "rehearsal/test_rehearsed_ranks.py", "study/test_conduct.py", "launch/test_preflight.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files."""
    items.sort(key=lambda item: not str(item.path).endswith(LONG))


def pytest_collection_finish() -> None:
    """Leave tests and modules out of what the collector of garbage goes through."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def wheel() -> Path:
    """The wheel, built from the checkout."""
    folder = Path(os.environ[forked.FOLDER])
    root = Path(__file__).resolve().parents[1]
    with (folder / "wheel.lock").open("w") as lock:
        flock(lock, LOCK_EX)  # one for all workers
        if not (found := [*folder.glob("*.whl")]):
            words = ["-m", "build", "--wheel", "--no-isolation", "--outdir", folder, root]
            built = subprocess.run(
                [sys.executable, *words], capture_output=True, text=True, timeout=600
            )
            assert built.returncode == 0, built.stdout + built.stderr
            found = [*folder.glob("*.whl")]
    (file,) = found
    return file


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the tables that tests have recorded as a property, also from other workers."""
    for report in terminalreporter.getreports("passed"):
        for name, text in getattr(report, "user_properties", ()):
            if name == "table" and report.when == "call":
                terminalreporter.write_line(f"\n{text}")
