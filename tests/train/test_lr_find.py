"""The learning-rate finder: what it sweeps, what it finds, when it says that it found nothing."""

import csv
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import forked
import pytest
from hydra import compose, initialize_config_module

from largebatch.common.errors import ConfigError
from largebatch.conf.config import typed
from largebatch.conf.sweep_config import LRFindConfig
from largebatch.schedules import ConstantBatch, GeometricSweep, Plan
from largebatch.train.lr_find.results import COLUMNS, append, check_table
from largebatch.train.lr_find.search import Found, LRFinder, NothingFound, find
from largebatch.train.run_spec import make_plan

Train = Callable[..., int]
ReadRun = Callable[[Path], tuple[list[dict[str, Any]], dict[str, Any]]]
Command = Callable[..., "subprocess.CompletedProcess[str]"]

SWEEP = ("mode=lr_find", "task=digits", "optim=sgd", "batch.size=64")

# ½ Σ curvature (w - c)² with a centre c of its own for each sample: linear gradients, so that the
# largest stable learning rate is known, and a floor of the loss.
BOWL = """
import torch

class Bowl:
    num_train, num_eval, replacement = 512, 512, False

    def __init__(self, curvature, floor=0.0):
        self.curvature = curvature * torch.tensor([1.0, 0.3, 0.1])
        self.floor = floor
        self.centres = torch.randn(512, 3, generator=torch.Generator().manual_seed(7))

    def train_batch(self, indices):
        return (self.centres[torch.from_numpy(indices)],)

    def eval_batch(self, indices):
        assert len(indices) <= 2, "a sweep evaluates nothing"  # two are looked at before it
        return self.train_batch(indices)

    def loss(self, model, batch):
        (centres,) = batch
        return 0.5 * (self.curvature * model(centres) ** 2).sum(1).mean() + self.floor

    def provenance(self):
        return {"data": "a bowl", "data_hash": "0"}


class Place(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((3,), 3.0))

    def forward(self, centres):
        return self.weight - centres
"""


@pytest.fixture
def bowl(tmp_path: Path) -> Callable[..., list[str]]:
    """The overrides of a sweep with plain SGD over a bowl of the largest curvature given."""
    (tmp_path / "lr_find_bowl.py").write_text(BOWL)

    def overrides(curvature: float, momentum: float = 0.0) -> list[str]:
        return [
            "mode=lr_find", "task=custom", "task._target_=lr_find_bowl.Bowl", "model=custom",
            f"+task.curvature={curvature}", "model._target_=lr_find_bowl.Place", "optim=sgd",
            f"optim.momentum={momentum}", "optim.nesterov=false", "batch.size=64",
        ]  # fmt: skip

    return overrides


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def planned(*overrides: str) -> Plan:
    with initialize_config_module("largebatch.conf", version_base="1.3"):
        return make_plan(typed(compose("train", list(overrides))))


# What it finds


@pytest.mark.parametrize(("curvature", "momentum"), [(4.0, 0.0), (400.0, 0.0), (4.0, 0.9)], ids=str)
def test_sgd_blows_up_at_the_largest_stable_learning_rate(
    bowl: Callable[..., list[str]], curvature: float, momentum: float,
    train: Train, read_run: ReadRun, tmp_path: Path,
) -> None:  # fmt: skip
    # Heavy-ball SGD on a quadratic is stable below 2 (1 + momentum) / curvature. Each learning rate
    # is 1.05 times the one before, and past the limit noise takes a few steps to grow.
    limit = 2.0 * (1.0 + momentum) / curvature
    assert train(*bowl(curvature, momentum), f"mode.low={limit / 1e3}", f"mode.high={limit * 10}",
                 "mode.points=190", "hydra.run.dir=run") == 0  # fmt: skip
    _, summary = read_run(tmp_path / "run")
    found = summary["lr_find"]
    assert 0.95 * limit < found["lr_at_blow_up"] < 1.5 * limit
    assert found["lr_at_minimum"] < 1.05 * limit
    assert found["lr_suggested"] == pytest.approx(found["lr_at_blow_up"] / 10)


def test_a_sweep_leaves_what_can_be_read_off_its_lines(
    train: Train, read_run: ReadRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*SWEEP, "seed=3", "hydra.run.dir=runs/one") == 0
    lines, summary = read_run(tmp_path / "runs" / "one")
    found = summary["lr_find"]
    lrs = [line["lr"] for line in lines]
    assert lrs[0] == pytest.approx(1e-5, rel=1e-12)
    ratio = (10 / 1e-5) ** (1 / 99)
    assert [b / a for a, b in pairwise(lrs)] == pytest.approx([ratio] * (len(lrs) - 1), rel=1e-9)

    # By hand from the lines: a learning rate is judged by the loss of the line after it.
    losses = [line["loss"] for line in lines]
    middle = [sorted(losses[i - 2 : i + 3])[2] for i in range(2, len(losses) - 2)]
    lowest = min(range(len(middle)), key=middle.__getitem__)
    assert found["loss_at_minimum"] == middle[lowest]
    assert found["lr_at_minimum"] == lrs[lowest + 2 - 1]
    # It ended with the first place whose median, known two lines later, is past three times the
    # least; the line of one step more was under way.
    assert [m > 3.0 * middle[lowest] for m in middle[lowest:-1]].count(True) == 1
    assert middle[-2] > 3.0 * middle[lowest] >= middle[-3]
    assert found["lr_at_blow_up"] == lrs[len(middle) - 2 + 2 - 1]
    assert found["lr_suggested"] == found["lr_at_blow_up"] / 10

    # The target of the task is none of a sweep.
    assert (summary["status"], summary["target_loss"]) == ("exhausted", None)
    assert summary["eval_loss"] is None
    assert not any("eval_loss" in line for line in lines)
    assert (tmp_path / "runs/one/lr_find.png").read_bytes().startswith(b"\x89PNG")
    (row,) = table(tmp_path / "runs" / "lr_find.csv")
    assert tuple(row) == COLUMNS
    assert [row[name] for name in ("task", "model", "optimizer", "batch_size", "seed", "run")] == [
        "digits", "digits_mlp", "sgd", "64", "3", "one",
    ]  # fmt: skip
    assert (row["data_parallel_size"], row["scaling"]) == ("1", "none")
    assert float(row["lr_at_blow_up"]) == found["lr_at_blow_up"]
    out = capsys.readouterr().out
    assert f"{found['lr_suggested']:.4g}" in out
    assert "sgd on digits_mlp, batch 64, 1 rank(s)" in out


@pytest.mark.matrix
def test_two_ranks_find_what_one_finds(
    bowl: Callable[..., list[str]],
    train: Train, command: Command, read_run: ReadRun, tmp_path: Path,
) -> None:  # fmt: skip
    overrides = [*bowl(4.0), "mode.low=1e-2", "mode.points=60"]
    assert train(*overrides, "hydra.run.dir=runs/1") == 0
    done = command("train", *overrides, "engine.nproc=2", "hydra.run.dir=runs/2")
    assert done.returncode == 0, done.stderr
    (one, found), (two, found_by_two) = (read_run(tmp_path / "runs" / name) for name in "12")
    assert len(one) == len(two) < 61
    assert found_by_two["lr_find"] == pytest.approx(found["lr_find"], rel=1e-5)
    worlds = [row["data_parallel_size"] for row in table(tmp_path / "runs" / "lr_find.csv")]
    assert worlds == ["1", "2"]


def test_the_table_keeps_every_row(train: Train, tmp_path: Path) -> None:
    path = tmp_path / "found" / "lr_find.csv"
    before = ""
    # The last is the first again: a row more, too.
    for run, size in enumerate((32, 128, 32)):
        assert train(*SWEEP, f"batch.size={size}", f"hydra.run.dir=found/{run}") == 0
        assert path.read_text().startswith(before)
        before = path.read_text()
    rows = table(path)
    assert [(row["run"], row["batch_size"]) for row in rows] == [
        ("0", "32"),
        ("1", "128"),
        ("2", "32"),
    ]
    assert rows[2] | {"run": "0"} == rows[0]


APPEND = """
import sys
from pathlib import Path
from largebatch.train.lr_find.results import COLUMNS, append
while not Path("go").exists():
    pass
for number in range(100):
    append(Path("lr_find.csv"), dict.fromkeys(COLUMNS, f"{sys.argv[1]}-{number}"))
"""


def test_rows_of_several_processes_stay_whole(tmp_path: Path) -> None:
    writers = [forked.Popen([sys.executable, "-c", APPEND, str(i)], cwd=tmp_path) for i in range(3)]
    try:
        (tmp_path / "go").touch()
        assert [writer.wait(timeout=600) for writer in writers] == [0, 0, 0]
    finally:
        for writer in writers:
            writer.kill()
    rows = table(tmp_path / "lr_find.csv")
    assert all(len(set(row.values())) == 1 for row in rows)
    assert {row["run"] for row in rows} == {f"{i}-{n}" for i in range(3) for n in range(100)}
    assert len(rows) == 300


def test_a_row_waits_for_the_tables_lock(tmp_path: Path) -> None:
    path = tmp_path / "lr_find.csv"
    writer = threading.Thread(target=append, args=(path, dict.fromkeys(COLUMNS, "a")))
    with path.open("ab") as held:
        fcntl.flock(held.fileno(), fcntl.LOCK_EX)
        writer.start()
        writer.join(timeout=0.3)
        assert writer.is_alive()
        assert path.read_text() == ""
    writer.join(timeout=600)
    assert table(path) == [dict.fromkeys(COLUMNS, "a")]


def test_a_table_with_other_columns_is_refused_before_the_sweep(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "lr_find.csv").write_text("optimizer,lr\nsgd,0.1\n")
    with pytest.raises(ConfigError, match="other columns"):
        check_table(tmp_path / "runs" / "one")
    assert train(*SWEEP, "hydra.run.dir=runs/one") == 2
    assert "lr_find.csv has other columns" in capsys.readouterr().err
    assert (tmp_path / "runs" / "lr_find.csv").read_text() == "optimizer,lr\nsgd,0.1\n"


# What it sweeps


def test_the_sweep_is_geometric_from_low_to_high_and_one_step_longer() -> None:
    plan = planned("mode=lr_find", "mode.low=1e-4", "mode.high=1", "mode.points=9", "optim.lr=0.3",
                   "batch.size=32", "lr=cosine", "lr.warmup_samples=1000")  # fmt: skip
    steps = list(plan)
    expected = [1e-4 * 10 ** (k / 2) for k in range(9)]
    assert [point.lr for point in steps] == pytest.approx([*expected, 1.0], rel=1e-12)
    assert {point.batch_size for point in steps} == {32}


RAMPUP = ("batch=rampup", "batch.start=64", "batch.increment=64", "batch.ramp_samples=1e4",
          "batch.size=1024")  # fmt: skip


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (["batch=constant", "batch.size=96"], 96),
        ([*RAMPUP], 1024),
        (["batch=stages", "batch.spec='0:64 1e5:320'"], 320),
        (["batch=late_switch", "batch.start=64", "batch.size=512"], 512),
        (["batch=loss_triggered", "batch.start=64", "batch.spec='3:128 2.5:448'"], 448),
        (["batch=sqrt_noise", "batch.start=64", "batch.factor=2", "batch.size=2048"], 2048),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_sweep_takes_the_batch_size_that_the_ramp_ends_at(batch: list[str], size: int) -> None:
    assert {point.batch_size for point in planned("mode=lr_find", *batch)} == {size}


def test_what_else_moves_with_the_batch_is_as_the_rule_has_it_there() -> None:
    # adam_sde (2205.10287): 1 - beta by kappa, eps over its root; decay per sample, so by the root.
    at = planned("mode=lr_find", *RAMPUP, "scaling=adam_sde", "scaling.base_batch=256",
                 "optim=adamw", "optim.betas=[0.9,0.99]", "optim.eps=1e-8",
                 "optim.weight_decay=0.1").at(0)  # fmt: skip
    assert at.hyper.betas == pytest.approx((0.6, 0.96))
    assert at.hyper.eps == pytest.approx(0.5e-8)
    assert at.hyper.weight_decay == pytest.approx(0.2)
    assert at.lr == pytest.approx(1e-5)


def test_the_weight_decay_of_a_timescale_is_that_of_the_run_not_of_the_sweep() -> None:
    # batch / (lr decay samples) stays (2405.13698): decay by kappa / root(kappa), over twice the
    # samples that were tuned.
    at = planned("mode=lr_find", "batch.size=1024", "scaling=sqrt", "scaling.base_batch=256",
                 "scaling.hold=timescale", "scaling.base_samples=1e6", "budget.samples=2e6",
                 "optim=adamw", "optim.weight_decay=0.1").at(0)  # fmt: skip
    assert at.hyper.weight_decay == pytest.approx(0.1 * 2 / 2)


def test_the_sde_s_clock_is_that_of_the_run_not_of_the_sweep() -> None:
    # kappa / duration = 4 / 2 in the place of kappa; the sweep has its own rates.
    at = planned("mode=lr_find", "batch.size=1024", "scaling=adam_sde", "scaling.base_batch=256",
                 "scaling.duration_exponent=0.5", "scaling.base_samples=1e6",
                 "budget.samples=2e6", "optim=adamw", "optim.betas=[0.9,0.99]").at(0)  # fmt: skip
    assert at.hyper.betas == pytest.approx((0.8, 0.98))
    assert at.lr == pytest.approx(1e-5)


def test_the_optimizer_is_given_what_the_rule_has_at_that_batch_size(
    train: Train, read_run: ReadRun, tmp_path: Path
) -> None:
    assert train("mode=lr_find", "task=digits", "optim=adamw", "optim.betas=[0.9,0.99]",
                 "batch=rampup", "batch.start=64", "batch.increment=64", "batch.ramp_samples=1e4",
                 "batch.size=256", "scaling=adam_sde", "scaling.base_batch=128",
                 "hydra.run.dir=run") == 0  # fmt: skip
    lines, _ = read_run(tmp_path / "run")
    assert {line["global_batch_size"] for line in lines} == {256}
    assert lines[0]["batch_change"]["betas"] == pytest.approx([0.8, 0.98])


def test_a_sweep_fits_its_budget() -> None:
    sweep = GeometricSweep(first=1.0, last=2.0, sweep_samples=100)
    with pytest.raises(ValueError, match="sweep_samples is 100, longer than the run of 99"):
        Plan(ramp=ConstantBatch(size=1), curve=sweep, budget_samples=99, base_lr=1.0, base_batch=1)
    assert sweep.factor(50, 10, 110) == pytest.approx(math.sqrt(2.0))
    with pytest.raises(ValueError, match="first must be a number > 0, got 0"):
        GeometricSweep(first=0.0, last=1.0, sweep_samples=1)


def test_the_plan_of_a_sweep_is_the_sweep(command: Command) -> None:
    done = command("plan", "mode=lr_find", *RAMPUP, "--json")
    assert done.returncode == 0, done.stderr
    (stage,) = json.loads(done.stdout)["stages"]
    assert (stage["batch_size"], stage["num_steps"]) == (1024, 101)
    assert (stage["lr"], stage["last_lr"]) == pytest.approx((1e-5, 10.0))


# How it judges

FALLS_AND_RISES = [4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 4.0, 8.0, 16.0]
LRS = [float(number) for number in range(1, 15)]
# The second loss of 4, past three times the least, is what the learning rate 11 left.
SAYS = Found(lr_suggested=1.1, lr_at_minimum=3.0, lr_at_blow_up=11.0, loss_at_minimum=1.0)


def test_a_learning_rate_is_judged_by_the_loss_that_it_leaves() -> None:
    assert find(LRS, FALLS_AND_RISES, LRFindConfig()) == SAYS


def test_a_single_spike_is_no_blow_up() -> None:
    spiked = [*FALLS_AND_RISES]
    spiked[6] = 1e6
    assert find(LRS, spiked, LRFindConfig()) == SAYS


@pytest.mark.parametrize("last", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_a_blow_up(last: float) -> None:
    found = find(LRS[:8], [*FALLS_AND_RISES[:7], last], LRFindConfig())
    assert found == Found(0.7, 3.0, 7.0, 1.0)


def test_the_run_ends_once_the_blow_up_has_neighbours_on_both_sides() -> None:
    finder = LRFinder(LRFindConfig())
    lines = [
        {"lr": lr, "loss": loss, "grad_norm": 1.0}
        for lr, loss in zip(LRS, FALLS_AND_RISES, strict=True)
    ]
    assert [finder(line) for line in lines] == [False] * 13 + [True]
    assert finder.outcome("exhausted")["lr_find"]["lr_at_blow_up"] == 11.0
    assert finder.outcome("interrupted") == {}


def test_a_gradient_that_is_not_finite_is_a_blow_up_too() -> None:
    finder = LRFinder(LRFindConfig())
    for lr, loss in zip(LRS[:8], FALLS_AND_RISES[:8], strict=True):
        finder({"lr": lr, "loss": loss, "grad_norm": math.inf if lr == 8.0 else 1.0})
    assert finder.outcome("diverged")["status"] == "exhausted"
    assert finder.outcome("diverged")["lr_find"]["lr_at_blow_up"] == 7.0


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([math.nan, 1.0], "before the first update"),
        ([], "before the first update"),
        ([4.0, 4.0, 4.0, 4.0, 20.0, 40.0, 80.0, 99.0], "after 3 of the 5 .* lower mode.low"),
        ([4.0, 3.0, 2.0, 2.0, 2.0, 5.0, 5.9, 5.9], "up to 7: raise mode.high"),
        ([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 9.0, 9.0, 9.0], "only rose from 1 .* lower mode.low"),
        ([2.0, 1.0, -1.0, -2.0, -2.0, -2.0, -2.0], "fell to -2, .* needs a loss above 0"),
    ],
)
def test_a_sweep_that_says_nothing_is_an_error(losses: list[float], said: str) -> None:
    with pytest.raises(NothingFound, match=said):
        find(LRS[: len(losses)], losses, LRFindConfig())


# When it fails


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["mode.high=1e-3", "mode.points=20"], "up to 0.001: raise mode.high"),
        (["mode.low=30", "mode.high=1e4", "mode.points=20"], "lower mode.low"),
    ],
    ids=["no blow-up", "too early"],
)
def test_a_sweep_without_a_finding_fails_and_adds_no_row(
    overrides: list[str], said: str,
    train: Train, read_run: ReadRun, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert train(*SWEEP, *overrides, "hydra.run.dir=runs/one") == 1
    _, summary = read_run(tmp_path / "runs" / "one")
    assert summary["status"] == "failed"
    assert said in summary["error"]
    assert "lr_find" not in summary
    assert capsys.readouterr().err.endswith(f"\nlargebatch: {summary['error']}\n")
    assert not (tmp_path / "runs" / "lr_find.csv").exists()
    assert (tmp_path / "runs" / "one" / "lr_find.png").exists()  # shows why


def test_a_loss_that_is_not_finite_from_the_start_fails(
    bowl: Callable[..., list[str]],
    train: Train, read_run: ReadRun, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert train(*bowl(4.0), "+task.floor=nan", "hydra.run.dir=runs/one") == 1
    lines, summary = read_run(tmp_path / "runs" / "one")
    assert len(lines) <= 2
    assert summary["status"] == "failed"
    assert "not finite before the first update" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "lr_find.csv").exists()


def test_an_interrupted_sweep_says_nothing(read_run: ReadRun, tmp_path: Path) -> None:
    process = forked.Popen(
        [sys.executable, "-m", "largebatch", "train", *SWEEP, "mode.low=1e-9", "mode.high=1e-8",
         "mode.points=1e7", "hydra.run.dir=runs/one"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=os.environ,
    )  # fmt: skip
    metrics = tmp_path / "runs" / "one" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 600
        while not metrics.exists() or metrics.read_text().count("\n") < 20:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 143
    assert "Traceback" not in errors
    _, summary = read_run(tmp_path / "runs" / "one")
    assert summary["status"] == "interrupted"
    assert "lr_find" not in summary
    assert not (tmp_path / "runs" / "lr_find.csv").exists()


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["mode.low=1", "mode.high=0.5"], ["mode.low must be < mode.high = 0.5, got 1"]),
        (["mode.low=0"], ["mode.low", "> 0"]),
        (["mode.points=5"], ["mode.points", "at least 6", "5"]),
        (["mode.blow_up=1"], ["mode.blow_up", "> 1"]),
        (["+mode.colour=blue"], ["colour"]),
        (["study=digits"], ["leave out study, or mode=lr_find"]),
        (["resume=auto"], ["leave resume and checkpoint.every_samples at null"]),
        (["checkpoint.every_samples=640"], ["leave resume and checkpoint.every_samples at null"]),
        (["engine.nproc=3"], ["64", "63 or 66"]),
    ],
    ids=lambda value: value[0] if "=" in value[0] else "",
)
def test_what_cannot_be_swept_is_refused_before_it_starts(
    overrides: list[str], named: list[str],
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert train(*SWEEP, *overrides, "hydra.run.dir=run") == 2
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1
    assert all(word in sentence for word in named), sentence
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_study_does_not_sweep(command: Command, tmp_path: Path) -> None:
    done = command("sweep", "study=digits", "mode=lr_find", "hydra.sweep.dir=study")
    assert done.returncode == 2
    assert "leave out study, or mode=lr_find" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("metrics.jsonl"))
