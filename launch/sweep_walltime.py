"""When this job ends: what PBS, Slurm or the user says."""

import os
import subprocess
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path


def end_of_job(walltime: int | None, environment: Mapping[str, str] = os.environ) -> float | None:
    """Seconds since the epoch at which the job is killed; None where nobody says.

    Args:
        walltime: seconds from now, where the user has said it.
    """
    if walltime is not None:
        return time.time() + walltime
    if "SLURM_JOB_END_TIME" in environment:  # Slurm 23.02 and later
        return float(environment["SLURM_JOB_END_TIME"])
    if "SLURM_JOB_ID" in environment:
        return _asked_of_slurm(environment["SLURM_JOB_ID"])
    if "PBS_WALLTIME" in environment:
        return _begin_of_pbs_job(environment) + float(environment["PBS_WALLTIME"])
    return None


def _asked_of_slurm(job: str) -> float | None:
    ask = ["squeue", "--noheader", "--format=%e", f"--jobs={job}"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=60)
        return datetime.fromisoformat(done.stdout.strip()).timestamp()
    except (OSError, ValueError, subprocess.TimeoutExpired):  # no answer, or none there is
        return None


def _begin_of_pbs_job(environment: Mapping[str, str]) -> float:
    """PBS says how long a job is, and not when it began; inferred: it writes the file of nodes
    then.
    """
    nodefile = Path(environment.get("PBS_NODEFILE", ""))
    return nodefile.stat().st_mtime if nodefile.is_file() else time.time()
