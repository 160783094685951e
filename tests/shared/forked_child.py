"""Stands in for Python in what a fork starts itself (ranks, workers): asks the server for a fork,
and is to its parent what that fork is: streams, exit code, signals both ways.

It begins in milliseconds, as it imports next to nothing; forked.py writes it beside the sockets.
"""

import os
import pickle
import select
import signal
import socket
import sys

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


def main() -> None:
    parent = os.getppid()
    numbers = sorted(int(name) for name in os.listdir("/proc/self/fd"))
    numbers = [number for number in numbers if os.path.exists(f"/proc/self/fd/{number}")]
    environment = dict(os.environ)
    watched = environment.get("LARGEBATCH_PARENT") == str(parent)
    message = pickle.dumps(
        {
            "words": sys.argv[2:]
            if sys.argv[1:2] == ["-u"]
            else sys.argv[1:],  # as torchrun has it
            "call": None,
            "path": [],
            "cwd": os.getcwd(),
            "env": environment,
            "session": os.getpgrp() == os.getpid(),
            "numbers": numbers,
            "watched": watched,
            "children": True,
        }
    )
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.connect(os.path.join(os.path.dirname(os.path.abspath(__file__)), "server"))
    socket.send_fds(server, [len(message).to_bytes(8, "little")], numbers)
    server.sendall(message)
    pid = _told(server)
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: os.kill(pid, number))
    while not select.select([server], [], [], 0.1)[0]:
        if os.getppid() != parent and watched:
            return  # whereupon the server ends the fork
    status = _told(server)
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) in PASSED_ON:
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


def _told(server: socket.socket) -> int:
    """A number as multiprocessing's Connection sends it: four bytes of length, then eight."""
    message = server.recv(12, socket.MSG_WAITALL)
    if len(message) < 12:
        os._exit(1)
    return int.from_bytes(message[4:], "little")


if __name__ == "__main__":
    main()
