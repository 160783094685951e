"""Where ranks meet: an address of rank 0's node, and a port there that is taken at once."""

import ipaddress
import random
import socket
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from threading import Thread
from typing import Final, TypeVar

from largebatch.common.errors import ConfigError

Store = TypeVar("Store")


def listen(addr: str, port: int, one_node: bool) -> socket.socket:
    """A socket that listens at `addr` and nowhere else; port 0: at any that is free."""
    family, host = check_is_here(addr)
    # A node's name may mean itself within the node, where no other node comes in.
    if not one_node and ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        family, host = socket.AF_INET, ""
    try:
        return socket.create_server((host, port), family=family, backlog=4096)
    except OSError as error:
        raise ConfigError(
            f"port {port} at {addr}, where the ranks are to meet, cannot be had ({error.strerror}):"
            " another run meets there, or one that has not ended; choose another MASTER_PORT, or "
            "unset it where mpiexec starts the ranks"
        ) from error


def check_is_here(addr: str) -> tuple[socket.AddressFamily, str]:
    """Refuse, on rank 0, an address at which the others would not find it; returns its family and
    number.
    """
    way_out = (
        "MASTER_ADDR must be a name of rank 0's node; the suffix of the high-speed network is "
        "LARGEBATCH_HSN_SUFFIX, or cluster.hsn_suffix of largebatch submit"
    )
    try:
        found = socket.getaddrinfo(addr, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(
            f"the master address {addr} does not resolve on {socket.gethostname()} "
            f"({error.strerror}): {way_out}"
        ) from error
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind((address[0], 0))
            except OSError:
                continue
            return family, str(address[0])
    raise ConfigError(f"the master address {addr} is not of {socket.gethostname()}: {way_out}")


ANSWER_SECONDS: Final = 60.0
"""Within which a store that takes a connection says something; rank 0 listens just before."""


def answered(join: Callable[[], Store], address: tuple[str, int]) -> Store:
    """Return what `join` connects to at an address, waiting for it as long as `join` does.

    Raises:
        ConfigError: something listens there that takes connections and never answers, in which
            torch would wait for ever.
    """
    tries = [_begun(join)]
    while not (ended := wait(tries, ANSWER_SECONDS, FIRST_COMPLETED).done):
        if len(tries) > 1:
            addr, port = address
            raise ConfigError(
                f"what listens at {addr}:{port}, where the ranks are to meet, takes connections "
                f"and has not answered for {ANSWER_SECONDS:g} s: it is not rank 0's store; choose "
                "another MASTER_PORT, or unset it where mpiexec starts the ranks"
            )
        with suppress(OSError):
            socket.create_connection(address, ANSWER_SECONDS).close()
            # The first may be between two tries, which torch makes ever more rarely.
            tries.append(_begun(join))
    return ended.pop().result()


def _begun(join: Callable[[], Store]) -> Future[Store]:
    found: Future[Store] = Future()

    def connect() -> None:
        try:
            found.set_result(join())
        except BaseException as error:
            found.set_exception(error)

    Thread(target=connect, daemon=True).start()
    return found


# Below those that systems hand out for outgoing connections (32768 and up on Linux).
_PORTS: Final = range(20_000, 32_768)


def free_port() -> int:
    """A TCP port that is free, and that no outgoing connection is given before the store takes it,
    which may be seconds later: MPI opens some meanwhile.
    """
    # Not the generator that a user may have seeded: all runs would try the same ports.
    for port in (*random.SystemRandom().sample(_PORTS, 100), 0):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            found: int = probe.getsockname()[1]
            return found
    raise OSError("no TCP port is free")
