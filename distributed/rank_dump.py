"""Where every rank stands, on demand: its Python stacks and its last collectives.

A rank that waits in a collective cannot be asked by a collective, nor made to leave by a signal:
Python's handlers wait for the main thread. So a thread of its own looks, now and then, for the file
`watch/request` in the run's folder. `answer NAME` asks for a file `rank-N.json` in `watch/NAME`,
`leave NAME` ends the process. Nothing is written before, and what was asked before the process
began is not for it.

The collectives are those of torch's Flight Recorders; each keeps the last
`TORCH_FR_BUFFER_SIZE`: XCCL and NCCL have one of their own beside the general one, which is gloo's
(private names of torch's: where they are missing, the answer says so). With gloo each of them is
"scheduled" for ever, and `retired` once it is done; `launch/watch/flight_recorder.py` compares
ranks.

SIGUSR1 prints the stacks to standard error, also those of a process whose Python hangs: that
is C code in a signal handler, the thread here needs Python's lock.
"""

import faulthandler
import json
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_stack
from typing import Any, Final

from largebatch.common.files import write_whole
from largebatch.records.names import REQUEST, WATCH

LEFT: Final = 124
"""Exit code of a rank that was asked to leave, as of a command whose time was over."""

KEPT: Final = 32
"""Collectives of an answer, for each process group: answers of 98,304 ranks are read together."""

_LOOKS_PER_SECOND: Final = 10_000
"""Of all ranks together: each is a question to one server of the file system."""


@contextmanager
def answering(folder: Path, rank: int, size: int) -> Iterator[None]:
    """Within it, this rank answers requests in a run's folder, and SIGUSR1.

    Enter it as soon as the folder is known, before the process group: a rank may hang in its first
    collective, and the Flight Recorder reads its size then.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    done = threading.Event()
    period = seconds_between_looks(size)
    heeded = request_in(folder)

    def look() -> None:
        nonlocal heeded
        while not done.wait(period):
            request = request_in(folder)
            if request is None or request == heeded:
                continue
            verb, _, name = request.partition(" ")
            if verb == "leave":
                os._exit(LEFT)  # whatever the main thread is in
            try:
                answer = folder / WATCH / Path(name).name / f"rank-{rank}.json"
                write_whole(answer, json.dumps(where_it_stands(rank, size)) + "\n", False)
                heeded = request
            except OSError:  # a full disk, say: the run continues
                continue

    threading.Thread(target=look, name="watch", daemon=True).start()
    registered = print_stacks_on_signal()
    try:
        yield
    finally:
        done.set()
        if registered:
            faulthandler.unregister(signal.SIGUSR1)


def request_in(folder: Path) -> str | None:
    """What the ranks of a run are asked, in two words; None where they are not."""
    try:
        return (folder / WATCH / REQUEST).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def seconds_between_looks(size: int) -> float:
    """How often a rank in a world of `size` looks for a request."""
    return max(1.0, size / _LOOKS_PER_SECOND)


def print_stacks_on_signal() -> bool:
    """Let SIGUSR1 print all threads' stacks; False where that is not to be had.

    A handler of the user's own stays.
    """
    if signal.getsignal(signal.SIGUSR1) is not signal.SIG_DFL or sys.__stderr__ is None:
        return False
    try:
        faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)
    except (OSError, ValueError):  # a standard error that is no file, or is closed
        return False
    return True


def where_it_stands(rank: int, size: int) -> dict[str, Any]:
    """This process's stacks and collectives, in plain values."""
    return {
        "rank": rank,
        "size": size,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": time.time(),
        "threads": stacks(),
        **flight_record(),
    }


def stacks() -> list[dict[str, Any]]:
    """Each thread's name and its calls as [file, line, function], the innermost last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    own = threading.get_ident()
    found = []
    for ident, frame in sys._current_frames().items():
        if ident == own:
            continue
        # Without their text: thousands of ranks would read the same files at once.
        calls = [
            [call.f_code.co_filename, line, call.f_code.co_name] for call, line in walk_stack(frame)
        ]
        found.append({"name": names.get(ident, str(ident)), "calls": calls[::-1]})
    return sorted(found, key=lambda thread: thread["name"] != "MainThread")


def flight_record() -> dict[str, Any]:
    """The last collectives of each process group; or what keeps us from knowing, in `trouble`."""
    record: dict[str, Any] = {"collectives": [], "groups": {}, "is_whole": False, "trouble": None}
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available():
        return record | {"trouble": "torch.distributed is not loaded"}
    try:
        recorders = recorded(torch._C._distributed_c10d)
        record["groups"] = process_groups(torch)
        record["collectives"] = [last for entries in recorders for last in last_of_each(entries)]
        record["is_whole"] = all(
            not entries or any(entry["record_id"] == 0 for entry in entries)
            for entries in recorders
        )
    except Exception as error:  # private names may do anything in another version
        trouble = f"no Flight Recorder in this torch: {type(error).__name__}: {error}"
        return record | {"trouble": trouble}
    if not record["collectives"] and torch.distributed.is_initialized():
        record["trouble"] = "the Flight Recorder is empty: is TORCH_FR_BUFFER_SIZE 0?"
    return record


_RECORDERS: Final = ("_dump_xccl_trace", "_dump_nccl_trace", "_dump_fr_trace")


def recorded(names: Any) -> list[list[dict[str, Any]]]:
    """The entries of every Flight Recorder among `names` (`torch._C._distributed_c10d`).

    Raises:
        AttributeError: it has none.
        Exception: whatever a recorder raises, where none can be read.
    """
    found: list[list[dict[str, Any]]] = []
    error: Exception = AttributeError(f"none of {', '.join(_RECORDERS)}")
    for name in _RECORDERS:
        if (dump := getattr(names, name, None)) is None:
            continue
        try:
            found.append(pickle.loads(dump(includeStackTraces=False)).get("entries", []))
        except Exception as raised:  # the others may be readable
            error = raised
    if not found:
        raise error
    return found


_FIELDS: Final = (
    "process_group", "collective_seq_id", "is_p2p", "profiling_name", "state", "retired",
    "input_sizes",
)  # fmt: skip


def last_of_each(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last `KEPT` entries of each process group, in their order, with what is compared."""
    kept: list[dict[str, Any]] = []
    num_of: dict[tuple[Any, ...], int] = {}
    for entry in reversed(entries):
        key = (*entry["process_group"], entry["profiling_name"].partition(":")[0])
        num_of[key] = num_of.get(key, 0) + 1
        if num_of[key] <= KEPT:
            kept.append({name: entry.get(name) for name in _FIELDS})
    return kept[::-1]


def process_groups(torch: Any) -> dict[str, Any]:
    """The ranks of the groups that this one is in, as [start, stop, step] where that says it all.

    Gloo's entries do not tell them, and a list of all ranks in the answer of each would be
    quadratic.
    """
    world = getattr(torch.distributed.distributed_c10d, "_world", None)
    names = dict(getattr(world, "pg_names", {}))
    found: dict[str, Any] = {}
    for group, name in names.items():
        ranks = torch.distributed.get_process_group_ranks(group)
        step = ranks[1] - ranks[0] if len(ranks) > 1 else 1
        even = step > 0 and ranks == list(range(ranks[0], ranks[-1] + 1, step))
        found[name] = {"range": [ranks[0], ranks[-1] + 1, step]} if even else {"ranks": ranks}
    return found
