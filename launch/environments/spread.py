"""`largebatch env spread`: an archive onto every node's own disk, over MPI.

Rank 0 reads the archive once and broadcasts it, in chunks, to one rank of each node, which unpacks
it while it arrives and checks every file. Each node then reports, and rank 0 names those where it
failed. A rank that hangs is named after `timeout` seconds and ends the job with exit code 1; one
that dies ends the job at once where the launcher does so (mpiexec's own words and exit code), and
otherwise counts as hanging. In either case no node keeps half an environment under its final name.

MPI is called from the main thread only, and polled: a blocking broadcast could not be given up.
"""

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any, Final

from largebatch.launch.environments.archive import EnvError, is_zstd
from largebatch.launch.environments.unpack import Damaged, is_there, manifest_of, unpack
from largebatch.launch.hosts import node_name, places

_CHUNK: Final = 4 << 20
_REPORT_TAG: Final = 78
_REPORT_BYTES: Final = 4096
_SHOW_SECONDS: Final = 5.0


class Lost(Exception):
    """A node that has not answered in time."""

    def __init__(self, rank: int, what: str) -> None:
        super().__init__(what)
        self.rank = rank


@dataclass(frozen=True)
class Order:
    """What every node has to do, as rank 0 found it in the archive."""

    archive: str
    archive_bytes: int
    zstd: bool
    total: str
    """Hash of the contents."""
    target: str
    unpacked_bytes: int
    home: str


@dataclass
class Report:
    """Result of one node."""

    node: str
    failed: str = ""
    reused: bool = False
    stalled: bool = False
    """Whether the archive stopped arriving."""


def spread(archive: Path, to: Path | None, timeout_seconds: float) -> int:
    """Under mpiexec, by any number of ranks on each node; returns 0, or 1 where a node failed.
    EnvError without mpi4py or such an archive, or for an option out of range.
    """
    if timeout_seconds <= 0:
        raise EnvError(f"--timeout must be > 0 seconds, got {timeout_seconds:g}")
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise EnvError(
            f"env spread needs mpi4py, which does not load ({error}): pip install 'largebatch[mpi]'"
            ", or load the site's module"
        ) from error
    world = MPI.COMM_WORLD
    with _within(timeout_seconds, f"not all of the {world.size:,} ranks have come"):
        order = world.bcast(_order(archive, to) if world.rank == 0 else None)
        if isinstance(order, EnvError):
            if world.rank == 0:
                raise order
            return 2
        names = world.allgather(node_name())
        nodes = list(dict.fromkeys(names))
        # The first rank of each node leads it; leaders are in the order of `nodes`.
        leads = names.index(names[world.rank]) == world.rank
        leaders = world.Split(0 if leads else MPI.UNDEFINED, world.rank)
    try:
        code = _lead(leaders, order, nodes, timeout_seconds) if leads else 0
    except Lost as lost:
        print(
            f"largebatch env spread: node {nodes[lost.rank]} {lost}: it is given up, and the job "
            "ended; leave it out and spread again (nodes that are done keep what they have)",
            file=sys.stderr,
            flush=True,
        )
        world.Abort(1)
        raise
    # All ranks have rank 0's exit code. They sleep until then: their cores may be wanted.
    shared = bytearray([code])
    _wait(world.Ibcast([shared, MPI.BYTE], root=0), inf)
    return shared[0]


def _order(archive: Path, to: Path | None) -> Order | EnvError:
    """Return what to do, or why not: the other ranks wait for either."""
    try:
        zstd = is_zstd(archive)
        manifest = manifest_of(archive, zstd)
        num_bytes = archive.stat().st_size
    except EnvError as error:
        return error
    user = os.environ.get("USER", str(os.getuid()))
    target = to or Path("/tmp") / user / f"{manifest.name}-{manifest.total[:12]}"
    if not target.is_absolute():
        return EnvError(f"--to must be an absolute path, the same on every node, got {target}")
    return Order(
        str(archive), num_bytes, zstd, manifest.total, str(target), manifest.num_bytes,
        manifest.home,
    )  # fmt: skip


def _lead(leaders: Any, order: Order, nodes: list[str], patience: float) -> int:
    """Install on one node; on rank 0 print the summary. The exit code is rank 0's: 0 elsewhere.
    Lost where a node has not answered within `patience` seconds.
    """
    own = Report(nodes[leaders.rank])
    target = Path(order.target.replace("{node}", own.node))
    started = time.perf_counter()
    with _within(patience, "not all nodes have looked at their folder"):
        try:
            own.reused = is_there(target, order.total)
            if not own.reused:
                _check_space(target, order)
        except OSError as error:
            own.failed = _format_error(error)
        missing = leaders.allreduce(int(not own.reused and not own.failed))
    if missing:
        with _unpacking(order, target, own) as take:
            own.stalled = not _broadcast(leaders, order, take, patience)
    if not own.failed and not (target / "bin" / "python").exists():
        own.failed = f"the environment's base Python in {order.home} is not on this node"
    reports = _gather(leaders, own, patience)
    if leaders.rank != 0:
        return 0
    num_bytes = order.archive_bytes if missing else 0
    print(_summary(reports, order, num_bytes, time.perf_counter() - started), flush=True)
    return int(any(report.failed for report in reports))


def _check_space(target: Path, order: Order) -> None:
    there = target
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < order.unpacked_bytes:
        raise OSError(
            f"{there} has {free / 2**20:,.0f} MiB free, the environment needs "
            f"{order.unpacked_bytes / 2**20:,.0f}: remove what an earlier job left, or choose "
            "another disk with --to"
        )


@contextmanager
def _unpacking(
    order: Order, target: Path, report: Report
) -> Iterator[Callable[[memoryview], None]]:
    """A thread unpacks what the function is given; nothing where a node needs or can do nothing."""
    if report.reused or report.failed:
        yield lambda chunk: None
        return
    reading, writing = os.pipe()
    thread = threading.Thread(target=_unpack, args=(reading, order, target, report), daemon=True)
    thread.start()

    def take(rest: memoryview) -> None:
        if report.failed:
            return  # a node that has failed still takes part in the broadcast
        try:
            while rest:
                rest = rest[os.write(writing, rest) :]
        except BrokenPipeError:
            thread.join()  # it has said why

    try:
        yield take
    finally:
        os.close(writing)
        thread.join()


def _unpack(reading: int, order: Order, target: Path, report: Report) -> None:
    with os.fdopen(reading, "rb") as source:
        try:
            unpack(source, order.zstd, target)
        except (OSError, Damaged) as error:
            report.failed = _format_error(error)
        except Exception as error:
            report.failed = f"{type(error).__name__}: {error}"


def _broadcast(
    leaders: Any, order: Order, take: Callable[[memoryview], None], patience: float
) -> bool:
    """Give every chunk of the archive to `take` on every node; False where they stop coming.

    The next chunk is on its way while `take` works on one. A slow node slows the others down.
    """
    from mpi4py import MPI

    buffers = memoryview(bytearray(_CHUNK)), memoryview(bytearray(_CHUNK))
    starts = range(0, order.archive_bytes, _CHUNK)
    with ExitStack() as stack:
        root = leaders.rank == 0
        file = stack.enter_context(Path(order.archive).open("rb")) if root else None
        progress = _Progress(order.archive_bytes) if root else None

        def begin(number: int) -> tuple[memoryview, Any]:
            size = min(_CHUNK, order.archive_bytes - starts[number])
            chunk = buffers[number % 2][:size]
            if file is not None:
                file.readinto(chunk)
            return chunk, leaders.Ibcast([chunk, MPI.BYTE], root=0)

        coming = begin(0)
        for number, start in enumerate(starts):
            chunk, request = coming
            if not _wait(request, patience):
                return False
            if number + 1 < len(starts):
                coming = begin(number + 1)
            take(chunk)
            if progress is not None:
                progress.show(start + len(chunk))
    return True


def _wait(request: Any, seconds: float) -> bool:
    """Poll an MPI request until it is complete; False where it takes longer than that."""
    deadline = time.monotonic() + seconds
    pause = 0.0
    while not request.Test():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(0.005, pause + 0.0001)
    return True


def _gather(leaders: Any, own: Report, patience: float) -> list[Report]:
    """Every node's report, on rank 0. Lost where a node has sent none; or all have, and to some of
    them the archive stopped arriving.
    """
    from mpi4py import MPI

    if leaders.rank != 0:
        text = json.dumps(asdict(own)).encode()[:_REPORT_BYTES]
        sent = leaders.Isend([text, MPI.BYTE], dest=0, tag=_REPORT_TAG)
        taken = _wait(sent, patience)
        if own.stalled:
            time.sleep(3 * patience)  # for rank 0 to find out who hangs, unless it is the one
        if own.stalled or not taken:
            raise Lost(0, f"has not taken this node's report for {patience:g} s")
        return []
    buffers = [bytearray(_REPORT_BYTES) for _ in range(1, leaders.size)]
    expected = [
        leaders.Irecv([buffer, MPI.BYTE], source=rank, tag=_REPORT_TAG)
        for rank, buffer in enumerate(buffers, 1)
    ]
    for rank, request in enumerate(expected, 1):
        if not _wait(request, patience):
            raise Lost(rank, f"has not said how it went for {patience:g} s")
    reports = [own, *(Report(**json.loads(buffer.rstrip(b"\0"))) for buffer in buffers)]
    for rank, report in enumerate(reports):
        if report.stalled:
            raise Lost(rank, f"has not got anything for {patience:g} s")
    return reports


class _Progress:
    """A line every few seconds with the share of the archive that has been sent."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._started = self._shown = time.perf_counter()

    def show(self, done: int) -> None:
        now = time.perf_counter()
        if now - self._shown <= _SHOW_SECONDS:
            return
        self._shown = now
        rate = done / 2**20 / (now - self._started)
        print(
            f"{done / 2**20:,.0f} of {self._num_bytes / 2**20:,.0f} MiB, {rate:,.0f} MiB/s",
            file=sys.stderr,
            flush=True,
        )


def _summary(reports: list[Report], order: Order, num_bytes: int, seconds: float) -> str:
    failed = [report for report in reports if report.failed]
    reused = [report.node for report in reports if report.reused]
    fresh = len(reports) - len(failed) - len(reused)
    lines = []
    if num_bytes:
        rate = num_bytes / 2**20 / seconds
        lines.append(
            f"{fresh} of {len(reports)} nodes unpacked {num_bytes / 2**20:,.1f} MiB "
            f"({order.unpacked_bytes / 2**20:,.1f} MiB of files) in {seconds:.2f} s: {rate:,.0f} "
            f"MiB/s to each, {rate * fresh:,.0f} MiB/s together; every file checked by its hash"
        )
    if reused:
        lines.append(f"{len(reused)} had it already: {places(reused)}")
    lines += [f"failed on {report.node}: {report.failed}" for report in failed]
    if len(failed) < len(reports):
        lines += [f"hash {order.total[:12]}; to use it:", f". {order.target}/bin/activate"]
    return "\n".join(lines)


@contextmanager
def _within(seconds: float, what: str) -> Iterator[None]:
    """End this process, and with it the job, where a part that cannot be polled takes too long."""

    def end() -> None:
        print(
            f"largebatch env spread: {what} after {seconds:g} s: look for a rank that has died or "
            "hangs; nothing was changed",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _format_error(error: BaseException) -> str:
    """Format an error as a line, cut to the length that a report holds."""
    name = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    strerror = getattr(error, "strerror", None)
    return f"{name}{strerror or error}"[:1000]
