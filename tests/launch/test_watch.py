"""`largebatch watch` from outside: hangs made on purpose, exit codes, restarts, what is left."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forked
import psutil
import pytest

from largebatch.launch.watch import command as watch
from largebatch.launch.watch.report import report
from largebatch.records.heartbeat import Heartbeat
from largebatch.records.names import HEARTBEAT

RANKS = Path(__file__).with_name("watched_ranks.py")
SCRIPTS = Path(sys.executable).parent


def watched(
    *words: str, command: list[str], seconds: float = 60
) -> "subprocess.CompletedProcess[str]":
    return forked.run(
        [sys.executable, "-m", "largebatch", "watch", *words, "--", *command],
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def ranks(run: Path, mode: str) -> list[str]:
    return [sys.executable, str(RANKS), str(run), mode]


def last_report(run: Path) -> dict[str, Any]:
    *_, path = sorted((run / "watch").glob("*/report.json"))
    found: dict[str, Any] = json.loads(path.read_text())
    assert path.with_suffix(".txt").read_text().startswith(found["reason"])
    return found


def nothing_runs(run: Path) -> bool:
    """No process is left that names the run's folder."""
    return not any(
        str(run) in word
        for process in psutil.process_iter(["cmdline"])
        for word in process.info["cmdline"] or ()
    )


LIMITS = ("--timeout", "1", "--grace", "4", "--wait", "15")


def test_a_rank_that_sleeps_is_named_with_the_collective_and_its_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = watched(str(run), *LIMITS, command=ranks(run, "sleeps"))
    assert done.returncode == 124
    assert "rank 2 is the first to look at" in done.stderr
    found = last_report(run)
    assert (found["culprits"], found["silent"]) == ([2], [])
    missing = {f["group"][1]: (f["number"], f["missing"], f["calls"][0]) for f in found["findings"]}
    # Two steps are made, and of the third rank 2 has entered nothing: rank 3 waits for it in their
    # pair, and the others for both in the world.
    assert missing == {
        "default_pg": (3, [2, 3], [["all_reduce", [[10]], False], [0, 1]]),
        "high": (3, [2], [["all_reduce", [[2]], False], [3]]),
    }
    assert found["places"][0]["ranks"] == [2]
    assert "time.sleep(1000)" in found["places"][0]["lines"][0]
    assert found["heartbeat"]["world_size"] == 4
    assert nothing_runs(run)
    assert not (run / "watch" / "request").exists()


def test_a_rank_that_calls_another_collective_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = watched(str(run), *LIMITS, command=ranks(run, "calls another"))
    assert done.returncode == 124
    found = last_report(run)
    assert found["culprits"] == [2]
    (mismatch,) = [f for f in found["findings"] if f["kind"] == "mismatch"]
    assert [(call[0], where) for call, where in mismatch["calls"]] == [
        ("all_reduce", [0, 1]),
        ("broadcast", [2]),
    ]
    assert "dist.broadcast(torch.ones(3), 0)" in found["places"][0]["lines"][0]


@pytest.mark.parametrize("above", ["/home/me/largebatch/.venv", "/opt/python", "/usr"])
def test_a_place_is_the_innermost_line_of_the_user_or_the_project(
    above: str, tmp_path: Path
) -> None:
    """Also where the environment, and with it torch, lies in a checkout called largebatch."""
    packages = f"{above}/lib/python3.12/site-packages"
    calls = [
        ["/home/me/largebatch/mine.py", 7, "main"],
        [f"{packages}/largebatch/train/loop.py", 3, "run"],
        [f"{packages}/torch/distributed/c10d_logger.py", 5, "wrapper"],
        [f"{above}/lib/python3.12/threading.py", 9, "wait"],
        ["<frozen importlib._bootstrap>", 1, "_find"],
    ]
    said = {"rank": 0, "size": 1, "threads": [{"name": "MainThread", "calls": calls}]}
    said |= {"collectives": [], "groups": {}, "is_whole": True, "trouble": None}
    (tmp_path / "rank-0.json").write_text(json.dumps(said))
    report(tmp_path, "", None)
    (place,) = json.loads((tmp_path / "report.json").read_text())["places"]
    assert place["lines"] == [
        f"{packages}/largebatch/train/loop.py:3 in run",
        "/home/me/largebatch/mine.py:7 in main",
    ]


def test_ranks_under_mpiexec_and_torchrun_are_gone_afterwards(tmp_path: Path) -> None:
    """They take note of SIGTERM and go on, as those of a run do; the launcher is not to stay."""
    for launcher, rank in (("mpiexec -n 2", "PMI_RANK"), ("torchrun --nproc-per-node 2", "RANK")):
        run = tmp_path / launcher.split()[0]
        script = tmp_path / f"{rank}.py"
        script.write_text(NO_TORCH.format(rank=rank))
        python = [] if rank == "RANK" else [sys.executable]
        command = [str(SCRIPTS / launcher.split()[0]), *launcher.split()[1:], *python]
        done = watched(str(run), *LIMITS, command=[*command, str(script), str(run)])
        assert done.returncode == 124, done.stderr
        assert "rank 1 is at" in done.stderr
        assert "time.sleep(1000)" in done.stderr
        assert nothing_runs(run)


NO_TORCH = """
import os, pathlib, signal, sys, time
from largebatch.records.heartbeat import Heartbeat
from largebatch.distributed.rank_dump import answering
signal.signal(signal.SIGTERM, lambda number, frame: None)
rank, run = int(os.environ["{rank}"]), pathlib.Path(sys.argv[1])
run.mkdir(exist_ok=True)
with answering(run, rank, 2):
    if rank == 0:
        with Heartbeat(run, 2) as heartbeat:
            heartbeat.beat(1, 1)
            while True:
                time.sleep(0.1)
    time.sleep(1000)
"""

# Makes a step; then does what is asked of its first, second, … start.
STARTS = """
import json, pathlib, sys, time
from largebatch.records.heartbeat import Heartbeat
run, deeds = pathlib.Path(sys.argv[1]), sys.argv[2:]
run.mkdir(exist_ok=True)
count = run / "starts"
start = int(count.read_text()) if count.exists() else 0
count.write_text(str(start + 1))
with Heartbeat(run, 1) as heartbeat:
    heartbeat.beat(1, 8)
    deed = deeds[start]
    if deed == "hang":
        time.sleep(1000)
    if deed.startswith("ended "):
        status, _, number = deed.split()[1].partition("-")
        summary = {"status": status} | ({"signal": int(number)} if number else {})
        (run / "summary.json").write_text(json.dumps(summary))
sys.exit(int(deed.split()[-1]))
"""


def starts(run: Path, *deeds: str) -> list[str]:
    return [sys.executable, "-c", STARTS, str(run), *deeds]


QUICK = ("--timeout", "1", "--grace", "1", "--wait", "0.1")


@pytest.mark.parametrize(
    ("restarts", "deeds", "code", "num_starts"),
    [
        (3, ["hang", "1", "143", "0"], 0, 4),
        (1, ["1", "hang", "0"], 124, 2),
        (0, ["7"], 7, 1),
        (3, ["2", "0"], 2, 1),
        (3, ["4", "0"], 4, 1),
        # torchrun makes 1 of every code: then the summary tells.
        (3, ["ended exhausted 1", "0"], 1, 1),
        (3, ["ended interrupted-15 1", "0"], 0, 2),
        (3, ["ended interrupted 1", "0"], 1, 1),  # as its job's end came
    ],
)
def test_restarts_are_for_hangs_and_failures(
    tmp_path: Path, restarts: int, deeds: list[str], code: int, num_starts: int
) -> None:
    run = tmp_path / "run"
    done = watched(str(run), *QUICK, "--restarts", str(restarts), command=starts(run, *deeds))
    assert done.returncode == code, done.stderr
    assert int((run / "starts").read_text()) == num_starts


def test_nodes_that_the_launcher_names_are_replaced_and_the_last_is_remembered(
    tmp_path: Path,
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("n1\nn2\n")
    (tmp_path / "spares").write_text("n3\n")
    fails = f'echo "ping failed on n1: No reply from $(tail -n 1 {hosts}) after 9s" >&2; exit 9'
    words = ["--restarts", "1", "--hostfile", str(hosts), "--spares", str(tmp_path / "spares")]
    done = watched(
        str(tmp_path), *words, "--bad", str(tmp_path / "bad"), command=["sh", "-c", fails]
    )
    assert done.returncode == 9
    assert "ping failed on n1: No reply from n2 after 9s\n" in done.stderr  # is passed on
    assert "n3 takes the place of n2 (ping failed on" in done.stderr
    assert "no spare is left for n3" in done.stderr
    assert hosts.read_text() == "n1\nn3\n"
    bad = (tmp_path / "bad").read_text().splitlines()
    assert [line.split()[0] for line in bad] == ["n2", "n3"]


SLOW = """
import pathlib, sys, time
from largebatch.records.heartbeat import Heartbeat
with Heartbeat(pathlib.Path(sys.argv[1]), 1) as heartbeat:
    heartbeat.beat(1, 8)
    time.sleep(1.2)
    heartbeat.beat(2, 16)
"""


def test_a_run_that_goes_on_while_its_ranks_are_asked_is_not_ended(tmp_path: Path) -> None:
    words = (str(tmp_path), "--timeout", "0.4", "--wait", "2")
    done = watched(*words, command=[sys.executable, "-c", SLOW, str(tmp_path)])
    assert done.returncode == 0
    assert "has gone on" in done.stderr


def test_a_folder_of_many_runs_is_not_taken_for_one_that_stands_still(tmp_path: Path) -> None:
    with Heartbeat(tmp_path / "lr-1" / "seed-0", 1):
        pass
    words = ("--timeout", "0.2", "--startup", "0.5")
    done = watched(str(tmp_path), *words, command=["sleep", "1.2"])
    assert done.returncode == 0
    assert "holds many runs" in done.stderr


def test_a_folder_that_cannot_be_written_keeps_no_hang_alive(tmp_path: Path) -> None:
    (tmp_path / "watch").touch()
    words = ("--timeout", "0.2", "--startup", "0.5", "--grace", "1", "--wait", "0.1")
    done = watched(str(tmp_path), *words, command=["sleep", "1000"])
    assert done.returncode == 124
    assert "its ranks cannot be asked" in done.stderr
    assert "is not named in the command" in done.stderr


def test_a_command_killed_by_a_signal_has_the_shells_code(tmp_path: Path) -> None:
    done = watched(str(tmp_path), command=["sh", "-c", "kill -9 $$"])
    assert done.returncode == 128 + 9


def test_a_run_that_ends_is_left_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    late = f"{shlex.join(starts(run, '0'))} && sleep 2; exit $?"
    done = watched(str(run), "--timeout", "1", command=["sh", "-c", late])
    assert done.returncode == 0
    assert "hangs: " not in done.stderr
    assert json.loads((run / HEARTBEAT).read_text())["state"] == "ended"
    assert not [*(run / "watch").iterdir()]


STOPPED = """
import os, pathlib, signal, subprocess, sys, time
from largebatch.records.heartbeat import Heartbeat
from largebatch.distributed.rank_dump import answering
run, rank = pathlib.Path(sys.argv[1]), 1
run.mkdir()
with Heartbeat(run, 2) as heartbeat:
    heartbeat.beat(1, 8)
    if os.fork() == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    with answering(run, 0, 2):
        time.sleep(1000)
"""


def test_a_rank_that_does_not_answer_is_named_and_goes_too(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("--timeout", "0.3", "--grace", "1", "--wait", "1.5")
    done = watched(str(run), *words, command=[sys.executable, "-c", STOPPED, str(run)])
    assert done.returncode == 124
    assert "rank 1 is silent" in done.stderr
    assert last_report(run)["silent"] == [1]
    assert nothing_runs(run)  # SIGKILL reaches what is stopped


def test_a_run_that_never_begins_is_ended_after_its_time_to_start(tmp_path: Path) -> None:
    words = ("--timeout", "0.2", "--startup", "1", "--grace", "1", "--wait", "0.1")
    done = watched(str(tmp_path / "run"), *words, command=["sleep", "1000"])
    assert done.returncode == 124
    assert "no heartbeat for 1 s" in done.stderr
    assert "no rank has answered" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_reaches_the_command_once_and_ends_the_restarts(
    tmp_path: Path, number: signal.Signals
) -> None:
    heard = tmp_path / "heard"
    script = (
        "import pathlib, signal, sys, time\n"
        f"path, heard = pathlib.Path({str(heard)!r}), []\n"
        f"signal.signal({int(number)}, lambda number, frame: heard.append(number))\n"
        "path.write_text('ready')\n"
        "while not heard: time.sleep(0.01)\n"
        "time.sleep(0.5)\n"
        "path.write_text(f'{len(heard)} times')\n"
        f"sys.exit({128 + number})\n"
    )
    watching = [sys.executable, "-m", "largebatch", "watch", str(tmp_path), "--restarts", "5"]
    process = forked.Popen([*watching, "--", sys.executable, "-c", script])
    while not heard.exists() or heard.read_text() != "ready":
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(20) == 128 + number
    assert heard.read_text() == "1 times"


def test_what_a_command_leaves_behind_is_ended_before_the_next_start(tmp_path: Path) -> None:
    orphan = f"exec {sys.executable} -c 'import time; time.sleep(1000)' {tmp_path}"
    leaves = f"setsid sh -c {shlex.quote(orphan)} & sleep 0.3; exit 1"
    assert watched(str(tmp_path), command=["sh", "-c", leaves]).returncode == 1
    assert nothing_runs(tmp_path)


HANGING_RUN = """
import pathlib, sys, time
from largebatch.records.heartbeat import Heartbeat
from largebatch.distributed.rank_dump import answering
run = pathlib.Path(sys.argv[1])
run.mkdir()
with answering(run, 0, 1), Heartbeat(run, 1) as heartbeat:
    heartbeat.beat(12, 96)
    print("on", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def begun(run: Path, seconds: float) -> "subprocess.Popen[str]":
    words = [sys.executable, "-c", HANGING_RUN, str(run), str(seconds)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "on\n"
    process.stdout.close()
    return process


def test_a_run_is_watched_from_outside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    process = begun(run, 1000)
    try:
        assert watch.main([str(run), "--now"]) == 0
        assert "step 12 (96 samples)" in capsys.readouterr().out
        assert watch.main([str(run), "--timeout", "0.3"]) == 124
        assert "no step for" in last_report(run)["reason"]
        assert f"kill process {process.pid} on" in capsys.readouterr().err
        assert process.poll() is None  # it is only ended where that is asked for
        assert watch.main([str(run), "--timeout", "0.3", "--end", "--grace", "3"]) == 124
        assert process.wait(10) == 124
    finally:
        process.kill()
        process.wait()
    assert watch.main([str(run), "--timeout", "60"]) == 1
    assert "is gone, and has not ended the run" in capsys.readouterr().err


def test_a_run_on_another_machine_is_told_to_leave(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    process = begun(run, 1000)
    try:
        beat = json.loads((run / HEARTBEAT).read_text())
        (run / HEARTBEAT).write_text(json.dumps(beat | {"host": "elsewhere", "pid": 1}))
        assert watch.main([str(run), "--timeout", "0.3", "--end", "--grace", "1.5"]) == 124
        assert "rank 0 was process 1 on elsewhere" in capsys.readouterr().err
        assert process.wait(10) == 124
    finally:
        process.kill()
        process.wait()


def test_a_run_that_ends_under_watch_is_no_hang(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = begun(tmp_path / "run", 1.0)
    assert watch.main([str(tmp_path / "run"), "--timeout", "30"]) == 0
    assert "has ended, at step 12" in capsys.readouterr().err
    assert process.wait(10) == 0


def test_a_training_run_says_where_it_stands_and_leaves_at_a_batch_systems_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["task=digits", "target.loss=null", "budget.samples=1e9", f"hydra.run.dir={run}"]
    process = forked.Popen(
        [sys.executable, "-m", "largebatch", "train", *words], stdout=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 600
        while not (run / HEARTBEAT).exists() or '"stepping"' not in (run / HEARTBEAT).read_text():
            assert time.monotonic() < until
            time.sleep(0.05)
        assert watch.main([str(run), "--now"]) == 0
        said = capsys.readouterr().out
        assert "samples)" in said.splitlines()[0]
        assert "rank 0 is at" in said
        # Somewhere in this project: where, is for the moment of asking to say.
        ours = "|".join(("common", "conf", "distributed", "optim", "records", "schedules", "train"))
        assert re.search(rf"/({ours})/\S+\.py:\d+ in ", said.partition("rank 0 is at")[2])
        assert "Flight Recorder" not in said  # nothing is amiss: one rank has no collectives
        process.send_signal(signal.SIGUSR2)
        assert process.wait(30) == 128 + signal.SIGUSR2
    finally:
        process.kill()
        process.wait()
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
    assert json.loads((run / HEARTBEAT).read_text())["state"] == "ended"
    assert watch.main([str(run), "--now"]) == 0  # nobody is there to be asked
    assert f"{run} has ended, at step" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["RUN"], "holds no heartbeat"),
        (["RUN", "--"], "nothing stands after --"),
        (["RUN", "--now", "--", "true"], "leave out the command"),
        (["RUN", "--restarts", "2"], "--restarts needs the command"),
        (["RUN", "--spares", "x", "--", "true"], "is for --restarts on the nodes of a --hostfile"),
        (["RUN", "--restarts", "1", "--hostfile", "x", "--", "true"], "x cannot be read"),
        (["RUN", "--end", "--", "true"], "--end is for a run that others have started"),
        (["RUN", "--", "no-such-program"], "no-such-program cannot be started"),
        (["RUN/file"], "is no folder"),
    ],
)
def test_what_cannot_be_watched_is_refused(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert watch.main([word.replace("RUN", str(tmp_path)) for word in words]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--timeout", "0"], ["--restarts", "-1"], ["--grace", "nan"]])
def test_a_time_that_is_none_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refusal:
        watch.main([str(tmp_path), *words])
    assert refusal.value.code == 2
    assert "must be a" in capsys.readouterr().err


def test_a_heartbeat_that_was_there_before_is_no_sign_of_life(tmp_path: Path) -> None:
    """Left by a run that was killed at step 5; the command makes none of its own."""
    Heartbeat(tmp_path, 1).beat(5, 40)
    words = ("--timeout", "0.3", "--startup", "1", "--grace", "1", "--wait", "0.1")
    done = watched(str(tmp_path), *words, command=["sleep", "1000"])
    assert (done.returncode, "no heartbeat" in done.stderr) == (124, True)
    assert os.path.exists(tmp_path / HEARTBEAT)
