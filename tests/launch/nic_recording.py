"""Living trees and their recorders: one process for all trees, one thread that records."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nic_tree import root_of

from largebatch.launch.diagnose.nic.counters import IMPORTANT, list_counters
from largebatch.launch.diagnose.nic.record import Recorder

TREE = Path(__file__).with_name("nic_tree.py")


class Trees:
    """`nodes` trees below `folder` that count until the end of the context."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, TREE, folder, str(nodes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> "Trees":
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "alive\n"
        return self

    def set_rate(self, node: int, name: str, rate: float) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"node": node, "name": name, "rate": rate}) + "\n")
        self._process.stdin.flush()

    def __exit__(self, *exception: Any) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


@contextmanager
def recording(trees: Trees, out: Path, names: Sequence[str], every: float) -> Iterator[None]:
    """A recorder a node, under these names."""
    out.mkdir(parents=True)
    recorders = [
        Recorder(out / f"nic-{name}.jsonl", name, list_counters(root, IMPORTANT), every)
        for name, root in zip(names, (root_of(trees.folder, n) for n in range(99)), strict=False)
    ]
    done = threading.Event()

    def record() -> None:
        while not done.wait(every):
            for recorder in recorders:
                recorder.sample()

    thread = threading.Thread(target=record)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        for recorder in recorders:
            recorder.close()
