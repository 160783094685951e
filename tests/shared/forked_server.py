"""The server behind forked.py: `python forked_server.py SOCKET OWNER`."""

import atexit
import builtins
import contextlib
import ctypes
import fcntl
import gc
import importlib
import importlib.util
import os
import pickle
import runpy
import select
import signal
import socket
import sys
import threading
import weakref
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import composed_once
import copied_plainly
import parsed_once
from processes import is_running

# What commands and ranks import, and what torch and DeepSpeed import late, where they are there.
PRELOADED = (
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.tensor.debug",
    "torch.distributed.tensor.parallel",
    "torch.nn.parallel",
    "torch.utils.flop_counter",
    "torch.utils.serialization.config",
    "pydantic",
    "hydra",
    "hydra._internal.hydra",
    "scipy.stats",
    "matplotlib.figure",
    "rich.progress",
    "joblib.externals.loky.process_executor",
    "rich._emoji_codes",
    "largebatch.cli",
    "largebatch.common.progress",
    "largebatch.distributed.mailbox",
    "largebatch.distributed.rank_dump",
    "largebatch.launch.doctor.preflight.command",
    "largebatch.launch.jobs.submit",
    "largebatch.train.checkpoints.saving",
    "largebatch.train.command",
    "largebatch.train.engines.ddp",
    "largebatch.train.engines.fsdp",
    "largebatch.train.reporting.display",
    "largebatch.train.run",
    "largebatch.train.sweep_command",
    "largebatch.train.tasks.bytes",
    "largebatch.train.tasks.digits",
    "largebatch.train.tasks.text",
    "largebatch.study.report",
)

WARMED = (
    [],
    ["task=digits", "optim=sgd", "optim.lr=0.1", "batch.size=64", "budget.samples=1e4", "seed=1",
     "target.loss=null", "hydra.run.dir=runs/a_b-1", "evaluation.growth=100", "+task.new={a: [1]}"],
)  # fmt: skip

LARGE_PAGE, MADV_COLLAPSE = 2 << 20, 25  # of Linux 6.1 and later

Request = dict[str, Any]


def main() -> None:
    """Serve until the owner is gone; in a child, become what was asked for."""
    path, owner = Path(sys.argv[1]), int(sys.argv[2])
    importable = os.environ.get("PYTHONPATH", "").split(":")
    base = [entry for entry in sys.path[1:] if entry not in importable]
    for name in PRELOADED:
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)
    copied_plainly.set_up()
    parsed_once.set_up()
    parsed_once.parse_ahead()
    composed_once.set_up(path.parent)
    warm()
    assert threading.active_count() == 1
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose threads"
    # What the imports have to take down at the end, a fork need not: operators taken off torch's
    # table one by one copied 30 MB, and took three quarters of a fork that did nothing else.
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False
    gc.collect()
    gc.freeze()
    gather_pages()
    request = serve(path, owner)
    if request is not None:
        end(run(request, base))


def warm() -> None:
    """Do what the first command of a process does beside its own work: find plugins, learn
    grammars, make schemas of types, read the text of task=bytes and the images of task=digits.
    """
    from hydra import compose, initialize_config_module

    from largebatch.conf.config import typed
    from largebatch.train.tasks.digits import Digits
    from largebatch.train.tasks.package_text import package_text

    with initialize_config_module("largebatch.conf", version_base="1.3"):
        for words in WARMED:
            typed(compose("train", words))
    for num_bytes in (65_536, 2_000_000):
        package_text(num_bytes)
    Digits()


def gather_pages() -> None:
    """Ask the kernel to put this memory into large pages, where it has any and can.

    Of the 33 ms of processor time that a fork took which did nothing, 19 went into copying the
    table of small ones and taking it down.
    """
    madvise = ctypes.CDLL(None).madvise
    for line in Path("/proc/self/maps").read_text().splitlines():
        where, rights, _, _, _, *name = line.split()
        if rights == "rw-p" and name in ([], ["[heap]"]):
            first, last = (int(address, 16) for address in where.split("-"))
            first, last = -(-first // LARGE_PAGE) * LARGE_PAGE, last // LARGE_PAGE * LARGE_PAGE
            if first < last:
                madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_COLLAPSE)


def run(request: Request, base: list[str]) -> int:
    """Become what was asked for; returns its exit code, as the interpreter would make it."""
    try:
        become(request, base)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return (stop.code or 0) & 0xFF
        print(stop.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        return -signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def end(code: int) -> None:
    """End as an interpreter does: threads, then what is registered, then the streams.

    It does not take its modules apart. In a fork that copies nearly every page of the server's
    memory, which took most of the time of a short command: 0.4 s.
    """
    if "mpi4py.MPI" in sys.modules:  # which finalizes MPI as the interpreter is taken down
        sys.exit(code)
    threading._shutdown()  # type: ignore[attr-defined] # what the interpreter itself begins with
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or with nobody at its other end
            stream.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def serve(path: Path, owner: int) -> Request | None:
    """Fork for each request; returns it in the child, None once the owner is gone."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(path.with_suffix(".new")))
    listening.listen(128)
    woken, waking = socket.socketpair()
    waking.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waking.fileno())
    path.with_suffix(".new").rename(path)
    children: dict[int, Connection] = {}
    while is_running(owner):
        ready, _, _ = select.select([listening, woken, *children.values()], [], [], 1)
        if woken in ready:
            woken.recv(4096)
        while (ended := _ended()) is not None:
            _tell(children.pop(ended[0]), ended[1])
        for child in [child for child, client in children.items() if client in ready]:
            os.kill(child, signal.SIGKILL)  # who asked for it is gone
        if listening in ready:
            client, _ = listening.accept()
            header, streams, _, _ = socket.recv_fds(client, 8, 253)
            message = client.recv(int.from_bytes(header, "little"), socket.MSG_WAITALL)
            child = os.fork()
            if child == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for opened in (listening, woken, waking, client, *children.values()):
                    opened.close()
                request: Request = pickle.loads(message)
                _place(streams, request["numbers"])
                return request
            for stream in streams:
                os.close(stream)
            children[child] = Connection(client.detach())
            _tell(children[child], child)
    path.unlink()
    return None


def _place(opened: list[int], numbers: list[int]) -> None:
    """Give what has come the numbers that it had there."""
    above = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 500) for number in opened]
    for number in opened:
        os.close(number)
    for number, target in zip(above, numbers, strict=True):
        os.dup2(number, target)
        os.close(number)


def _ended() -> tuple[int, int] | None:
    try:
        child, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (child, status) if child else None


def _tell(client: Connection, number: int) -> None:
    try:
        client.send_bytes(number.to_bytes(8, "little"))
    except OSError:  # it has not waited for this child
        client.close()


def become(request: Request, base: list[str]) -> None:
    """Run the module, or the call, as a process of its own would."""
    if request["session"]:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if request["watched"]:  # by the stand-in, in its parent's sight
        os.environ["LARGEBATCH_PARENT"] = str(os.getppid())
    if request["children"]:
        sys.executable = str(Path(sys.argv[1]).parent / "python")
    sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    if threads != 1:
        importlib.import_module("torch").set_num_threads(threads)
    if request["call"] is not None:
        sys.path[:] = request["path"]
        pickle.loads(request["call"])()
        return
    words = request["words"]
    importable = [entry for entry in os.environ.get("PYTHONPATH", "").split(":") if entry]
    sys.path[:] = [request["cwd"], *importable, *base]
    how, *words = words
    if how == "-m":
        sys.argv[:] = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    elif how == "-c":
        sys.argv[:] = ["-c", *words[1:]]
        exec(compile(words[0], "<string>", "exec"), _fresh_main())
    else:
        sys.path[0] = str(Path(how).resolve().parent)
        sys.argv[:] = [how, *words]
        code = compile(Path(how).read_text(), how, "exec")
        namespace = _fresh_main()
        namespace["__file__"] = how
        exec(code, namespace)


def _fresh_main() -> dict[str, Any]:
    """The namespace of a new `__main__`."""
    sys.modules["__main__"] = main = ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    return main.__dict__


if __name__ == "__main__":
    main()
