"""Who this process is among all, for each way of being started."""

import subprocess
import sys
from pathlib import Path

import pytest

from largebatch.train.ranks import Ranks, ranks_from, started_ranks


def test_without_a_launcher_there_is_one_rank() -> None:
    assert ranks_from({"PATH": "/bin"}) == Ranks("none", 0, 1, 0, 1)


def test_torchruns_variables_are_taken() -> None:
    environment = {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "node0",
        "MASTER_PORT": "29500",
    }
    assert ranks_from(environment) == Ranks("torchrun", 5, 8, 1, 4, "node0", 29500)
    # torchrun inside of an MPI job: its own variables are the nearer ones.
    assert ranks_from(environment | {"PALS_RANKID": "0"}).launcher == "torchrun"


def test_an_mpi_launcher_without_mpi4py_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(RuntimeError, match=r"largebatch\[mpi\]"):
        ranks_from({"PMI_RANK": "0", "PMI_SIZE": "2"})


def test_an_mpi_that_sees_another_world_than_its_launcher_is_refused(tmp_path: Path) -> None:
    # One process that believes to be one of two: what an mpi4py built for another MPI looks like.
    script = (
        "from largebatch.train.ranks import ranks_from\n"
        "try:\n"
        "    ranks_from({'PMIX_RANK': '1', 'PMI_SIZE': '2'})\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert "started 2 ranks, but mpi4py sees 1" in done.stdout, done.stderr


def test_ranks_that_do_not_end_by_themselves_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/cat")  # fails at once: cat has no option -m

    def fails() -> None:
        with started_ranks(2) as ranks:
            assert (ranks.rank, ranks.size, ranks.local_size) == (0, 2, 2)
            raise KeyError("a failure of rank 0")

    with pytest.raises(KeyError, match="a failure of rank 0"):
        fails()
