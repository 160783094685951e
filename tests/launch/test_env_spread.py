"""An archive onto four nodes by real MPI ranks, each on a node by name."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import env_small
import pytest

from largebatch.launch.environments.archive import NAME
from largebatch.launch.environments.pack import pack, site_packages

MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
pytestmark = pytest.mark.skipif(MPIEXEC is None, reason="needs an MPI launcher")
NODES = ["node0", "node1", "node2", "node3"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the environment `made` and its archive."""
    folder = tmp_path_factory.mktemp("spread")
    env_small.make(folder / "made")
    pack(folder / "made", folder / "small.tar.gz")
    return folder


# Files of at most 1 MiB, from when MPI has its own: a quota that is used up in the middle of one.
SMALL_DISK = """
import resource, signal, sys
from mpi4py import MPI
from largebatch.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
sys.exit(main(sys.argv[1:]))
"""


def command(
    arguments: Sequence[str | Path], nodes: Sequence[str], node2: Sequence[str] = ()
) -> list[str]:
    """One rank for each of `nodes`; `node2` is how that one starts Python instead."""
    words = [str(MPIEXEC)]
    for number, node in enumerate(nodes):
        python = [sys.executable, "-m", "largebatch"]
        run = list(node2) if node2 and node == "node2" else python
        words += [*([":"] if number else []), "-n", "1", "-env", "LARGEBATCH_FAKE_NODE", node]
        words += [*run, "env", "spread", *map(str, arguments)]
    return words


def spread(
    *arguments: str | Path, nodes: Sequence[str] = NODES, node2: Sequence[str] = ()
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(arguments, nodes, node2), capture_output=True, text=True, timeout=600
    )


def target(tmp_path: Path) -> Path:
    """Where each node's environment goes: one machine plays them all."""
    return tmp_path / "{node}" / "env"


def test_every_node_gets_the_same_files_once_and_they_run_there(made: Path, tmp_path: Path) -> None:
    # Two ranks on node1, one of which has nothing to do.
    done = spread(made / "small.tar.gz", "--to", target(tmp_path), nodes=[*NODES, "node1"])
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"4 of 4 nodes unpacked [\d.]+ MiB \([\d.]+ MiB of files\) in [\d.]+ s: [\d,]+ MiB/s to "
        r"each, [\d,]+ MiB/s together",
        done.stdout,
    ), done.stdout
    *_, command = done.stdout.splitlines()
    assert command == f". {target(tmp_path)}/bin/activate"
    folders = [tmp_path / node / "env" for node in NODES]
    listings = [env_small.listing(folder) for folder in folders]
    assert listings[0] == listings[1] == listings[2] == listings[3]
    weights = site_packages(folders[3]) / "pebble" / "weights.bin"
    assert weights.read_bytes() == env_small.noise(env_small.LARGE)
    said = subprocess.run([folders[3] / "bin" / "pebble"], capture_output=True, text=True)
    assert said.stdout.split()[-1] == str(folders[3])
    assert sorted(path.name for path in (tmp_path / "node1").iterdir()) == ["env"]

    # Once more: nothing is sent where it is already, and what is not whole is not taken for it.
    stamp = (folders[0] / NAME).stat().st_mtime_ns
    shutil.rmtree(folders[2])
    (site_packages(folders[3]) / "pebble" / "weights.bin").unlink()
    again = spread(made / "small.tar.gz", "--to", target(tmp_path))
    assert again.returncode == 1
    assert "1 of 4 nodes unpacked" in again.stdout
    assert "2 had it already: node0, node1" in again.stdout
    assert f"failed on node3: {folders[3]} is there and is not this environment" in again.stdout
    assert (folders[0] / NAME).stat().st_mtime_ns == stamp
    assert env_small.listing(folders[2]) == listings[2]


def test_a_node_that_cannot_write_is_named_and_the_others_get_theirs(
    made: Path, tmp_path: Path
) -> None:
    done = spread(
        made / "small.tar.gz",
        "--to",
        target(tmp_path),
        node2=[sys.executable, "-c", SMALL_DISK],
    )
    assert done.returncode == 1
    assert "3 of 4 nodes unpacked" in done.stdout, done.stdout + done.stderr
    assert re.search(r"failed on node2: .*File too large", done.stdout)
    assert list((tmp_path / "node2").iterdir()) == []
    for node in ("node0", "node1", "node3"):
        assert (tmp_path / node / "env" / "bin" / "pebble").is_file()


def test_a_damaged_archive_fails_on_every_node_by_name_and_leaves_nothing(
    made: Path, tmp_path: Path
) -> None:
    contents = bytearray((made / "small.tar.gz").read_bytes())
    contents[len(contents) // 2] ^= 1
    (tmp_path / "small.tar.gz").write_bytes(contents)
    done = spread(tmp_path / "small.tar.gz", "--to", target(tmp_path))
    assert done.returncode == 1
    for node in NODES:
        assert f"failed on {node}: " in done.stdout, done.stdout + done.stderr
        assert list((tmp_path / node).iterdir()) == []
    assert "activate" not in done.stdout


def end(pid: int) -> None:
    """Kill a process that hangs, if the launcher has not, and wait until it is gone."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 600
    while Path("/proc", str(pid)).exists() and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.parametrize("mode", ["stops", "dies"])
def test_a_rank_that_disappears_ends_the_job_and_leaves_no_half_environment(
    mode: str, made: Path, tmp_path: Path
) -> None:
    big = tmp_path / "big"
    env_small.make(big)
    (site_packages(big) / "noise.bin").write_bytes(env_small.noise(30_000_000))
    pack(big, tmp_path / "big.tar.gz")
    arguments = [tmp_path / "big.tar.gz", "--to", target(tmp_path), "--timeout", "4"]
    pid = tmp_path / "pid"
    noted = f'echo $$ > "{pid}"; exec "$@"'
    shell = ["bash", "-c", noted, "bash", sys.executable, "-m", "largebatch"]
    words = command(arguments, NODES, node2=shell)
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 600
        while not list(tmp_path.glob("node2/.env.*/lib")) and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(int(pid.read_text()), signal.SIGSTOP if mode == "stops" else signal.SIGKILL)
        try:
            out, err = process.communicate(timeout=600)
        finally:
            process.kill()
            end(int(pid.read_text()))
    assert process.returncode != 0, out
    if mode == "stops":
        assert re.search(r"node node2 has not .* for 4 s: it is given up", err), out + err
    assert not (tmp_path / "node2" / "env").exists()
    # What was left under a temporary name goes with the next one that is unpacked there.
    assert list((tmp_path / "node2").iterdir()) != []
    shutil.rmtree(tmp_path / "node0" / "env", ignore_errors=True)
    for node in ("node1", "node3"):
        shutil.rmtree(tmp_path / node, ignore_errors=True)
    assert spread(made / "small.tar.gz", "--to", target(tmp_path)).returncode == 0
    assert [path.name for path in (tmp_path / "node2").iterdir()] == ["env"]


def test_what_is_no_archive_is_refused_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "text.tar.gz").write_text("no archive", encoding="utf-8")
    done = spread(tmp_path / "text.tar.gz", "--to", target(tmp_path), nodes=["node0", "node1"])
    assert done.returncode == 2
    assert "cannot be read as an archive" in done.stderr
    assert done.stderr.count("largebatch:") == 1
