"""Runs of `largebatch train` on the rehearsal's device, in processes of their own."""

import faulthandler
import gc
import json
import os
import shutil
import socket
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from forked import Popen, all_ended
from hydra._internal.hydra import Hydra
from hydra.types import RunMode
from rehearsal_log import Counts, log
from torch.optim.optimizer import register_optimizer_step_post_hook

Outcome = dict[str, Any]

LONGEST = 1100
"""Seconds that all runs of a process may take: then it says where it was, and ends."""


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        words: the command line after `train`.
        limit: bytes of the device's memory beyond what it holds already; None: plenty.
        folder: where it lies; None: under its name. Another run's: it goes on from all but that
            one's last checkpoint, as if it had been killed at its end.
    """

    name: str
    words: tuple[str, ...]
    limit: int | None = None
    folder: str | None = None


@dataclass(frozen=True)
class Step:
    """What one step of the optimizer, and what led to it, has made the host do."""

    waits: Counts
    events: Counts
    uploads: Counts
    hosted: Counts


@dataclass
class Recorder:
    """Counts at each step of an optimizer, and the optimizer itself."""

    steps: list[Step] = field(default_factory=list)
    optimizer: torch.optim.Optimizer | None = None
    _before: dict[str, Counts] = field(default_factory=log.counts)

    def __call__(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        now = log.counts()
        since = {name: Counter(now[name] - self._before[name]) for name in now}
        self.steps.append(Step(**since))
        self.optimizer, self._before = optimizer, now

    def weights(self) -> list[torch.Tensor]:
        """What this rank holds of them, on the CPU."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        params = [param.detach() for group in groups for param in group["params"]]
        held = [p.to_local() if hasattr(p, "to_local") else p for p in params]
        return [weight.to("cpu") for weight in held]


def rehearse(
    runs: Sequence[Run],
    folder: Path,
    *,
    like: str = "xpu",
    world_size: int = 1,
    steps: Sequence[str] = (),
) -> list[dict[str, Outcome]]:
    """What each rank has found in each run, by its name, all in one process a rank.

    Of several ranks a process makes one run.

    Args:
        like: as for `rehearsal_device.install`.
        steps: rows of `rehearsal_steps` whose differences to the CPU are found under "steps".
    """
    folder.mkdir(exist_ok=True)
    own = Path(tempfile.mkdtemp(dir=folder))
    ranks = []
    port = _free_port()
    for rank in range(world_size):
        with (own / f"said{rank}").open("w") as said:
            call = partial(_as_rank, rank, world_size, port, runs, folder, own, like, steps)
            ranks.append(Popen(call, children=False, stdout=said, stderr=said))
    failed = all_ended(ranks)
    said = [(own / f"said{rank}").read_text()[-4000:] for rank in range(world_size)]
    assert failed is None, f"rank {failed} of {[run.name for run in runs]}: {said}"
    return [torch.load(own / f"rank{rank}.pt", weights_only=False) for rank in range(world_size)]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _as_rank(
    rank: int,
    size: int,
    port: int,
    runs: Sequence[Run],
    folder: Path,
    own: Path,
    like: str,
    steps: Sequence[str],
) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(LONGEST, exit=True)
    sys.argv = ["largebatch"]
    os.environ.update(OMP_NUM_THREADS="1", HYDRA_FULL_ERROR="1", ZE_AFFINITY_MASK=str(rank))
    if size > 1:
        assert len(runs) == 1, "a process knows its ranks for good, and where they have met"
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
        os.environ.update(LOCAL_WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(port)
    import rehearsal_device
    import rehearsal_group

    rehearsal_device.install(like)
    if like == "cuda":  # a device that has decompositions of its own
        from largebatch.optim.math import decompositions

        ours = rehearsal_device.NAME
        decompositions.DECOMPOSE = decompositions.DECOMPOSE | {ours}  # type: ignore[misc]
    rehearsal_group.install()
    _compose_cheaply()
    sys.path.append(str(Path(__file__).parents[1] / "train"))  # where guarded_tasks is
    outcomes: dict[str, Any] = {run.name: trained(run, folder) for run in runs}
    if steps:
        from rehearsal_steps import largest_difference

        outcomes["steps"] = {name: largest_difference(name) for name in steps}
    torch.save(outcomes, own / f"rank{rank}.pt")
    faulthandler.cancel_dump_traceback_later()


def _compose_cheaply() -> None:
    """Each run composed once: Hydra would do it again, to see whether it is many runs."""
    Hydra.get_mode = lambda self, config_name, overrides: RunMode.RUN  # type: ignore[method-assign]


def trained(run: Run, folder: Path) -> Outcome:
    """One run in this process: exit code, record, weights, counts by step; or its traceback."""
    from largebatch.train import command

    os.chdir(folder)
    where = folder / (run.folder or run.name)
    is_first = os.environ.get("RANK", "0") == "0"
    if run.folder is not None and is_first:
        (where / "summary.json").unlink()
        shutil.rmtree(max((where / "checkpoints").iterdir()))
    recorder = Recorder()
    if run.limit is not None:
        gc.collect()  # what is left of other runs is not to be freed on the way
    log.limit = (1 << 40) if run.limit is None else log.allocated + run.limit
    log.peak = log.allocated
    hook = register_optimizer_step_post_hook(recorder)
    before = log.counts()
    # The device computes attention from its parts: so does a CPU that it is compared with.
    torch.backends.cuda.enable_flash_sdp("engine.device=cpu" not in run.words)
    try:
        code: int = command.main([*run.words, f"hydra.run.dir={where}"])
        peak = log.peak - log.allocated
        record = read(where) if is_first else {}
    except BaseException:
        return {"error": traceback.format_exc()}
    finally:
        hook.remove()
        torch.backends.cuda.enable_flash_sdp(True)
        log.limit = 1 << 40
    return {
        "code": code,
        **record,
        "steps": recorder.steps,
        "whole": {name: counts - before[name] for name, counts in log.counts().items()},
        "weights": recorder.weights(),
        "peak": peak,
    }


def read(folder: Path) -> Mapping[str, Any]:
    """A run's record, as rank 0 has written it."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    summary = json.loads((folder / "summary.json").read_text())
    return {"lines": [json.loads(line) for line in lines], "summary": summary}
