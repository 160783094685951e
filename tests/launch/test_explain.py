"""What stopped or slowed a run is named; a run that has no trouble is told none."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import forked
import hanging_ranks
import numpy as np
import pytest
from hanging_ranks import ELEMENTS, HANGING_RANK, LAST_STEP
from nic_noise import BEGIN, EVERY, healthy, write_records
from nic_recording import Trees, recording

from largebatch.distributed.ranks import free_port
from largebatch.launch.diagnose import command as explain
from largebatch.launch.diagnose.causes import Cause
from largebatch.launch.diagnose.run_times import read_steps
from largebatch.launch.watch import command as watch
from largebatch.records.heartbeat import process_start
from largebatch.train import command as train_command

NODE = socket.gethostname().partition(".")[0]
Lines = list[dict[str, Any]]


def causes_of(run: Path, *logs: Path, now: float = BEGIN + 1e6) -> list[Cause]:
    return explain.explain(run, logs, now)[0]


def write_run(folder: Path, lines: Lines, summary: dict[str, Any] | None, **beat: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    last = lines[-1]
    beat = {"step": last["step"], "time": BEGIN + last["seconds"], "state": "ended"} | beat
    (folder / "heartbeat.json").write_text(json.dumps({"host": "x0000"} | beat))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))


def steps_of(seed: int, seconds: float = 900.0, slow: tuple[float, float] = (0, 0)) -> Lines:
    """A run of that length: compiling first, a batch that doubles on the way, noise with hiccups.

    Steps that begin in `slow` take twice as long.
    """
    drawn = np.random.default_rng(seed)
    lines: Lines = []
    now, step, samples = 0.0, 0, 0
    while now < seconds:
        batch = 512 if now < seconds / 2 else 1024
        took = batch / 512 * drawn.lognormal(0, 0.08)
        took *= 4 if drawn.random() < 0.01 else 1  # a hiccup
        took *= 30 if step == 0 else 2 if slow[0] <= now < slow[1] else 1
        step, samples, now = step + 1, samples + batch, now + took
        line = {"step": step, "samples": samples, "loss": 2.0, "grad_norm": 1.0, "lr": 0.1}
        line |= {"global_batch_size": batch, "samples_per_second": batch / took, "seconds": now}
        if step % 100 == 0:
            now += 25  # an evaluation, which is no time of steps
            line |= {"eval_loss": 2.0, "seconds": now}
        lines.append(line)
    return lines


FINE = {"status": "exhausted", "steps": 800, "samples": 1, "seconds": 900.0}


@pytest.mark.parametrize("seed", range(12))
def test_a_healthy_run_has_nothing_to_explain(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, steps_of(seed), FINE)
    write_records(tmp_path / "nic", healthy(seed, nodes=(1, 3, 12)[seed % 3]))
    (tmp_path / "output.log").write_text("step 1\nsaved a checkpoint\nclosed the connection\n")
    assert causes_of(tmp_path) == []
    assert explain.main([str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "Nothing unusual found." in told
    assert "Not there: events.jsonl, watch." in told


def test_a_real_run_has_nothing_to_explain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["largebatch"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    words = "task=digits optim=adamw batch.size=64 budget.samples=3e3 target.loss=null"
    assert train_command.main([*words.split(), "hydra.run.dir=run"]) == 0
    assert causes_of(tmp_path / "run", now=time.time()) == []


@pytest.mark.parametrize("seed", range(4))
def test_congestion_is_named_with_the_steps_that_it_slowed(seed: int, tmp_path: Path) -> None:
    write_run(tmp_path, steps_of(seed, slow=(300, 420)), FINE)

    def trouble(node: int, moved: dict[str, Any]) -> None:
        if node == 5:
            moved["cxi5/hni_tx_paused_0"][30:42] += 6e8 * EVERY

    write_records(tmp_path / "nic", healthy(seed, trouble=trouble))
    (cause,) = causes_of(tmp_path)
    assert cause.nodes == ("x0005",)
    assert "times the usual" in cause.what
    assert "transmit pauses on x0005" in cause.what
    slowed = [
        line["step"] for line in steps_of(seed, slow=(300, 420)) if 310 < line["seconds"] < 420
    ]
    first, last = (int(word) for word in cause.what.split()[1:4:2])
    assert first == pytest.approx(slowed[0], abs=15)
    assert last == pytest.approx(slowed[-1], abs=8)
    assert any("cxi5/hni_tx_paused_0" in line for line in cause.evidence)


def test_slow_steps_without_any_counter_are_told_apart(tmp_path: Path) -> None:
    write_run(tmp_path, steps_of(1, slow=(600, 700)), FINE)
    (cause,) = causes_of(tmp_path)
    assert "for no reason on record" in cause.what
    assert "largebatch nic record" in cause.do
    write_records(tmp_path / "nic", healthy(1))
    (cause,) = causes_of(tmp_path)
    assert "no network counter stood out then" in cause.what


def test_a_single_step_that_stalled_is_found(tmp_path: Path) -> None:
    lines = steps_of(2)
    lines[200]["samples_per_second"] /= 90
    write_run(tmp_path, lines, FINE)
    (cause,) = causes_of(tmp_path)
    assert cause.what.startswith("Step 201 took ")


def test_a_rank_that_hangs_is_named_with_its_collective_node_and_counter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three real gloo ranks, one of which goes another way; its node's packets time out."""
    run, port = tmp_path / "run", free_port()
    ranks: list[forked.Popen] = []
    with (
        Trees(tmp_path / "tree", 4) as trees,
        recording(trees, run / "nic", [NODE, "x1", "x2", "x3"], 0.2),
    ):
        for rank in range(3):
            ranks.append(forked.Popen(partial(hanging_ranks.main, run, rank, 3, port)))
        try:
            wait_for_step(run, LAST_STEP)
            trees.set_rate(0, "pct_sct_timeouts", 2000)
            assert watch.main([str(run), "--timeout", "2", "--wait", "600"]) == 124
        finally:
            for process in ranks:
                process.kill()
                process.wait()
    capsys.readouterr()
    causes = causes_of(run, now=time.time())
    assert causes[0].nodes == (NODE,)
    assert causes[0].what.replace("allreduce", "all_reduce") == (
        f"The run stood still: rank {HANGING_RANK} (on {NODE}) never entered collective "
        f"{LAST_STEP + 1}, all_reduce [{ELEMENTS}]; ranks 0, 2 waited in it."
    )
    assert any("goes_another_way" in line for line in causes[0].evidence)
    # A busy machine may slow a step before that, which is a cause of its own.
    stopped = f"When the run stopped, the network showed time-outs on {NODE}:"
    (network,) = [cause for cause in causes if cause.what.startswith(stopped)]
    assert any("pct_sct_timeouts" in line for line in network.evidence)
    # Once the heartbeat is old, the silence itself is one of the causes, and the least of them.
    later = causes_of(run, now=time.time() + 3600)
    assert later[0].what == causes[0].what
    assert f"stopped without a word at step {LAST_STEP}" in later[-1].what


def wait_for_step(run: Path, step: int) -> None:
    end = time.monotonic() + 600
    while True:
        path = run / "heartbeat.json"
        if path.exists() and json.loads(path.read_text())["step"] == step:
            return
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("line", "what", "nodes"),
    [
        # The one that does not answer, not the one that tells it (ALCF, known issues).
        ("ping failed on x4304c1s6b0n0: No reply from x4307c2s6b0n0.hostmgmt2307.cm.aurora.alcf."
         "anl.gov after 87s", "lost nodes: they no longer answered it: nodes x4307c2s6b0n0",
         ("x4307c2s6b0n0",)),
        ("ping failed on x4707c6s4b0n0: Couldn't forward RPC ping(24c93b8c-3434-4fb5-a8f0-"
         "53cff4cbbe42) to child x4707c7s6b0n0.hostmgmt2707.cm.aurora.alcf.anl.gov: Resource "
         "temporarily unavailable", "lost nodes", ("x4707c7s6b0n0",)),
        ("launch failed on x3104c0s1b0n0: Couldn't forward RPC launch(ab751d77-e80a-4c54-b1c2-"
         "4e881f7e8c90) to child x3104c0s31b0n0.hsn.cm.polaris.alcf.anl.gov: Resource temporarily "
         "unavailable", "lost nodes", ("x3104c0s31b0n0",)),
        ("ping failed on x4616c0s4b0n0: Application 047a3c9f-fb41-4595-a2ad-4a4d0ec1b6c1 not found",
         "lost nodes", ("x4616c0s4b0n0",)),  # it has started anew
        ("mpiexec: launch failed on node x4519c2s5b0n0", "lost nodes", ("x4519c2s5b0n0",)),
        ("ping RPC timeout from x4212c7s0b0n0.hostmgmt2212.cm.aurora.alcf.anl.gov after 120s",
         "nodes x4212c7s0b0n0", ("x4212c7s0b0n0",)),
        ("x4100c0s0b0n0: lost heartbeat from x4103c5s2b0n0.hsn", "lost nodes", ("x4103c5s2b0n0",)),
        ("node x4103c5s2b0n0 is not reachable from x4100c0s0b0n0", "lost nodes",
         ("x4103c5s2b0n0",)),
        ("x4100c0s0b0n0: node hydra07 is unreachable", "lost nodes", ("hydra07",)),
        ("srun: error: Node failure on nid001234", "lost nodes", ("nid001234",)),
        ("x4502c1s3b0n0.hsn.cm.aurora.alcf.anl.gov: shepherd died from signal 9", "daemon on a "
         "node was killed: nodes x4502c1s3b0n0; signals 9", ("x4502c1s3b0n0",)),
        ("x4.com: rank 17 died from signal 11 and dumped core", "Ranks died from a signal: nodes "
         "x4; ranks 17; signals 11", ("x4",)),
        ("x4.com: rank 17 died from signal 15", "ranks 17; signals 15", ()),  # told to
        ("x4307c2s6b0n0 comment = StabilityDB 2025-02-24T04:38:14: hbm_controller_errors", "broken "
         "hardware: nodes x4307c2s6b0n0", ("x4307c2s6b0n0",)),
        ("x4102c0s1b0n0: EDAC MC0: 1 UE uncorrectable ECC error", "hardware", ("x4102c0s1b0n0",)),
        ("libfabric:1:2::cxi:core:cxip_cq()<warn> x4204c1s3b0n0: CQ error from peer x4205c1s3b0n0: "
         "UNDELIVERABLE", "errors with other nodes: nodes x4205c1s3b0n0", ("x4205c1s3b0n0",)),
        ("libfabric:16642:1701636928::cxi:core:cxip_cq_eq_progress():531<warn> x4204c1s3b0n0: "
         "Cassini Event Queue overflow detected.", "event queue ran over", ("x4204c1s3b0n0",)),
        ("start failed on x4102c5s2b0n0: No VNIs available in internal allocator", "no virtual "
         "network", ()),
        ("[rank3]: Connection closed by peer [10.0.0.1]:33", "Connections were closed", ()),
        ("torch.OutOfMemoryError: XPU out of memory. Tried", "Memory ran out", ()),
        ("=>> PBS: job killed: walltime 3624 exceeded", "job's time was over", ()),
    ],
)  # fmt: skip
def test_sentences_of_the_launcher_are_understood(
    line: str, what: str, nodes: tuple[str, ...], tmp_path: Path
) -> None:
    write_run(tmp_path / "run", steps_of(0, 60), FINE)
    (tmp_path / "job.o123").write_text(f"starting\n{line}\nend\n")
    (cause,) = causes_of(tmp_path / "run", tmp_path / "job.o123")
    assert what in cause.what
    assert cause.nodes == nodes
    assert cause.evidence == (f"job.o123:2: {line[:160]}",)


def test_the_first_death_weighs_more_than_its_echo(tmp_path: Path) -> None:
    write_run(tmp_path, steps_of(0, 60), None, state="stepping")
    lines = ["[rank5]: Connection closed by peer"] * 500
    lines += ["ping failed on x4519c2s5b0n0", "x1: rank 7 died from signal 15"]
    (tmp_path / "output.log").write_text("\n".join(lines))
    causes = causes_of(tmp_path)
    assert "x4519c2s5b0n0" in causes[0].what
    assert "(500 times)" in causes[-1].what
    assert len(str(causes[-1]).splitlines()) < 15


def test_what_a_run_says_of_its_end_is_told(tmp_path: Path) -> None:
    lines = steps_of(0, 60)
    lines[-1] |= {"loss": None, "grad_norm": None}
    lines[-2]["grad_norm"] = 50.0
    write_run(tmp_path / "a", lines, {"status": "diverged", "steps": len(lines)})
    (cause,) = causes_of(tmp_path / "a")
    assert "diverged at step" in cause.what
    assert "grown to 50 times its median" in cause.what
    assert cause.evidence[-1].startswith(f"metrics.jsonl:{len(lines)}: ")
    stopped = {"status": "diverged", "steps": 60, "reason": "grad_norm 50 is above its bound 20"}
    write_run(tmp_path / "c", steps_of(0, 60), stopped)
    assert "step 60: grad_norm 50 is above its bound 20." in causes_of(tmp_path / "c")[0].what
    failed = {"status": "failed", "steps": 9, "error": "RuntimeError: Timed out waiting 8000ms"}
    write_run(tmp_path / "b", steps_of(0, 60), failed)
    (cause,) = causes_of(tmp_path / "b")
    assert "failed after step 9: RuntimeError: Timed out waiting 8000ms" in cause.what
    write_run(tmp_path / "c", steps_of(0, 60), {"status": "interrupted", "steps": 9, "signal": 15})
    (cause,) = causes_of(tmp_path / "c")
    assert "interrupted by SIGTERM after step 9" in cause.what
    stopped = {"status": "interrupted", "steps": 9, "reason": "300 s before its job's end at 18:00"}
    write_run(tmp_path / "c", steps_of(0, 60), stopped)
    (cause,) = causes_of(tmp_path / "c")
    assert "interrupted after step 9: 300 s before its job's end at 18:00." in cause.what
    write_run(tmp_path / "d", steps_of(0, 60), None, state="stepping", phase="save", step=4)
    (cause,) = causes_of(tmp_path / "d")
    assert "stopped without a word at step 4, in save, " in cause.what
    write_run(tmp_path / "e", steps_of(0, 60), None, state="starting", step=0)
    (cause,) = causes_of(tmp_path / "e")
    assert "never made a step" in cause.what


def test_a_run_that_is_alive_has_not_stopped(tmp_path: Path) -> None:
    write_run(tmp_path, steps_of(0, 60), None, state="stepping", time=BEGIN + 1e6 - 60)
    assert causes_of(tmp_path) == []
    assert "running; at step 14, heard of" in explain.ending(tmp_path, BEGIN + 1e6)
    assert explain.ending(tmp_path, BEGIN + 1e6).endswith(", 60 s ago")
    write_run(tmp_path, steps_of(0, 60), None, state="stepping", phase="save", time=BEGIN)
    assert causes_of(tmp_path, now=BEGIN + 110) == []


def test_a_step_that_does_not_come_is_said_with_the_usual_time_of_one(tmp_path: Path) -> None:
    write_run(tmp_path, steps_of(0, 60), None, state="stepping", time=BEGIN + 1e6 - 100)
    (cause,) = causes_of(tmp_path)
    assert cause.what.startswith("No step for 100 s after step 14, where one takes 4.39 s")


def named(pid: int) -> dict[str, Any]:
    """As a heartbeat names a process of this machine."""
    return {"host": socket.gethostname(), "pid": pid, "pid_started": process_start(pid)}


def test_a_rank_that_is_stopped_is_named(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        beat = {
            "host": socket.gethostname(),
            "pid": process.pid,
            "pid_started": process_start(process.pid),
        }
        write_run(tmp_path, steps_of(0, 60), None, state="stepping", time=BEGIN + 1e6, **beat)
        assert causes_of(tmp_path) == []
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        (cause,) = causes_of(tmp_path)
        process.kill()
    assert cause.what.startswith("Rank 0 is stopped (SIGSTOP, or Ctrl-Z)")
    assert cause.do == f"kill -CONT {process.pid}"


def test_a_run_whose_process_is_gone_from_this_machine_has_stopped(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        words = {
            "host": socket.gethostname(),
            "pid": process.pid,
            "pid_started": process_start(process.pid),
        }
        beat = {"state": "stepping", "time": BEGIN + 1e6 - 1} | words
        write_run(tmp_path, steps_of(0, 60), None, **beat)
        assert causes_of(tmp_path) == []
        process.kill()
    (cause,) = causes_of(tmp_path)
    assert "stopped without a word" in cause.what


def test_steps_before_a_resumption_have_no_time_of_day(tmp_path: Path) -> None:
    write_run(tmp_path, steps_of(0, 60), FINE)
    steps = read_steps(tmp_path, [])
    assert steps is not None
    assert steps.times[-1] == pytest.approx(BEGIN + steps_of(0, 60)[-1]["seconds"])
    assert np.isfinite(steps.times).all()
    (tmp_path / ".hydra").mkdir()
    for samples in (512, 5120):
        (tmp_path / ".hydra" / f"resumed-{samples}-config.yaml").touch()
    steps = read_steps(tmp_path, [])
    assert steps is not None
    made_before = [line["samples"] <= 5120 for line in steps_of(0, 60)]
    assert 0 < sum(made_before) < len(made_before)
    assert np.isnan(steps.times).tolist() == made_before


def test_events_are_told_by_kind_with_their_reasons(tmp_path: Path) -> None:
    write_run(tmp_path, steps_of(0, 60), FINE)
    events = [
        {"time": BEGIN + i, "step": 10 + i, "samples": 1, "kind": kind, "reason": f"because {i}"}
        for i, kind in enumerate(["skip", "skip", "rollback", "stop"])
    ]
    text = "".join(json.dumps(event) + "\n" for event in events) + '{"half": '
    (tmp_path / "events.jsonl").write_text(text)
    stop, rollback, skip = causes_of(tmp_path)
    assert stop.what == "The guard ended the run, at step 13: because 3."
    assert rollback.what.startswith("The guard took the run back to a checkpoint, at step 12")
    assert skip.what == "The guard skipped steps, 2 times, from step 10 to 11: because 1."
    assert skip.evidence[1].startswith("events.jsonl:2: ")


def test_a_node_whose_record_ends_early_is_named(tmp_path: Path) -> None:
    write_run(tmp_path, steps_of(0), None, state="stepping")
    records = healthy(0)
    write_records(tmp_path / "nic", records)
    path = tmp_path / "nic" / "nic-x0004.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:40]))
    causes = causes_of(tmp_path)
    assert causes[0].what == ("x0004 stopped recording long before the other nodes: gone, or hung.")
    assert causes[0].nodes == ("x0004",)


def test_a_run_that_was_only_asked_where_it_stands_did_not_stand_still(tmp_path: Path) -> None:
    write_run(tmp_path, steps_of(0, 60), FINE)
    answers = tmp_path / "watch" / "2026-01-01_00-00-00"
    answers.mkdir(parents=True)
    held = {"reason": "run: step 3 (24 samples)", "culprits": [1], "silent": [], "findings": []}
    (answers / "report.json").write_text(json.dumps(held))
    assert causes_of(tmp_path) == []


def test_a_long_record_is_streamed(tmp_path: Path) -> None:
    lines = steps_of(0, 60)
    write_run(tmp_path, lines, {"status": "diverged", "steps": 20_000})
    causes_of(tmp_path)  # what is imported on the way is not the record's
    names = {f"trust_ratio/{layer}": 0.5 for layer in range(40)}
    text = "".join(
        json.dumps(lines[-1] | {"step": step, "seconds": float(step)} | names) + "\n"
        for step in range(1, 8001)
    )
    (tmp_path / "metrics.jsonl").write_text(text)
    event = {"time": BEGIN, "step": 1, "samples": 1, "kind": "skip", "reason": "large"}
    (tmp_path / "events.jsonl").write_text((json.dumps(event) + "\n") * 8000)
    tracemalloc.start()
    try:
        skips, *_ = [cause for cause in causes_of(tmp_path) if "skipped" in cause.what]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "8000 times" in skips.what
    assert peak < len(text) / 4  # each line held would be ten times the text


def test_programs_read_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, steps_of(0, 60), {"status": "interrupted", "steps": 9, "signal": 2})
    assert explain.main([str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["looked_at"] == ["summary.json", "metrics.jsonl", "heartbeat.json"]
    assert [cause["weight"] for cause in told["causes"]] == [30]


def test_a_folder_without_a_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain.main([str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert explain.main([str(tmp_path), "--log", str(tmp_path / "none")]) == 2
    assert "--log must be a file or a folder" in capsys.readouterr().err
