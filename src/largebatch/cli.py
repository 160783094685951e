"""`largebatch COMMAND …`: a table from command to the module that runs it."""

import io
import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from typing import Final, NamedTuple

from largebatch.common.loading import load
from largebatch.common.text import missing
from largebatch.completion import candidates, script
from largebatch.records.outcomes import ExitCode, exit_code_help


class Command(NamedTuple):
    module: str
    """Has `main(arguments) -> exit code`."""
    summary: str
    example: str
    """A command line; every `--help` of the command ends with it."""


COMMANDS: Final = {
    "train": Command(
        "largebatch.train.command",
        "one training run (Hydra overrides)",
        "largebatch train task=digits optim=lamb batch.size=512 target.loss=0.2",
    ),
    "sweep": Command(
        "largebatch.train.sweep_command",
        "many runs or a study (Hydra multirun)",
        "largebatch sweep study=digits 'study.optimizers=[adamw,lamb]'",
    ),
    "plan": Command(
        "largebatch.train.plan.command",
        "a run's schedule, printed and drawn",
        "largebatch plan lr=cosine batch=rampup batch.start=64 batch.size=1024",
    ),
    "coord": Command(
        "largebatch.train.transfer.command",
        "do layers change alike at every width: a quick check",
        "largebatch coord optim=adamw scaling.base_width=32",
    ),
    "report": Command(
        "largebatch.study.report",
        "tables and pictures of the runs below a folder",
        "largebatch report runs/a runs/b --against seconds",
    ),
    "study": Command(
        "largebatch.study.command",
        "how far a study in a folder is",
        "largebatch study status studies/bytes",
    ),
    "branch": Command(
        "largebatch.train.branch.command",
        "how large the batch may be from a checkpoint on",
        "largebatch branch runs/mine",
    ),
    "submit": Command(
        "largebatch.launch.jobs.submit",
        "a job on a cluster: its script, submitted",
        "largebatch submit cluster=slurm --dry-run -- train optim=lamb batch.size=4096",
    ),
    "doctor": Command(
        "largebatch.launch.doctor.command",
        "what is wrong here; a job's preflight",
        "mpiexec -n 24 --ppn 12 python -m largebatch doctor --preflight full",
    ),
    "env": Command(
        "largebatch.launch.environments.command",
        "an environment on every node: pack, spread",
        "largebatch env pack env.tar.gz",
    ),
    "watch": Command(
        "largebatch.launch.watch.command",
        "end a run that hangs; name the rank",
        "largebatch watch runs/mine --now",
    ),
    "data": Command(
        "largebatch.train.data.command",
        "files of tokens: make and inspect",
        "largebatch data tokenize text.jsonl --output data/text",
    ),
    "checkpoint": Command(
        "largebatch.train.checkpoints.command",
        "what a run has saved: ls, verify, export, universal",
        "largebatch checkpoint export runs/mine mine.safetensors",
    ),
    "bench": Command(
        "largebatch.benchmarks.command", "measurements beside peers", "largebatch bench optim"
    ),
    "nic": Command(
        "largebatch.launch.diagnose.nic.command",
        "network counters of the nodes during a run",
        "largebatch nic report runs/mine",
    ),
    "explain": Command(
        "largebatch.launch.diagnose.command",
        "why a run stopped or slowed, in words",
        "largebatch explain runs/mine --log job.out",
    ),
}


def version() -> str:
    """Return this project's version, `unknown` where it is not installed."""
    from importlib import metadata

    try:
        return metadata.version("largebatch")
    except metadata.PackageNotFoundError:
        return "unknown"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an encoding need not have every letter
            stream.reconfigure(errors="replace")
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--version" in arguments[:2]:
        print(f"largebatch {version()}")
        return 0
    if arguments == ["--complete"]:
        candidates(list(COMMANDS))
        return 0
    if (text := script(arguments)) is not None:
        print(text, end="")
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        wanted = bool(arguments) and arguments[0] in ("-h", "--help")
        if arguments and not wanted:
            near = get_close_matches(arguments[0], COMMANDS, n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            print(f"largebatch: no command {arguments[0]!r}{hint}", file=sys.stderr)
            if near:
                return ExitCode.REFUSED
        rows = "\n".join(f"  {name:10} {command.summary}" for name, command in COMMANDS.items())
        print(
            f"usage: largebatch COMMAND …\n\n{rows}\n\n{exit_code_help()}",
            file=sys.stdout if wanted else sys.stderr,
        )
        return 0 if wanted else ExitCode.REFUSED
    try:
        command = load(COMMANDS[arguments[0]].module)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("largebatch"):
            raise
        print(
            f"largebatch: {arguments[0]} needs {missing(error)}: pip install 'largebatch[train]'",
            file=sys.stderr,
        )
        return ExitCode.REFUSED
    try:
        code = run(command.main, arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # as of `largebatch … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def run(main: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run a command; its example stands below whatever help it prints."""
    name, *words = arguments
    own = words[: words.index("--")] if "--" in words else words  # behind it is another command
    asks = bool({"-h", "--help"} & {*own})
    try:
        code = main(words)
    except SystemExit as ended:  # argparse's
        if asks and not ended.code:
            print(f"\nexample: {COMMANDS[name].example}")
        raise
    if asks and not code:
        print(f"\nexample: {COMMANDS[name].example}")
    return code
