"""`largebatch watch`: end a run that hangs, and say which rank is missing from what.

A run hangs when its step counter stays, whatever its processes do: a collective that one rank
has not entered keeps all others busy for ever, and time-outs of collectives cannot be relied on
(XCCL has no abort). So the judge is a process outside, with the heartbeat in the run's folder.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from largebatch.common.errors import ConfigError
from largebatch.common.files import write_whole
from largebatch.distributed.walltime import end_of_job
from largebatch.launch.processes import ProcessGroupJob, descendants, kill
from largebatch.launch.progress import Progress, has_runs_below, is_gone, process_of
from largebatch.launch.watch.nodes import Faults, Nodes, held_up
from largebatch.launch.watch.report import report
from largebatch.records import RecordError, find_fields, printable
from largebatch.records.fields import whole
from largebatch.records.heartbeat import Beat, find_beat
from largebatch.records.names import MOST_RANKS, REQUEST, SUMMARY, WATCH
from largebatch.records.outcomes import FINAL_CODES, ExitCode
from largebatch.records.summary import has_ended

LEAST_SECONDS: Final = 120.0
"""What is left of a job must be worth a start."""

EPILOG: Final = f"""\
With a COMMAND the exit code is the command's own (128 + N where signal N has killed it), or
{ExitCode.HUNG} where it was ended because it stood still. Without one it is 0 where the run ends,
1 where its process is gone without having ended it, {ExitCode.HUNG} where it hangs,
and 130 on Ctrl-C. 2 is a refusal.
SIGINT, SIGTERM, SIGUSR2 and SIGXCPU are passed on to COMMAND, and end the restarts.

  largebatch watch runs/a --restarts 3 -- mpiexec -n 24 --ppn 12 python -m largebatch train \\
      hydra.run.dir=runs/a checkpoint.every_samples=1e6 resume=auto"""


def main(arguments: list[str]) -> int:
    """Run `largebatch watch ARGUMENTS`; returns the exit code."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options, command = _parser().parse_args(arguments[:cut]), arguments[cut + 1 :]
    run: Path = options.run
    if cut < len(arguments) and not command:
        return _refuse("nothing stands after --: give the command, or leave out --")
    if run.exists() and not run.is_dir():
        return _refuse(f"{run} is no folder: name the run's, its hydra.run.dir")
    if command and options.now:
        return _refuse("--now asks a run that is under way: leave out the command")
    if command and options.end:
        return _refuse("--end is for a run that others have started: COMMAND is ended anyway")
    if options.restarts and not command:
        return _refuse("--restarts needs the command to start again, after --")
    given = [name for name in ("hostfile", "spares", "bad") if getattr(options, name) is not None]
    if given and not (options.hostfile is not None and options.restarts):
        return _refuse(f"--{given[0]} is for --restarts on the nodes of a --hostfile: give both")
    if command:
        try:
            return supervise(run, command, options)
        except ValueError as error:  # of a hostfile
            return _refuse(str(error))
    progress = Progress(run)
    progress.look()
    if progress.beat is None:
        return _refuse(
            "; ".join(progress.problems)
            or f"{run} holds no heartbeat: no run has begun there, or it is another folder"
        )
    for problem in progress.problems:
        _say(problem)
    try:
        if options.now:
            return inquire(run, progress, progress.beat, options)
        return observe(run, progress, progress.beat, options)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except OSError as error:
        return _refuse(f"{run} cannot be asked: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="largebatch watch",
        usage="largebatch watch RUN [options] [-- COMMAND …]",
        description=(__doc__ or "").partition("\n\n")[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder (hydra.run.dir)")
    for name, default, what in (
        ("timeout", 600.0, "without a step, after the first: longer than any evaluation or save"),
        ("startup", 1800.0, "until the first step, and for COMMAND to leave after the end"),
        ("grace", 30.0, "between SIGTERM and SIGKILL"),
        ("wait", 60.0, "for the ranks to say where they stand"),
    ):
        what += f" (default {default:g})"
        parser.add_argument(
            f"--{name}", type=_seconds, default=default, metavar="SECONDS", help=what
        )
    what = "start COMMAND again so often, after it stood still or failed"
    parser.add_argument("--restarts", type=_count, default=0, metavar="N", help=what)
    for name, what in (
        ("hostfile", "that COMMAND reads: before a restart nodes that failed are taken out of it"),
        ("spares", "nodes that take their places, in a hostfile's lines"),
        ("bad", "to which nodes that were taken out are appended"),
    ):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=what)
    parser.add_argument(
        "--now", action="store_true", help="ask at once where the ranks stand, and leave the run be"
    )
    parser.add_argument("--end", action="store_true", help="without COMMAND: end a run that hangs")
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text}")
    return seconds


def _count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = -1
    if count < 0:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text}")
    return count


def supervise(run: Path, command: list[str], options: argparse.Namespace) -> int:
    """Run a command, again where it stood still or failed; returns the exit code."""
    _say(f"{run}: to be ended after {options.timeout:g} s without a step")
    if not any(run.name in word for word in command):
        _say(f"{run} is not named in the command: is it that run's hydra.run.dir?")
    nodes = None
    if options.hostfile is not None:
        nodes = Nodes(options.hostfile, options.spares, options.bad)
    end = end_of_job(None)
    for left in range(options.restarts, -1, -1):
        before, faults = _interruption(run), Faults()
        environment = {} if nodes is None else nodes.environment
        try:
            with ProcessGroupJob(
                command, environment, None if nodes is None else faults.listen
            ) as job:
                code = _attempt(run, job, options)
                stay = job.kill()
        except ConfigError as error:
            return _refuse(str(error))
        faults.finish()
        if stay:
            _say(f"processes {stay} cannot be killed: they wait for a device; restart elsewhere")
            return code
        if code in FINAL_CODES or job.signal is not None or _has_ended(run):
            return code
        if _interruption(run) not in (None, before):  # by its job's end, or stop_at
            return code
        if nodes is not None:  # also for the jobs that follow
            ranks, size = held_up(run) if code == ExitCode.HUNG else ([], 0)
            for change in nodes.take_out(faults, ranks, size):
                _say(change)
        if not left:
            return code
        if end is not None and end - time.time() < LEAST_SECONDS:
            _say(f"no restart within {LEAST_SECONDS:g} s of the job's end")
            return code
        _say(f"starting again after exit code {code}; {left - 1} restarts left")
    raise AssertionError("the last round returns")


def _interruption(run: Path) -> tuple[int, int] | None:
    """Which summary says that the run stopped because it was time; None: none does."""
    summary = find_fields(run / SUMMARY, [])
    if summary is None or summary.values.get("status") != "interrupted":
        return None
    file = (run / SUMMARY).stat()
    return None if "signal" in summary.values else (file.st_mtime_ns, file.st_ino)


def _has_ended(run: Path) -> bool:
    try:
        return has_ended(run)
    except RecordError as error:
        _say(f"{error}: taken for a run that has not ended")
        return False


def _attempt(run: Path, job: ProcessGroupJob, options: argparse.Namespace) -> int:
    """Wait for the command, or end it where it hangs."""
    progress = Progress(run, stale=find_beat(run, []))
    while (code := job.exit_code(_pause(options))) is None:
        progress.look()
        if not _stands_still(progress, options):
            continue
        if progress.beat is None and has_runs_below(run):
            _say(f"{run} holds many runs, and a watch is for one: nothing of it is watched")
            progress = Progress(run)
            continue
        if progress.has_ended:
            _say(f"{run}: {progress}")
        elif not _is_reported(run, progress, options):
            continue
        _say(f"ending it: SIGTERM, and SIGKILL after {options.grace:g} s")
        dismiss(run, lambda: job.end(options.grace))
        return ExitCode.HUNG
    return code


def _stands_still(progress: Progress, options: argparse.Namespace) -> bool:
    limit = options.timeout if progress.is_stepping else max(options.startup, options.timeout)
    return progress.seconds > float(limit)


def _pause(options: argparse.Namespace) -> float:
    """Seconds between looks."""
    return min(1.0, float(options.timeout) / 10)


def _is_reported(run: Path, progress: Progress, options: argparse.Namespace) -> bool:
    """Say where the ranks stand, as far as that can be; False where the run continues meanwhile."""
    beat, reason = progress.beat, f"{run} hangs: {progress}"
    _say(f"{reason}; asking its ranks")
    try:
        folder = ask(run, None if beat is None else beat.world_size, options.wait)
        _say(f"{report(folder, reason, beat)}\n({folder / 'report.txt'})")
    except OSError as error:  # such as a full disk
        _say(f"its ranks cannot be asked: {error!r}")
    for problem in progress.problems:
        _say(problem)
    progress.look()
    if _stands_still(progress, options):
        return True
    _say(f"{run} has gone on: a longer --timeout would have waited for it")
    return False


def observe(run: Path, progress: Progress, beat: Beat, options: argparse.Namespace) -> int:
    """Watch a run that others have started; returns the exit code."""
    while True:
        beat = progress.beat or beat
        gone = is_gone(beat)
        progress.look()  # its last word may have come since
        if progress.has_ended:
            _say(f"{run} has ended, at step {beat.step}")
            return 0
        if gone and progress.beat == beat:
            _say(f"{run}: its process {beat.pid} is gone, and has not ended the run")
            return 1
        if _stands_still(progress, options) and _is_reported(run, progress, options):
            _end_from_outside(run, beat, options)
            return ExitCode.HUNG
        time.sleep(_pause(options))


def _end_from_outside(run: Path, beat: Beat, options: argparse.Namespace) -> None:
    """End a run's ranks, where that is asked for: they leave by themselves if they can, and rank 0
    is killed where it is on this machine. Its launcher ends what is left.
    """
    first = process_of(beat)
    if not options.end:
        _say(f"to end it: --end, or kill process {beat.pid} on {beat.host}, or qdel, scancel")
        return

    def wait() -> None:
        until = time.monotonic() + options.grace
        while time.monotonic() < until and not is_gone(beat):
            time.sleep(0.2)

    _say(f"telling its ranks to leave, for {options.grace:g} s")
    dismiss(run, wait)
    if first is not None:
        kill({first} | descendants(first))
    else:
        _say(
            f"should some have stayed: rank 0 was process {beat.pid} on {beat.host}; qdel, scancel"
        )


def inquire(run: Path, progress: Progress, beat: Beat, options: argparse.Namespace) -> int:
    """Say where the ranks stand now."""
    if progress.has_ended:
        _say(f"{run} has ended, at step {beat.step}")
        return 0
    folder = ask(run, beat.world_size, options.wait)
    print(report(folder, f"{run}: step {beat.step} ({beat.samples} samples)", beat))
    return 0


def ask(run: Path, world_size: int | None, wait_seconds: float) -> Path:
    """Ask every rank where it stands, by a file that `distributed/rank_dump.py` reads; returns the
    folder of the answers, once all are there or the time is over. Where the world's size is not
    known, the first answer tells.
    """
    folder = _new_folder(run / WATCH)
    request = _request(run, f"answer {folder.name}")
    until = time.monotonic() + wait_seconds
    try:
        while time.monotonic() < until:
            names = [path.name for path in folder.iterdir() if path.name.startswith("rank-")]
            if names and world_size is None:
                answer = find_fields(folder / names[0], [])
                if answer is not None:
                    world_size = answer.find("size", whole(1, MOST_RANKS))
            if len(names) == world_size:
                break
            time.sleep(0.2 if len(names) < 1000 else 2.0)
    finally:
        request.unlink(missing_ok=True)
    return folder


def _new_folder(above: Path) -> Path:
    """A folder that was not there, named by the time."""
    name = time.strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(100):
        folder = above / (f"{name}-{attempt}" if attempt else name)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{above / name}")


def dismiss(run: Path, then: Callable[[], None]) -> None:
    """Tell every rank to leave, and do `then`, which lasts until they have."""
    try:
        _request(run, f"leave {time.time_ns()}")
    except OSError:  # a full disk, say: what follows is done without it
        then()
        return
    try:
        then()
    finally:
        (run / WATCH / REQUEST).unlink(missing_ok=True)


def _request(run: Path, words: str) -> Path:
    """Put it before the ranks; returns the file, to be taken away afterwards."""
    path = run / WATCH / REQUEST
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, words + "\n")
    return path


def _say(text: str) -> None:
    lines = "\n".join(map(printable, text.split("\n")))
    print(f"largebatch watch: {lines}", file=sys.stderr, flush=True)


def _refuse(text: str) -> int:
    print(f"largebatch: {text}", file=sys.stderr)
    return ExitCode.REFUSED
