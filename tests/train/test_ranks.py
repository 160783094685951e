"""Who this process is among all, for each way of being started; and what ranks do as such."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
import torch.distributed as dist
from processes import is_running

from largebatch.common.errors import ConfigError
from largebatch.distributed import addresses
from largebatch.distributed.addresses import check_is_here, free_port
from largebatch.distributed.launchers import ranks_from
from largebatch.distributed.ranks import Ranks, meet, pick_device, process_group, started_ranks
from largebatch.train.command import check_single

BIN = Path(sys.executable).parent
ALONE = Ranks("none", 0, 1, 0, 1)
PALS = {"PALS_RANKID": "5", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "4", "PALS_NODEID": "1"}
MASTER = {"MASTER_ADDR": "node0", "MASTER_PORT": "2345"}


def python(code: str, cwd: Path, *launcher: str, **environment: str) -> str:
    """What a process, or several, with these variables print."""
    done = (subprocess if launcher else forked).run(
        [*launcher, sys.executable, "-c", code],
        capture_output=True, text=True, timeout=600, cwd=cwd, env=os.environ | environment,
    )  # fmt: skip
    return done.stdout + done.stderr


# A real MPI that was not started by a launcher: one process, a world of one.
ASK = (
    "from largebatch.distributed.ranks import find_ranks\n"
    "from largebatch.conf.config import ConfigError\n"
    "try:\n"
    "    print(find_ranks())\n"
    "except ConfigError as error:\n"
    "    print(error)\n"
)


def test_without_a_launcher_there_is_one_rank() -> None:
    assert ranks_from({"PATH": "/bin"}) == ALONE


@pytest.mark.parametrize(
    "environment",
    [
        {"PBS_JOBID": "7.pbs", "PBS_NODEFILE": "/var/spool/nodes"},
        # What sbatch gives the script itself.
        {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"},
    ],
    ids=["PBS", "Slurm"],
)
def test_a_job_that_runs_python_without_a_launcher_has_one_rank(
    environment: dict[str, str],
) -> None:
    assert ranks_from(environment) == ALONE
    with pytest.raises(ConfigError, match=r"LARGEBATCH_RANKS=96 .*launcher: none\) sees 1"):
        ranks_from(environment | {"LARGEBATCH_RANKS": "96"})


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
    # torchrun inside of an MPI or Slurm job: its own variables are the nearer ones.
    slurm = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "PMI_RANK": "0", "PMI_SIZE": "2"}
    assert ranks_from(environment | PALS | slurm).launcher == "torchrun"
    with pytest.raises(ConfigError, match=r"LARGEBATCH_RANKS=96 .*launcher: torchrun\) sees 8"):
        ranks_from(environment | {"LARGEBATCH_RANKS": "96"})


def test_an_mpi_launcher_without_mpi4py_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ConfigError, match=r"largebatch\[mpi\]"):
        ranks_from({"PMI_RANK": "0", "PMI_SIZE": "2"})
    with pytest.raises(ConfigError, match=r"largebatch\[mpi\]"):
        ranks_from(PALS)  # nor says anything where to meet


def test_pals_without_mpi4py_has_the_size_that_somebody_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    (tmp_path / "nodes").write_text("a.site\na.site\nb.site\nb.site\n")
    nodefile = {"PBS_NODEFILE": str(tmp_path / "nodes")}
    for said in ({"PMI_SIZE": "8"}, {"WORLD_SIZE": "8"}, {"LARGEBATCH_RANKS": "8"}, nodefile):
        assert ranks_from(PALS | MASTER | said) == Ranks("pals", 5, 8, 1, 4, "node0", 2345)
    with pytest.raises(ConfigError, match=r"rank 5 of PALS finds no size of the world \(got None"):
        ranks_from(PALS | MASTER)
    with pytest.raises(ConfigError, match=r"finds no size of the world \(got 1\)"):
        ranks_from(PALS | MASTER | {"PMI_SIZE": "1"})


def test_an_mpi_that_sees_another_world_than_its_launcher_is_refused(tmp_path: Path) -> None:
    # One process that believes to be one of two: what an mpi4py built for another MPI looks like.
    for environment in (
        {"PMI_RANK": "1", "PMI_SIZE": "2"},
        {"PMIX_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
        {"PMIX_RANK": "1", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
    ):
        # Handed over: this MPI would believe in them too.
        ask = ASK.replace("find_ranks()", f"ranks_from({environment})")
        said = python(ask.replace("import find_ranks", "import ranks_from"), tmp_path)
        assert "started 2 ranks, but mpi4py sees 1" in said


def test_a_world_of_one_under_pals_needs_a_proof(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("a.site\na.site\n")
    two.write_text("a.site\nb.site\n")
    first = {"PALS_RANKID": "0", "PALS_LOCAL_RANKID": "0", "PALS_LOCAL_SIZE": "1"}
    assert "an unknown number of ranks, but mpi4py sees 1" in python(ASK, tmp_path, **first)
    # mpiexec -n 1 on the only node; on two nodes --ppn 1 would look the same.
    mine = python(ASK, tmp_path, **first, PBS_NODEFILE=str(one))
    assert "Ranks(launcher='pals', rank=0, size=1, local_rank=0, local_size=1" in mine
    assert "started 2 ranks, but mpi4py sees 1" in python(
        ASK, tmp_path, **first, PBS_NODEFILE=str(two)
    )
    meant = python(ASK, tmp_path, **first, PBS_NODEFILE=str(two), LARGEBATCH_RANKS="1")
    assert "size=1" in meant
    twelve = first | {"PALS_LOCAL_SIZE": "12"}
    assert "started 12 ranks, but mpi4py sees 1" in python(
        ASK, tmp_path, **twelve, PBS_NODEFILE=str(one)
    )


def test_sruns_variables_are_taken() -> None:
    step = {
        "SLURM_PROCID": "6",
        "SLURM_STEP_NUM_TASKS": "7",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "3",
        "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    }
    assert ranks_from(step | MASTER) == Ranks("slurm", 6, 7, 0, 1, "node0", 2345)
    inner = step | {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
    assert ranks_from(inner | MASTER) == Ranks("slurm", 3, 7, 1, 2, "node0", 2345)
    with pytest.raises(ConfigError, match=r"cannot meet without MASTER_ADDR and MASTER_PORT: exp"):
        ranks_from(step)
    single = step | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NODEID": "0"}
    single |= {"SLURM_STEP_TASKS_PER_NODE": "1"}
    assert ranks_from(single) == Ranks("slurm", 0, 1, 0, 1)


def test_a_master_address_that_is_not_rank_zeros_is_refused() -> None:
    check_is_here("127.0.0.1")
    check_is_here(socket.gethostname())
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1 is not of .*LARGEBATCH_HSN_SUFFIX"):
        check_is_here("192.0.2.1")  # of no machine: kept for documentation
    with pytest.raises(ConfigError, match=r"node0\.invalid does not resolve"):
        check_is_here("node0.invalid")


def test_ranks_of_mpi_meet_where_the_script_says_or_end_with_a_sentence(tmp_path: Path) -> None:
    mpiexec = [str(BIN / "mpiexec"), "-n", "2"]
    port = str(free_port())
    met = python(ASK, tmp_path, *mpiexec, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert met.count("size=2, local_rank=0, local_size=2, master_addr='127.0.0.1', m") == 1
    assert met.count(f"master_port={port}") == 2
    refused = python(ASK, tmp_path, *mpiexec, MASTER_ADDR="192.0.2.1", MASTER_PORT=port)
    assert refused.count("the master address 192.0.2.1 is not of") == 2
    promised = python(ASK, tmp_path, *mpiexec, LARGEBATCH_RANKS="24")
    assert promised.count("the launcher started 24 ranks, but mpi4py sees 2") == 2


# Ends by itself after a minute, to leave no trace where it should not have lived.
SLEEP = (
    "import os, sys, time\n"
    "from largebatch.distributed.ranks import die_with_parent\n"
    "die_with_parent()\n"
    "open(f'pid{os.getpid()}', 'w').close()\n"
    "time.sleep(60)\n"
)


@pytest.mark.parametrize(
    "launcher",
    [
        [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2"],
        [str(BIN / "mpiexec"), "-n", "2", sys.executable],
    ],
    ids=["torchrun", "mpiexec"],
)
def test_ranks_end_when_their_launcher_is_killed(launcher: list[str], tmp_path: Path) -> None:
    (tmp_path / "sleep.py").write_text(SLEEP)
    process = subprocess.Popen(
        [*launcher, "sleep.py"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait(lambda: len(list(tmp_path.glob("pid*"))) == 2, 40)
        ranks = [int(path.name.removeprefix("pid")) for path in tmp_path.glob("pid*")]
        assert all(is_running(rank) for rank in ranks)
        process.send_signal(signal.SIGKILL)  # no handler runs
        process.wait(10)
        wait(lambda: not any(is_running(rank) for rank in ranks), 10)
    finally:
        process.kill()


def wait(until: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_ranks_that_do_not_end_by_themselves_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/cat")  # fails at once: cat has no option -m

    def fails() -> None:
        with started_ranks(2) as ranks:
            assert (ranks.rank, ranks.size, ranks.local_size) == (0, 2, 2)
            raise KeyError("a failure of rank 0")

    with pytest.raises(KeyError, match="a failure of rank 0"):
        fails()


def test_ranks_that_a_run_starts_are_not_told_of_the_jobs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    look = tmp_path / "look"
    look.write_text(f"#!/bin/sh\nenv > {tmp_path}/seen\n")
    look.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(look))
    monkeypatch.setenv("LARGEBATCH_RANKS", "1")
    with started_ranks(2):
        wait(lambda: (tmp_path / "seen").exists(), 10)
    seen = (tmp_path / "seen").read_text().splitlines()
    assert "WORLD_SIZE=2" in seen
    assert not [line for line in seen if line.startswith("LARGEBATCH_RANKS")]


def test_one_rank_has_a_group_where_an_engine_asks_for_one() -> None:
    cpu = torch.device("cpu")
    with process_group(None, Ranks(), cpu):
        assert not dist.is_initialized()
    with process_group(None, Ranks(), cpu, always=True, timeout_seconds=30):
        ones = torch.ones(3)
        dist.all_reduce(ones)
        assert (dist.get_world_size(), dist.get_backend(), ones.tolist()) == (1, "gloo", [1, 1, 1])
    assert not dist.is_initialized()


SILENT = """
import sys
from largebatch.distributed import addresses
from largebatch.distributed.ranks import ConfigError, Ranks, meet
addresses.ANSWER_SECONDS = 0.2
try:
    meet(Ranks("torchrun", 1, 2, 1, 2, "127.0.0.1", int(sys.argv[1])))
except ConfigError as error:
    print(error)
"""


def test_a_port_that_never_answers_is_another_program_s(tmp_path: Path) -> None:
    """torch waits for an answer without end."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        command = [sys.executable, "-c", SILENT, str(port)]
        done = forked.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert f"what listens at 127.0.0.1:{port}, where the ranks are to meet" in done.stdout
    assert "choose another MASTER_PORT" in done.stdout


def test_a_rank_0_that_is_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "ANSWER_SECONDS", 5.0)
    port = free_port()
    first, second = (Ranks("torchrun", rank, 2, rank, 2, "127.0.0.1", port) for rank in range(2))
    with ThreadPoolExecutor() as pool:
        met = pool.submit(meet, second)
        time.sleep(0.5)
        store = meet(first)
        assert store is not None
        store.set("a", "b")
        assert met.result().get("a") == b"b"


HANG = """
import sys, time, torch, torch.distributed as dist
from largebatch.distributed.ranks import Ranks, meet, process_group
ranks = Ranks("test", int(sys.argv[1]), 2, 0, 2, "127.0.0.1", int(sys.argv[2]))
with process_group(meet(ranks), ranks, torch.device("cpu"), timeout_seconds=2):
    if ranks.rank == 1:
        time.sleep(30)
    begin = time.monotonic()
    try:
        dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        print(f"ended after {time.monotonic() - begin:.1f} s", error, flush=True)
"""


def test_the_timeout_of_a_group_ends_a_collective_that_hangs(tmp_path: Path) -> None:
    (tmp_path / "hang.py").write_text(HANG)
    port = str(free_port())
    first, second = (
        forked.Popen([sys.executable, "hang.py", rank, port], cwd=tmp_path,
                     stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for rank in "01"
    )  # fmt: skip
    try:
        assert first.stdout is not None
        lines = (line for line in first.stdout if not line.startswith("[Gloo]"))  # torch 2.10's own
        said = next(lines).split()
        assert said[:2] == ["ended", "after"]
        assert 1.5 <= float(said[2]) <= 15
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


def test_a_rank_sees_to_its_sockets(tmp_path: Path) -> None:
    allow = (
        "import resource\n"
        "from largebatch.distributed.ranks import ConfigError, Ranks, allow_sockets, meet\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (200, 2000))\n"
        "assert allow_sockets(500) is None\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))\n"
        "assert allow_sockets(10) is None\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))\n"
        "try:\n"
        "    meet(Ranks(size=98304))\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )
    raised, kept, refused = python(allow, tmp_path).splitlines()
    assert (raised, kept) == ("(1256, 2000)", "(1256, 2000)")  # 500 ranks twice, 256 files
    assert "98304 ranks need 196864 open files, and this process may open 2000" in refused


def fake_accelerator(monkeypatch: pytest.MonkeyPatch, count: int) -> list[int]:
    """As on Aurora: torch with `count` XPUs. Returns the list of those made current."""
    current: list[int] = []
    fakes = {
        "current_accelerator": lambda check_available: SimpleNamespace(type="xpu"),
        "device_count": lambda: count,
        "set_device_index": current.append,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.accelerator, name, fake)
    return current


def test_each_rank_has_the_device_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    current = fake_accelerator(monkeypatch, 12)
    assert pick_device(None, Ranks(local_rank=7)) == torch.device("xpu", 7)
    assert current == [7]  # before there is a process group
    with pytest.raises(ValueError, match=r"local rank 12 has no xpu device .* shows 12"):
        pick_device(None, Ranks(local_rank=12))
    assert pick_device("cpu", Ranks(local_rank=12)) == torch.device("cpu")
    with pytest.raises(ValueError, match=r"engine.device must be one of cpu, xpu here, got 'cuda'"):
        pick_device("cuda", Ranks())


def test_a_rank_that_is_shown_one_device_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_accelerator(monkeypatch, 1)
    with pytest.raises(ValueError, match="local rank 3 has no xpu device"):
        pick_device(None, Ranks(local_rank=3))
    monkeypatch.setenv("ZE_AFFINITY_MASK", "3")
    assert pick_device(None, Ranks(local_rank=3)) == torch.device("xpu", 0)


def test_ipex_is_imported_first_where_it_is_wanted(tmp_path: Path) -> None:
    code = (
        "from largebatch.conf.config import ConfigError\n"
        "from largebatch.distributed.ranks import Ranks, pick_device\n"
        "try:\n"
        "    print(pick_device('cpu', Ranks(), ipex=True))\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )
    said = python(code, tmp_path)
    assert said.startswith("engine.ipex=true, but intel_extension_for_pytorch does not load")
    assert said.count("\n") == 1
    (tmp_path / "intel_extension_for_pytorch.py").write_text(
        "import sys\nprint('first' if 'torch' not in sys.modules else 'after torch')\n"
    )
    # By `env`: a process that has imported nothing yet.
    assert python(code, tmp_path, "env", PYTHONPATH=str(tmp_path)).split() == ["first", "cpu"]


def test_ranks_of_a_launcher_make_one_run_be_it_one_of_a_sweep() -> None:
    ranks = Ranks("slurm", 0, 2, 0, 2)
    sweeps = [
        ("sweep", ["seed=1"]),
        ("train", ["-m", "seed=1"]),
        ("train", ["hydra.mode=MULTIRUN"]),
    ]
    for command, words in sweeps:
        with pytest.raises(ConfigError, match="slurm has started 2 ranks for one run"):
            check_single(ranks, command, words)
    check_single(ranks, "train", ["seed=1"])
    check_single(ranks, "train", ["--multirun", "seed=1", "hydra/sweeper=largebatch_trial"])
