"""`largebatch env spread`: an archive onto every node's own disk, over MPI.

Rank 0 reads the archive once; one rank of each node takes it from a tree of nodes, unpacks it while
it arrives and checks every file. Each node then says what came of it, and rank 0 names those where
it failed. What can be promised of a rank that disappears: one that stands still is named after
`timeout` seconds and ends the job with exit code 1; one that dies ends the job at once where the
launcher does so (mpiexec's own words and exit code), and otherwise counts as standing still. In
either case no node is left with half an environment under its final name.
"""

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any, Final

from largebatch.launch.environments.archive import is_zstd
from largebatch.launch.environments.errors import EnvError
from largebatch.launch.environments.tree import Lost, stream, wait
from largebatch.launch.environments.unpack import Damaged, is_there, manifest_of, unpack
from largebatch.launch.hosts import node_name, places

_CHUNK: Final = 4 << 20
_REPORT_TAG: Final = 78
_REPORT_BYTES: Final = 4096
_SHOW_SECONDS: Final = 5.0


@dataclass(frozen=True)
class Order:
    """What rank 0 tells all."""

    archive: str
    zstd: bool
    total: str
    """The hash of what is inside."""
    target: str
    unpacked_bytes: int
    home: str


@dataclass
class Report:
    """What came of it on one node."""

    node: str
    failed: str = ""
    reused: bool = False


def spread(archive: Path, to: Path | None, timeout_seconds: float) -> int:
    """Under mpiexec, by any number of ranks on each node; returns 0, or 1 where a node failed.

    Raises:
        EnvError: no mpi4py, no such archive, or an option out of range.
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
    return _hear(world, code)


def _order(archive: Path, to: Path | None) -> Order | EnvError:
    """On rank 0: what to do, or why not; the others are waiting for either."""
    try:
        zstd = is_zstd(archive)
        manifest = manifest_of(archive, zstd)
    except EnvError as error:
        return error
    user = os.environ.get("USER", str(os.getuid()))
    target = to or Path("/tmp") / user / f"{manifest.name}-{manifest.total[:12]}"
    if not target.is_absolute():
        return EnvError(f"--to must be an absolute path, the same on every node, got {target}")
    return Order(str(archive), zstd, manifest.total, str(target), manifest.num_bytes, manifest.home)


def _lead(leaders: Any, order: Order, nodes: list[str], patience: float) -> int:
    """One node's part; on rank 0 the summary too. Returns the exit code, known on rank 0 only."""
    own = Report(nodes[leaders.rank])
    target = Path(order.target.replace("{node}", own.node))
    started = time.perf_counter()
    with _within(patience, "not all nodes have looked at their folder"):
        try:
            own.reused = is_there(target, order.total)
            if not own.reused:
                _check_space(target, order)
        except OSError as error:
            own.failed = _words(error)
        missing = leaders.allreduce(int(not own.reused and not own.failed))
    num_bytes = 0
    if missing:
        with _Unpacking(order, target, own) as unpacking:
            chunks = _shown(Path(order.archive)) if leaders.rank == 0 else iter(())
            num_bytes = stream(leaders, chunks, _CHUNK, unpacking.take, patience)
        # The last chunks are unpacked while the others are still on their way elsewhere.
    if not own.failed and not (target / "bin" / "python").exists():
        own.failed = f"the environment's base Python in {order.home} is not on this node"
    reports = _gather(leaders, own, patience)
    if leaders.rank != 0:
        return 0
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


class _Unpacking:
    """A thread that unpacks what `take` is given; it is not needed where a node has failed."""

    def __init__(self, order: Order, target: Path, report: Report) -> None:
        self._order, self._target, self._report = order, target, report
        self._idle = report.reused or bool(report.failed)

    def __enter__(self) -> "_Unpacking":
        if not self._idle:
            reading, self._writing = os.pipe()
            self._thread = threading.Thread(target=self._unpack, args=(reading,), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._idle:
            os.close(self._writing)
            self._thread.join()

    def take(self, chunk: bytes) -> None:
        if self._idle or self._report.failed:
            return  # a node that has failed still passes on what others need
        rest = memoryview(chunk)
        try:
            while rest:
                rest = rest[os.write(self._writing, rest) :]
        except BrokenPipeError:
            self._thread.join()  # it has said why

    def _unpack(self, reading: int) -> None:
        with os.fdopen(reading, "rb") as source:
            try:
                unpack(source, self._order.zstd, self._target)
            except (OSError, Damaged) as error:
                self._report.failed = _words(error)
            except Exception as error:
                self._report.failed = f"{type(error).__name__}: {error}"


def _gather(leaders: Any, own: Report, patience: float) -> list[Report]:
    """Every node's report, on rank 0."""
    from mpi4py import MPI

    if leaders.rank != 0:
        text = json.dumps(asdict(own)).encode()[:_REPORT_BYTES]
        sent = leaders.Isend([text, MPI.BYTE], dest=0, tag=_REPORT_TAG)
        wait(sent, 0, "taken this node's report", patience)
        return []
    reports = [own]
    expected = []
    for rank in range(1, leaders.size):
        buffer = bytearray(_REPORT_BYTES)
        expected.append(
            (rank, buffer, leaders.Irecv([buffer, MPI.BYTE], source=rank, tag=_REPORT_TAG))
        )
    for rank, buffer, request in expected:
        wait(request, rank, "said how it went", patience)
        reports.append(Report(**json.loads(bytes(buffer).rstrip(b"\0"))))
    return reports


def _hear(world: Any, code: int) -> int:
    """Rank 0's exit code, on all; they doze until then, since cores may be wanted."""
    from mpi4py import MPI

    told = bytearray([code])
    wait(world.Ibcast([told, MPI.BYTE], root=0), 0, "ended", inf)
    return told[0]


def _shown(archive: Path) -> Iterator[bytes]:
    """The archive's chunks, with a line every few seconds of how far it is."""
    size = archive.stat().st_size
    done, started = 0, time.perf_counter()
    shown = started
    with archive.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk
            done += len(chunk)
            now = time.perf_counter()
            if now - shown > _SHOW_SECONDS:
                shown = now
                rate = done / 2**20 / (now - started)
                print(
                    f"{done / 2**20:,.0f} of {size / 2**20:,.0f} MiB, {rate:,.0f} MiB/s",
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
        lines.append(f". {order.target}/bin/activate    # hash {order.total[:12]}")
    return "\n".join(lines)


@contextmanager
def _within(seconds: float, what: str) -> Iterator[None]:
    """End this process, and with it the job, where a part that cannot be polled takes too long."""

    def end() -> None:
        print(
            f"largebatch env spread: {what} after {seconds:g} s: look for a rank that has died or "
            "stands still; nothing was changed",
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


def _words(error: BaseException) -> str:
    """An error in words, cut to what a report holds."""
    name = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    strerror = getattr(error, "strerror", None)
    return f"{name}{strerror or error}"[:1000]
