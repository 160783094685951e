"""`largebatch submit`: write the script of a job on a cluster, and submit it.

What can be known beforehand is checked before: the queue's limits, the cores, and for a run its
whole configuration and plan on as many ranks as the job will have.
"""

import os
import re
import subprocess
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

import largebatch.conf.resolvers  # noqa: F401 — registers them
from largebatch.common.errors import ConfigError, format_config_error, hydra_word
from largebatch.conf.cluster_config import ClusterConfig, SubmitConfig, typed_submit
from largebatch.conf.user_configs import first, tell_replaced, unreadable_file
from largebatch.launch.jobs.cluster import Scheduler, check_queue, doubts
from largebatch.launch.jobs.job import Job
from largebatch.launch.jobs.script import script
from largebatch.records.fields import LARGEST
from largebatch.records.outcomes import ExitCode
from largebatch.records.record import check_free, check_unfinished

HELP: Final = """Write the script of a job on a cluster, and submit it.

  largebatch submit cluster=aurora cluster.nodes=8 cluster.queue=debug-scaling \\
      cluster.account=PROJECT cluster.walltime=00:30:00 \\
      -- train optim=lamb batch.size=12288

The clusters are aurora, sunspot, polaris, slurm (any), local (this machine, at once), and those in
DIR/cluster/*.yaml with --config-dir DIR. Keys that are often given:

  cluster.nodes, .queue, .account, .walltime
  cluster.chain=N        N jobs, each going on from the checkpoints of the one before
  cluster.allreduce=…    oneCCL's algorithm between nodes: default, direct, rabenseifner, ring, …
  cluster.spares=K       K nodes more; each is asked by itself, and the good ones go on
  cluster.preflight=…    fast or full: largebatch doctor on all ranks before the run
  cluster.watch_timeout=S   end the job when there is no step for S seconds
  cluster.restarts=N     and go on within it, N times, without the nodes that failed
  cluster.environment=…  venv, spread (cluster.archive=…) or copper
  name=…, folder=…       of the job

exit codes: 0 submitted, or printed; 2 refused; with cluster=local, which runs it at once, the run's
"""


def main(arguments: list[str]) -> int:
    """Run `largebatch submit ARGUMENTS`; returns the exit code."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    options = _parser().parse_intermixed_args(arguments[:at])
    try:
        job = prepared(options, arguments[at + 1 :], arguments)
        text = script(job)
        for doubt in doubts(job.cluster):
            print(f"largebatch: warning: {doubt}", file=sys.stderr)
        if options.dry_run:
            print(text, end="")
            return 0
        return send(job, text)
    except ConfigError as error:
        print(f"largebatch: {error}", file=sys.stderr)
        return ExitCode.REFUSED


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "largebatch submit", usage="largebatch submit [OPTIONS] KEY=VALUE… -- train|sweep WORDS…",
        allow_abbrev=False, description=HELP, formatter_class=RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the script, and no more")
    parser.add_argument("--config-dir", metavar="DIR", help="where your own cluster/*.yaml are")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="see above")
    return parser


def prepared(options: Namespace, words: Sequence[str], request: Sequence[str]) -> Job:
    """The job as asked for, checked: ConfigError says what is wrong."""
    config = composed(options.overrides, options.config_dir)
    tell_replaced(options.config_dir)
    check_queue(config.cluster)
    words, record = completed(config, words, options.overrides, options.config_dir)
    if words[0] == "train":
        # Now rather than after a day in the queue.
        if "resume=auto" in words:
            # The run compares the two; the later jobs of a chain take what has ended for done.
            longer = any(word.startswith("budget.samples=") for word in words)
            longer = longer and config.cluster.chain == 1
            check_unfinished(Path(record), LARGEST if longer else 0)
        else:
            check_free(Path(record))
        check_plan(words[1:], config.cluster.num_ranks)
    return Job(config, words, record, [word for word in request if word != "--dry-run"])


def composed(overrides: Sequence[str], config_dir: str | None = None) -> SubmitConfig:
    """Compose `submit.yaml` with the overrides; ConfigError for an unknown cluster or key, a
    missing or impossible value.
    """
    strange = [word for word in overrides if "=" not in word and not word.startswith("~")]
    if strange:
        raise ConfigError(
            f"{strange[0]!r} is no KEY=VALUE; what the job is to run stands after --, as in "
            "largebatch submit cluster=local -- train"
        )
    # A shell leaves this ~ alone, and Hydra cannot read it.
    overrides = [_as_meant(word.replace("=~/", "=$HOME/", 1)) for word in overrides]
    try:
        with first(config_dir), initialize_config_module("largebatch.conf", version_base="1.3"):
            return typed_submit(compose("submit", overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(
            format_config_error(error).partition(" Config search path:")[0]
        ) from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(unreadable_file(error, config_dir)) from error


def _as_meant(override: str) -> str:
    """The override, with a value that Hydra's grammar has no place for in quotes: those that were
    typed around it are the shell's.
    """
    key, _, value = override.partition("=")
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        # With one of these in it, what is meant is not known.
        if not set(value) & set("[]{}()'\",\\"):
            return f"{key}={hydra_word(value)}"
    return override


def completed(
    config: SubmitConfig,
    words: Sequence[str],
    overrides: Sequence[str] = (),
    config_dir: str | None = None,
) -> tuple[list[str], str]:
    """The command with what a job of its kind needs, and the folder of its record; ConfigError
    where it is none that a job can run. A sweep hands `overrides` of the cluster on to its trials,
    and the `config_dir` that it is in.
    """
    if not words or words[0] not in ("train", "sweep"):
        raise ConfigError(
            "say after -- what the job is to run, train or sweep and its words, got "
            f"{' '.join(words) or 'nothing'}"
        )
    # As the command takes it, cut short too.
    sweeps = [
        word
        for word in words[1:]
        if word == "-m" or (len(word) > 2 and "--multirun".startswith(word))
    ]
    if words[0] == "train" and (sweeps or "hydra.mode=MULTIRUN" in words):
        raise ConfigError(
            f"train {' '.join(sweeps) or 'hydra.mode=MULTIRUN'} is many runs, and the ranks of a "
            "job's launcher are for one: use -- sweep …"
        )
    keys = {word.partition("=")[0].lstrip("+"): word.partition("=")[2] for word in words[1:]}
    if keys.get("engine.nproc", "1") != "1":
        raise ConfigError(
            f"engine.nproc={keys['engine.nproc']} starts ranks itself, and the job's launcher "
            f"starts {config.cluster.num_ranks}: leave it out"
        )
    if words[0] == "sweep" and config.cluster.nodes > 1 and "hydra/launcher" not in keys:
        raise ConfigError(
            f"a sweep stays on the first of {config.cluster.nodes} nodes without a launcher that "
            "reaches the others: give hydra/launcher=parsl, or cluster.nodes=1"
        )
    key, name = ("hydra.run.dir", "run") if words[0] == "train" else ("hydra.sweep.dir", "sweep")
    record = keys.get(key, f"{config.folder}/{name}")
    if re.search(r"[\s'\"\\$`\x00-\x1f\x7f]", record):
        raise ConfigError(
            f"{key} must be a plain path in a job, the same for everybody who reads it, got "
            f"{record!r}"
        )
    more = [] if key in keys else [f"{key}={record}"]
    if keys.get("hydra/launcher") == "parsl" and "hydra.launcher.cluster" not in keys:
        more.append(f"hydra.launcher.cluster={config.cluster.name}")
        words, handed = _handed_on(overrides, words)
        more += handed
        if config_dir is not None and not any(word.startswith("--config-dir") for word in words):
            more.append(f"--config-dir={os.path.abspath(config_dir)}")
    resumes = words[0] == "train" or "study" not in keys  # a study resumes by itself
    again = [
        f"cluster.{name}={asked}"
        for name, asked, least in (
            ("chain", config.cluster.chain, 2), ("restarts", config.cluster.restarts, 1),
        )
        if asked >= least
    ]  # fmt: skip
    if config.cluster.restarts and words[0] == "sweep":
        raise ConfigError(
            f"{again[-1]} is for a run; a sweep starts its trials again itself: "
            "hydra.launcher.retries"
        )
    if again and resumes:
        saves = ("checkpoint.every_samples", "checkpoint.every_minutes")
        if all(keys.get(key, "null") == "null" for key in saves):
            raise ConfigError(
                f"{' and '.join(again)} resumes from checkpoints, and there are none: give "
                "checkpoint.every_samples=…"
            )
        more += [] if keys.get("resume") == "auto" else ["resume=auto"]
    return [*words, *more], record


_OF_THE_JOB: Final = (
    "nodes", "spares", "queue", "account", "walltime", "chain", "preflight", "watch_timeout",
    "restarts",
)  # fmt: skip
"""Keys of a cluster that are no trial's within the job."""


def _handed_on(overrides: Sequence[str], words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a sweep without `hydra.launcher.overrides`, and that with all that trials are
    to have of the job's cluster: what a sweep says itself comes last, and stands.
    """
    key = "hydra.launcher.overrides"
    handed = [
        override
        for override in overrides
        if (name := override.lstrip("+~").partition("=")[0]).startswith("cluster.")
        and name.split(".")[1] not in _OF_THE_JOB
    ]
    if not handed:
        return [*words], []
    left = []
    for word in words:
        if word.lstrip("+").startswith(f"{key}="):
            given: Any = OverridesParser.create().parse_override(word).value()
            handed += map(str, given)
        else:
            left.append(word)
    return left, [f"{key}=[{','.join(map(hydra_word, handed))}]"]


def check_plan(words: Sequence[str], ranks: int) -> None:
    """Refuse a run that cannot be planned on that number of ranks, by `largebatch plan` in a
    process of its own: launch/ knows nothing of the loop's configuration.
    """
    plan = [sys.executable, "-m", "largebatch", "plan", "--no-picture", "--ranks", str(ranks)]
    done = subprocess.run([*plan, *words], capture_output=True, text=True)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"largebatch plan ended with {done.returncode}"]
        raise ConfigError(said[-1].removeprefix("largebatch: "))


def check_files(cluster: ClusterConfig) -> None:
    """Refuse a job that will lack something of the file system; it is the same one."""
    if cluster.venv is not None:
        venv = Path(os.path.expandvars(cluster.venv)).expanduser()
        if not (venv / "bin" / "activate").is_file():
            raise ConfigError(
                f"cluster.venv={cluster.venv} is no virtual environment: make it with python3 -m "
                f"venv --system-site-packages {cluster.venv}, or name yours"
            )
    if cluster.environment == "spread":
        assert cluster.archive is not None
        if not Path(os.path.expandvars(cluster.archive)).is_file():
            raise ConfigError(
                f"cluster.archive={cluster.archive} is not there: make it with largebatch env pack"
            )


def send(job: Job, text: str) -> int:
    """Write the script and submit it, or run it here; returns the exit code. ConfigError for a
    folder that is taken, a queue that is full, a scheduler that refuses.
    """
    folder = Path(job.config.folder)
    if folder.exists():
        raise ConfigError(f"{folder} is there already: choose another with folder=…")
    scheduler = None if job.cluster.scheduler == "none" else Scheduler(job.cluster)
    check_files(job.cluster)
    if scheduler is not None:
        scheduler.check_room()
    folder.mkdir(parents=True)
    path = folder / "job.sh"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")  # names that are no UTF-8
    path.chmod(0o755)
    if scheduler is None:
        return _run_here(path)
    ids: list[str] = []
    try:
        for _ in range(job.cluster.chain):
            ids.append(scheduler.submit(path, after=ids[-1] if ids else None))
    except ConfigError as error:
        if not ids:
            path.unlink()
            folder.rmdir()
            raise
        raise ConfigError(f"{error}; before it {', '.join(ids)} went in, and will run") from error
    print(f"{', then '.join(ids)}: {path}, with its output beside it; record in {job.record}")
    return 0


def _run_here(path: Path) -> int:
    """The script's exit code. Ctrl-C is for the ranks, which close their record."""
    process = subprocess.Popen(["bash", str(path)])
    while True:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            continue
        return 128 - code if code < 0 else code
