"""The launcher's word on the world, limits of the operating system, folders."""

from collections.abc import Iterator
from typing import Final

from largebatch.launch.doctor.findings import Finding, error, warning
from largebatch.launch.doctor.host import Folder, HostFacts

# Where multiprocessing and torch's shared memory put their sockets below TMPDIR:
# /torch-shm-dir-XXXXXX/manager.sock and /pymp-XXXXXXXX/listener-XXXXXXXX.
_BELOW_TMPDIR: Final = 34
_SOCKET_PATH: Final = 107
"""sun_path of AF_UNIX holds 108 bytes, the last a zero."""
_LONG_TMPDIR: Final = 50
"""PBS's own has about 68 characters, and ALCF reports it as too long for dataloader workers."""
_SHARED: Final = ("lustre", "nfs", "gpfs", "beegfs", "fuse.dfuse", "panfs", "ceph")
_VOLATILE: Final = ("tmpfs", "ramfs")
_RUN_NEEDS: Final = 1 << 30
_TMPDIR_NEEDS: Final = 256 << 20
_OTHER_SOCKETS: Final = 1024


def check(facts: HostFacts) -> Iterator[Finding]:
    """ranks-refused, world-of-one, and those of limits and of folders."""
    yield from _world(facts)
    yield from _limits(facts)
    yield from _tmpdir(facts)
    yield from _run_folder(facts)


def _world(facts: HostFacts) -> Iterator[Finding]:
    if facts.launcher_error:
        yield error(
            "ranks-refused",
            facts.launcher_error,
            "this process does not know its place among the ranks",
            "start with torchrun, or with the mpiexec that mpi4py was built for",
        )
        return
    environment = facts.environment
    beside = environment.get("PALS_LOCAL_SIZE", "1")
    several = beside != "1" or len(facts.nodes_expected) > 1
    if environment.get("LARGEBATCH_RANKS") == "1":
        return  # one is meant
    if facts.size == 1 and "PALS_RANKID" in environment and several:
        yield error(
            "world-of-one",
            f"PALS started this process (PALS_RANKID={environment['PALS_RANKID']}, "
            f"PALS_LOCAL_SIZE={beside}), but its world has 1 rank",
            "every process would train alone, and they would fight over one port and one folder",
            "start with mpiexec --pmi=pmix, in an environment whose mpi4py is the module's",
        )


def _limits(facts: HostFacts) -> Iterator[Finding]:
    if facts.size == 1:
        return
    needed = facts.size + _OTHER_SOCKETS
    if 0 <= facts.nofile_soft < needed:
        enough = facts.nofile_hard < 0 or facts.nofile_hard >= needed
        yield Finding(
            "nofile-low",
            "warning" if enough else "error",
            f"{facts.nofile_soft:,} open files and sockets are allowed (hard limit "
            f"{facts.nofile_hard:,}), {facts.size:,} ranks need about {needed:,}",
            "largebatch raises its own limit as far as the hard one allows; MPI and oneCCL may "
            "start before it"
            if enough
            else "rank 0 keeps a socket open for each rank: the start fails part of the way",
            f"ulimit -n {needed} before mpiexec, and read it back here: whether PALS hands it on "
            "(--rlimit NOFILE) has to be seen on the ranks"
            if enough
            else "ask the site for a higher hard limit, or start fewer ranks",
            (facts.node,),
        )
    if facts.rank != 0:
        return
    if facts.somaxconn is not None and facts.somaxconn < facts.size:
        yield error(
            "somaxconn-low",
            f"net.core.somaxconn is {facts.somaxconn:,} on rank 0's node, the world has "
            f"{facts.size:,} ranks",
            "ranks that connect at once are refused (seen at 1,536 ranks, pytorch#76913)",
            f"only the site can raise it: ask for at least {2 * facts.size:,}; until then fewer "
            "ranks",
        )
    if facts.syn_backlog is not None and facts.syn_backlog < facts.size:
        yield warning(
            "syn-backlog-low",
            f"net.ipv4.tcp_max_syn_backlog is {facts.syn_backlog:,} on rank 0's node, the world "
            f"has {facts.size:,} ranks",
            "connections begun at once are dropped and tried again seconds later: a slow start",
            f"only the site can raise it: ask for at least {2 * facts.size:,}",
        )


def _tmpdir(facts: HostFacts) -> Iterator[Finding]:
    folder = facts.tmpdir
    length = len(folder.path.encode())
    if length > _LONG_TMPDIR:
        over = length + _BELOW_TMPDIR > _SOCKET_PATH
        yield Finding(
            "tmpdir-long",
            "error" if over else "warning",
            f"TMPDIR={folder.path} has {length} characters",
            f"a Unix socket's path has at most {_SOCKET_PATH}; dataloader workers need "
            f"{_BELOW_TMPDIR} of them below TMPDIR, and other libraries more",
            "export TMPDIR=/tmp",
        )
    if not folder.exists or not folder.writable:
        yield error(
            "tmpdir-unusable",
            f"TMPDIR={folder.path} " + ("cannot be written to" if folder.exists else "is missing"),
            "dataloader workers and compilers fail when they first need it",
            "export TMPDIR=/tmp",
            facts.here,
        )
    elif folder.free_bytes < _TMPDIR_NEEDS:
        yield _full("tmpdir-full", "TMPDIR", folder, _TMPDIR_NEEDS, facts.here)
    if folder.file_system.startswith(_SHARED):
        yield warning(
            "tmpdir-shared",
            f"TMPDIR={folder.path} is on {folder.file_system}",
            "every rank's scratch files load the file system that all share, and sockets may not "
            "work there",
            "export TMPDIR=/tmp",
        )


def _run_folder(facts: HostFacts) -> Iterator[Finding]:
    folder = facts.run_folder
    if folder.error or not folder.writable:
        why = folder.error or "no permission"
        yield error(
            "folder-unusable",
            f"the run's folder {folder.path} cannot be written to: {why}",
            "the run fails before its first step",
            "name another with hydra.run.dir=…",
            facts.here,
        )
    elif folder.free_bytes < _RUN_NEEDS:
        yield _full("folder-full", "the run's folder", folder, _RUN_NEEDS, facts.here)
    if folder.file_system in _VOLATILE and facts.size > facts.local_size:
        yield warning(
            "folder-local",
            f"the run's folder {folder.path} is in {folder.file_system}, which is this node's own",
            "checkpoint parts that other nodes write are elsewhere, and all is gone with the job",
            "name a folder on a shared file system with hydra.run.dir=…",
        )


def _full(code: str, name: str, folder: Folder, needed: int, here: tuple[str, ...]) -> Finding:
    return Finding(
        code,
        "error",
        f"{name} {folder.path} has {folder.free_bytes / 2**20:,.0f} MiB free, fewer than "
        f"{needed / 2**20:,.0f}",
        "records and checkpoints are cut off in the middle of a write",
        "free space or quota there, or name another folder",
        here,
    )
