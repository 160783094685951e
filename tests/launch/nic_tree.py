"""Fake Cassini telemetry: trees of counters, one a node, that a process keeps alive.

    python nic_tree.py ROOT NODES      counts until its standard input closes

A line on its standard input sets a rate: {"node": 2, "name": "hni_tx_paused_3", "rate": 8e8}.
"""

import json
import os
import select
import sys
import time
from pathlib import Path

INTERFACES = 2
PERIOD = 0.02

# Movements a second of each interface of a healthy node.
HEALTHY = {
    "hni_rx_paused_0": 1e6,
    "hni_tx_paused_0": 5e6,
    "hni_tx_paused_3": 2e6,
    "hni_pcs_good_cw": 4e7,
    "hni_pcs_corrected_cw": 20.0,
    "hni_pcs_uncorrected_cw": 0.0,
    "hni_sts_tx_ok_octets": 2e10,
    "lpe_net_match_priority_0": 1e5,
    "parbs_tarb_pi_posted_blocked_cnt": 2e4,
    "parbs_tarb_pi_posted_pkts": 1e5,
    "pct_no_trs_nacks": 0.0,
    "pct_retry_srb_requests": 0.0,
    "pct_sct_timeouts": 0.0,
}
HANDLER = {"nack_no_matching_conn": 0.0, "spt_timeouts": 0.0, "trs_in_use": 0.0}


def root_of(tree: Path, node: int) -> Path:
    return tree / f"node{node}"


def write(path: Path, value: int, now: float) -> None:
    """As the kernel shows it: all of it at once."""
    text = f"{value}\n" if "run/cxi" in str(path) else f"{value}@{now:.9f}\n"
    draft = path.parent.parent / f".{path.name}"
    draft.write_text(text)
    os.replace(draft, path)


def plant(root: Path, interfaces: int = INTERFACES) -> dict[tuple[int, str], Path]:
    """The tree of one node, every counter at 1000; the path of each by (interface, name)."""
    paths = {}
    for index in range(interfaces):
        telemetry = root / f"sys/class/cxi/cxi{index}/device/telemetry"
        handler = root / f"run/cxi/cxi{index}"
        for folder in (telemetry, handler):
            folder.mkdir(parents=True)
        (telemetry / "ALL-in-binary").write_bytes(b"\x00\xff" * 100)
        for folder, names in ((telemetry, HEALTHY), (handler, HANDLER)):
            for name in names:
                paths[index, name] = folder / name
                write(folder / name, 1000, time.time())
    return paths


def live(tree: Path, nodes: int) -> None:
    paths = [plant(root_of(tree, node)) for node in range(nodes)]
    rates = [dict(HEALTHY) | HANDLER for _ in range(nodes)]
    values = [dict.fromkeys(of, 1000.0) for of in paths]
    print("alive", flush=True)
    last = time.time()
    while True:
        if select.select([sys.stdin], [], [], PERIOD)[0]:
            text = sys.stdin.readline()
            if not text:
                return
            order = json.loads(text)
            rates[order["node"]][order["name"]] = order["rate"]
        now = time.time()
        for of, held, rate in zip(paths, values, rates, strict=True):
            for key, path in of.items():
                held[key] += rate[key[1]] * (now - last)
                if rate[key[1]]:
                    write(path, int(held[key]), now)
        last = now


if __name__ == "__main__":
    live(Path(sys.argv[1]), int(sys.argv[2]))
