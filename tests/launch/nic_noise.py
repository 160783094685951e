"""Records of nodes with the noise of a healthy machine, and with trouble where a test wants it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from largebatch.launch.diagnose.nic.record import NodeRecord

BEGIN = 1_750_000_000.0
EVERY = 10.0
MEAN_RATES = {
    "hni_tx_paused_0": 2e7,
    "hni_tx_paused_1": 3e6,
    "hni_rx_paused_0": 5e6,
    "pct_retry_srb_requests": 0.3,
    "pct_no_trs_nacks": 0.5,
    "pct_sct_timeouts": 0.002,
    "hni_llr_tx_replay_event": 0.01,
    "parbs_tarb_pi_posted_pkts": 1e6,
    "parbs_tarb_pi_posted_blocked_cnt": 5e5,
}
Trouble = Callable[[int, dict[str, "np.ndarray[tuple[int], np.dtype[np.float64]]"]], None]


def healthy(
    seed: int, nodes: int = 20, samples: int = 90, trouble: Trouble | None = None
) -> list[NodeRecord]:
    """Rates vary between nodes by a third, and from sample to sample with a long tail."""
    drawn = np.random.default_rng(seed)
    records = []
    for node in range(nodes):
        lengths = EVERY + drawn.uniform(-0.05, 0.05, samples)
        moved = {}
        for name, rate in MEAN_RATES.items():
            level = rate * drawn.lognormal(0, 0.3)
            rates = level * drawn.lognormal(0, 0.5, samples)
            moved[f"cxi{node % 8}/{name}"] = drawn.poisson(rates * lengths).astype(float)
        if trouble is not None:
            trouble(node, moved)
        times = BEGIN + np.cumsum(lengths)
        names = sorted(moved)
        table = np.stack([moved[name] for name in names], axis=1)
        records.append(NodeRecord(f"x{node:04d}", times, lengths, names, table))
    return records


def write_records(folder: Path, records: list[NodeRecord]) -> None:
    """As the recorder would have written them."""
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        before = record.times[0] - record.lengths[0]
        lines: list[dict[str, Any]] = [
            {"nic": 1, "node": record.node, "time": before, "every": EVERY, "names": record.names},
            {"t": before, "v": [0] * len(record.names)},
        ]
        for now, row in zip(record.times, record.moved, strict=True):
            changed = [part for at in np.flatnonzero(row) for part in (int(at), int(row[at]))]
            lines.append({"t": now, "d": changed})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"nic-{record.node}.jsonl").write_text(text)
