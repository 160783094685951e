"""Where ranks meet: an address of rank 0's node, and a port there that is taken at once."""

import ipaddress
import random
import socket
from typing import Final

from largebatch.conf.errors import ConfigError


def listen(addr: str, port: int, one_node: bool) -> socket.socket:
    """A socket that listens at `addr` and nowhere else; port 0: at any that is free.

    Raises:
        ConfigError: the address is not of this node, or the port is taken.
    """
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

    Raises:
        ConfigError: naming the address and this node.
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
