"""All ranks of a run, from start to end: what rank 0 tells them, and a fault that ends all.

Whatever ends one rank, at any stage, ends every rank within seconds, with one exit code and one
message, that of the rank where it happened. No stage has a part of its own in this: each rank has a
thread that waits in the store, and a rank that cannot continue writes its fault there. The others
leave by themselves where they can. Where they cannot, because they wait in a collective for the
rank that is gone, their thread closes the record and ends the process.

What ranks tell one another is JSON: who reaches the store's port can write there, too.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Self

from largebatch.common import user_code
from largebatch.common.errors import ConfigError, RanksEnded, RanksRefused
from largebatch.common.text import say
from largebatch.distributed.launchers import marks_of
from largebatch.distributed.ranks import MEETING, Ranks, find_ranks, meet, started_ranks

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_POLL_SECONDS: Final = 0.02

SILENT_SECONDS: Final = 10.0
"""A rank that waits for others to begin says so after this."""
_GRACE_SECONDS: Final = 3.0
"""After another rank's fault: to leave what the main thread is in."""
_LEAVING_SECONDS: Final = 10.0
"""That ranks wait for one another's leaving."""
_COMING_SECONDS: Final = 60.0
"""That rank 0 waits, its own part being over, for ranks that have not come yet."""


@cache
def find_team() -> "Team":
    """This process's team, which a launcher has started."""
    return Team(find_ranks())


@contextmanager
def started_team(nproc: int) -> Iterator["Team"]:
    """A team of `nproc` ranks on this node, started by this process, which is rank 0."""
    teams: list[Team] = []

    def died(rank: int, how: str) -> None:
        time.sleep(1.0)  # its own report says more
        for team in teams:
            team.report(f"rank {rank} {how}")

    with started_ranks(nproc, died) as ranks, Team(ranks) as team:
        teams.append(team)
        yield team


class Team:
    """One rank's side. Around everything a rank does; for a world of one it does nothing.

    An exception that leaves it is this rank's fault, and becomes that of all ranks: `RanksEnded`
    is raised in its place, on every rank.

    Args:
        name: what tells this team from others of the same processes.
    """

    def __init__(self, ranks: Ranks, name: str = "") -> None:
        self.ranks, self._name = ranks, name
        self._store: Store | None = None
        self._looking: threading.Thread | None = None
        self._fault: dict[str, Any] | None = None
        self._known = threading.Event()
        self._came = threading.Event()
        self._end = threading.Lock()
        """Of the main thread and the one that looks, who ends this rank."""
        self._closings: list[Callable[[RanksEnded], None]] = []
        self._ordered = False

    @property
    def store(self) -> "Store | None":
        """Where all have met; None in a world of one."""
        return self._store

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.ranks.size == 1 or error is None:
            self._came.set()
            if self.ranks.size > 1:
                self._end_well()
                self._stop_looking()
            return
        ended = self._ended_by(error)
        if self._store is not None:
            self._leave(self._store)
        self._stop_looking()
        raise ended from error

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Report a fault within it before what is around it is left: once a process group closes,
        the others see lost connections, and would report those first.
        """
        try:
            yield
        except BaseException as error:
            if self.ranks.size == 1:
                raise
            raise self._ended_by(error) from error

    def _ended_by(self, error: BaseException) -> RanksEnded:
        ended = self.cause(error)
        return ended if isinstance(ended, RanksEnded) else self._tell_fault(ended)

    # Before and while there is a run -------------------------------------------------------------

    def tell(self, value: Any = None) -> Any:
        """Rank 0's `value`, which JSON holds, on every rank, once all have it.

        Raises:
            RanksEnded: another rank cannot continue, or there is nothing to do (exit code 0).
            ConfigError: a rank has not come.
        """
        if self.ranks.size == 1:
            return value
        if not self.ranks.is_first:
            with self._notice():
                store = self._meet()
                store.wait(["order"], MEETING)
            order = json.loads(store.get("order"))
            store.add("heard", 1)
            if "value" in order:
                return order["value"]
            self._stop_looking()
            raise self._ended()
        store = self._meet()
        store.compare_set("order", "", json.dumps({"value": value}))
        self._ordered = True
        self._await_all(store)
        return value

    @contextmanager
    def closing(self, close: Callable[[RanksEnded], None]) -> Iterator[None]:
        """Within it, `close` is called where another rank's fault ends this process in whatever the
        main thread is in.
        """
        self._closings.append(close)
        try:
            yield
        finally:
            self._closings.remove(close)

    def cause(self, error: BaseException) -> BaseException:
        """What has ended this rank: `error`, or the other rank's fault that it follows from. From
        now on the main thread ends this rank.
        """
        if self.ranks.size == 1 or isinstance(error, RanksEnded):
            self._come()
            return error
        if self._store is not None and not isinstance(error, (ConfigError, KeyboardInterrupt)):
            self._known.wait(2.0)  # a connection that is lost is seen sooner than its reason is
        self._come()
        return self._ended() if self._known.is_set() else error

    def report(self, message: str) -> None:
        """The fault of a rank that can no longer tell it, by rank 0."""
        deadline = time.monotonic() + 60
        while self._store is None and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)  # the main thread is on its way there
        if self._store is not None:
            self._publish(self._store, f"largebatch: {message}", {"message": message, "code": 1})

    # Meeting -------------------------------------------------------------------------------------

    def _meet(self) -> "Store":
        if self._store is None:
            store = meet(self.ranks, name=self._name)
            assert store is not None
            if not self.ranks.is_first and store.add(f"here/{self.ranks.rank}", 1) > 1:
                raise ConfigError(
                    f"another process is rank {self.ranks.rank} of the run at {self._place()} "
                    f"already: choose another MASTER_PORT; {self._alone()}"
                )
            self._store = store
            connection = store.clone()  # type: ignore[attr-defined] # torch's stubs lack it
            self._looking = threading.Thread(
                target=self._look, args=(connection,), name="team", daemon=True
            )
            self._looking.start()
        return self._store

    def _await_all(self, store: "Store") -> None:
        begun, said = time.monotonic(), False
        while store.add("heard", 0) < self.ranks.size - 1:
            if self._known.is_set():
                raise self._ended()
            waited = time.monotonic() - begun
            if waited > MEETING.total_seconds():
                raise ConfigError(f"{self._missing(store)} not arrived at {self._place()} in time")
            if waited > SILENT_SECONDS and not said:
                said = True
                self._say(f"{self._missing(store)} not yet arrived at {self._place()}")
            time.sleep(_POLL_SECONDS)

    def _missing(self, store: "Store") -> str:
        size = self.ranks.size
        missing = [rank for rank in range(1, size) if not store.check([f"here/{rank}"])]
        named = ", ".join(map(str, missing[:8])) + ", …" * (len(missing) > 8)
        return (
            f"rank{'s' * (len(missing) > 1)} {named} of {size} ha{'ve' * (len(missing) > 1) or 's'}"
        )

    @contextmanager
    def _notice(self) -> Iterator[None]:
        """Say after a while that rank 0 is waited for."""
        what = f"rank {self.ranks.rank} of {self.ranks.size} waits for rank 0 at {self._place()}"
        timer = threading.Timer(SILENT_SECONDS, self._say, [what])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _say(self, what: str) -> None:
        say(f"{what}; {self._alone()}")

    def _place(self) -> str:
        return f"{self.ranks.master_addr}:{self.ranks.master_port}"

    def _alone(self) -> str:
        marks = marks_of(self.ranks.launcher)
        if not marks:
            return "if one rank is meant, leave engine.nproc at 1"
        return f"if one rank is meant, `unset {' '.join(marks)}`, which a launcher sets"

    # Ending --------------------------------------------------------------------------------------

    def _look(self, store: "Store") -> None:
        """Wait for a fault of any rank, and end this one where its main thread does not."""
        try:
            store.wait(["fault"], timedelta(days=365))
            fault = json.loads(store.get("fault"))
        except RuntimeError:  # rank 0 is gone, and the store with it
            return
        if fault is None:  # the run has ended
            if not self.ranks.is_first:
                store.add("left", 1)
            return
        self._fault = fault
        self._known.set()
        # A parent sees its children go and so comes out of what it is in; a launcher ends all ranks
        # when one goes, so that there all have to go at once.
        grace = 5 * _GRACE_SECONDS if self._is_parent else _GRACE_SECONDS
        if self._came.wait(grace) or not self._end.acquire(blocking=False):
            return
        for close in reversed(self._closings):
            with suppress(Exception):  # there is nobody left to tell
                close(self._ended())
        with suppress(RuntimeError):
            self._leave(store)
        os._exit(fault["code"])

    def _come(self) -> None:
        if not self._came.is_set():
            if not self._end.acquire(blocking=False):
                time.sleep(3600)  # the other thread ends this process
            self._came.set()

    def _ended(self) -> RanksEnded:
        if self._fault is None:
            return RanksEnded("there is nothing to do", 0)
        code = self._fault["code"]
        return (RanksRefused if code == 2 else RanksEnded)(self._fault["message"], code)

    def _tell_fault(self, error: BaseException) -> RanksEnded:
        """Tell this rank's fault, on stderr and to all ranks; returns what it, or an earlier one of
        another rank, comes to.
        """
        where = f"rank {self.ranks.rank} on {socket.gethostname()}: " * (not self.ranks.is_first)
        code, message = 1, f"{where}{type(error).__name__}: {error}"
        of_user = isinstance(error, Exception) and user_code.of_user(error)
        shown = f"{of_user or ''.join(traceback.format_exception(error))}\nlargebatch: {message}"
        if isinstance(error, ConfigError):
            code, message = 2, f"{where}{error}"
            shown = f"largebatch: {message}"
        elif isinstance(error, SystemExit):
            code, shown = error.code if isinstance(error.code, int) else 1, ""
        elif isinstance(error, KeyboardInterrupt):
            code, shown = 130, ""
        fault = {"message": message, "code": code}
        if self._store is None:  # the others may never hear it
            print(shown, file=sys.stderr, flush=True)
            shown = ""
        if not self.ranks.is_first:
            self._known.wait(0.5)  # of a fault that all ranks have, rank 0 tells
        with suppress(ConfigError, RuntimeError, OSError):  # no store: a launcher sees to the rest
            self._publish(self._meet(), shown, fault)
            self._known.wait(_LEAVING_SECONDS)
        self._fault = self._fault or fault
        return self._ended()

    @staticmethod
    def _publish(store: "Store", shown: str, fault: dict[str, Any]) -> None:
        """Show and write a fault, if it is the first: launchers end all ranks when one leaves, so
        it is shown before anyone hears of it.
        """
        if store.add("faults", 1) > 1:
            return
        if shown:
            print(shown, file=sys.stderr, flush=True)
        store.set("fault", json.dumps(fault))
        store.compare_set("order", "", json.dumps({"fault": True}))

    def _end_well(self) -> None:
        """Leave together: the store ends with rank 0, whose part is done last."""
        if not self.ranks.is_first:
            if self._looking is not None:
                self._looking.join()
            return
        with suppress(ConfigError, RuntimeError):
            store = self._meet()
            store.compare_set("order", "", "{}")
            store.compare_set("fault", "", "null")
            self._await(store, "left", _LEAVING_SECONDS if self._ordered else _COMING_SECONDS)

    def _stop_looking(self) -> None:
        """Wait until the looking thread is out of the store: an interpreter that shuts down while a
        thread is in torch's code aborts the process (SIGABRT) when that thread comes back.
        """
        if self._looking is not None:
            self._looking.join(_LEAVING_SECONDS)

    def _leave(self, store: "Store") -> None:
        """After a fault. Launchers end all ranks as soon as one has left, so rank 0 closes its
        record first; the store ends with rank 0, so it leaves last. A parent ends its children.
        """
        if self._is_parent:
            return
        if self.ranks.is_first:
            store.set("closed", "")
            self._await(store, "left", _LEAVING_SECONDS if self._ordered else _COMING_SECONDS)
            return
        if self._fault is None:  # there was nothing to do
            return
        with suppress(RuntimeError):
            if self.ranks.launcher != "nproc":
                store.wait(["closed"], timedelta(seconds=_LEAVING_SECONDS))
            store.add("left", 1)

    def _await(self, store: "Store", counter: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while store.add(counter, 0) < self.ranks.size - 1 and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    @property
    def _is_parent(self) -> bool:
        return self.ranks.is_first and self.ranks.launcher == "nproc"
