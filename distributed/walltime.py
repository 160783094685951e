"""When this job ends, by what PBS, Slurm or the user says, and when a run stops for it. Imports no
torch.
"""

import json
import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

JOB_END: Final = "LARGEBATCH_JOB_END"
"""Seconds since the epoch, exported by the scripts of `largebatch submit`. Empty: whoever has
started this process ends it in time, as a sweep does its trials.
"""


@dataclass(frozen=True)
class Stop:
    """`at`: seconds since the epoch."""

    at: float
    why: str


def find_stop(
    stop_at: float | None, before_end: float, environment: Mapping[str, str] = os.environ
) -> Stop | None:
    """When a run that begins now is to stop; None: when it has ended.

    Args:
        stop_at: seconds since the epoch, where the user has said it.
        before_end: seconds between the stop and the job's end; of a run that begins late, no more
            than a quarter of the time that is left.
    """
    stops = [] if stop_at is None else [Stop(stop_at, f"stop_at={time_of_day(stop_at)} has come")]
    end, now = end_of_job(None, environment), time.time()
    if end is not None and end > now:  # one that has gone by is not this job's
        before = min(before_end, (end - now) / 4)
        stops.append(
            Stop(end - before, f"{before:.0f} s before its job's end at {time_of_day(end)}")
        )
    return min(stops, key=lambda stop: stop.at, default=None)


def time_of_day(moment: float) -> str:
    """A time of day for people, in this machine's zone."""
    return datetime.fromtimestamp(moment).astimezone().isoformat(timespec="seconds")


def end_of_job(walltime: int | None, environment: Mapping[str, str] = os.environ) -> float | None:
    """Seconds since the epoch at which the job is killed; None where nobody says.

    Args:
        walltime: seconds from now, where the user has said it.
    """
    if walltime is not None:
        return time.time() + walltime
    if JOB_END in environment:
        return float(environment[JOB_END]) if environment[JOB_END] else None
    if "SLURM_JOB_END_TIME" in environment:  # Slurm 23.02 and later
        return float(environment["SLURM_JOB_END_TIME"])
    if "SLURM_JOB_ID" in environment:
        return _asked_of_slurm(environment["SLURM_JOB_ID"])
    if "PBS_WALLTIME" in environment:
        # How long the job is, and not when it began; inferred: the file of nodes is written then.
        nodefile = Path(environment.get("PBS_NODEFILE", ""))
        begin = nodefile.stat().st_mtime if nodefile.is_file() else time.time()
        return begin + float(environment["PBS_WALLTIME"])
    if "PBS_JOBID" in environment:
        return _asked_of_pbs(environment["PBS_JOBID"])
    return None


def _asked_of_slurm(job: str) -> float | None:
    ask = ["squeue", "--noheader", "--format=%e", f"--jobs={job}"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=60)
        return datetime.fromisoformat(done.stdout.strip()).timestamp()
    except (OSError, ValueError, subprocess.TimeoutExpired):  # no answer, or none there is
        return None


def _asked_of_pbs(job: str) -> float | None:
    ask = ["qstat", "-f", "-F", "json", job]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=60)
        (about,) = json.loads(done.stdout)["Jobs"].values()
        begin = datetime.strptime(about["stime"], "%a %b %d %H:%M:%S %Y").timestamp()
        hours, minutes, seconds = map(int, about["Resource_List"]["walltime"].split(":"))
    except (OSError, ValueError, KeyError, TypeError, subprocess.TimeoutExpired):
        return None
    return begin + 3600 * hours + 60 * minutes + seconds
