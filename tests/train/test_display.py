"""What a run shows: its first line, how far it is, and how it ended."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from largebatch.common.text import LineField, fitted
from largebatch.conf.config import TargetConfig
from largebatch.records.summary import in_words, line_of_sweep
from largebatch.train.reporting.display import Display, begun


def spec(target: float | None = 2.2, first: int = 256, resumed: int | None = None) -> Any:
    return SimpleNamespace(
        config=SimpleNamespace(
            target=TargetConfig(loss=target),
            budget=SimpleNamespace(samples=1_000_000),
        ),
        plan=SimpleNamespace(
            final_batch_size=256, at=lambda samples: SimpleNamespace(batch_size=first)
        ),
        resumption=None if resumed is None else SimpleNamespace(samples=resumed),
        task="bytes", model="byte_mlp", optimizer="lamb", folder=Path("runs/mine"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("made", "micro", "ranks", "line"),
    [
        ({}, 256, 1, "batch 256 · 1 M samples, target 2.2 · cpu · runs/mine"),
        ({}, 16, 4, "batch 256 = 16 x 4 accumulated x 4 ranks · 1 M samples, target 2.2 · cpu"),
        ({}, 128, 2, "batch 256 = 128 x 2 ranks · 1 M samples, target 2.2 · cpu · runs/mine"),
        ({"target": None, "first": 16}, 256, 1, "batch 16 to 256 · 1 M samples · cpu · runs/mine"),
        ({"resumed": 512}, 256, 1, "cpu · resumed at 512 samples · runs/mine"),
    ],
)
def test_the_first_line_says_what_is_trained(
    made: dict[str, Any], micro: int, ranks: int, line: str
) -> None:
    told = begun(spec(**made), 30_912, micro, ranks, "cpu")
    assert told.startswith("bytes · byte_mlp (30.9 k parameters) · lamb · batch ")
    assert line in told


def shown(width: int, terminal: bool, times: list[float]) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, color_system=None)
    clock = iter([0.0, *times])
    with Display(spec(), console, clock=lambda: next(clock)) as display:
        for number, _ in enumerate(times, 1):
            line = {"samples": 20_000 * number, "lr": 0.02, "loss": 2.61 * 1e27}
            display(line | ({"eval_loss": 2.514} if number == 1 else {}))
    return file.getvalue()


def test_off_a_terminal_lines_become_rarer() -> None:
    lines = shown(80, False, [*map(float, range(1, 61))]).splitlines()
    assert [line[:3] for line in lines] == ["20%", "50%", "96%"]  # at 10 s, 15 later, 22.5 later
    assert lines[0] == (
        "20% · 200 k of 1 M samples · 20 k samples/s · lr 0.02 · loss 2.61e+27 · "
        "eval 2.514 (target 2.2) · 0:40 left"
    )


@pytest.mark.parametrize("width", [40, 80, 120])
def test_on_a_terminal_a_line_is_never_broken(width: int) -> None:
    told = shown(width, True, [1.0, 2.0, 3.0])
    drawn = [line for line in told.replace("\r", "\n").split("\n") if "%" in line]
    assert drawn
    assert all(len(line.replace("\x1b[2K", "")) <= width for line in drawn)
    assert any("loss 2.61e+27" in line for line in drawn)


def test_what_matters_least_goes_first() -> None:
    line = [("12%", 3), ("120 k of 1 M samples", 0), ("loss 2.61", 2), ("1:00 left", 1)]
    parts = [LineField(*field) for field in line]
    assert fitted(parts, 80) == "12% · 120 k of 1 M samples · loss 2.61 · 1:00 left"
    assert fitted(parts, 30) == "12% · loss 2.61 · 1:00 left"
    assert fitted(parts, 16) == "12% · loss 2.61"
    assert fitted(parts, 3) == "12%"
    assert fitted(parts, 2) == ""


@pytest.mark.parametrize(
    ("summary", "words"),
    [
        ({"status": "reached", "target_loss": 2.2, "eval_loss": 2.19},
         "reached 2.2 after 1,000 steps · 64,000 samples · 1.5 s of training · "
         "evaluation loss 2.1900 · runs/a"),
        ({"status": "exhausted", "target_loss": None, "eval_loss": None},
         "budget spent after 1,000 steps · 64,000 samples · 1.5 s of training · runs/a"),
        ({"status": "exhausted", "target_loss": None, "lr_find": {"lr_suggested": 0.1}},
         "learning rates swept after 1,000 steps · 64,000 samples · 1.5 s of training · runs/a"),
        ({"status": "exhausted", "target_loss": 2.2},
         "budget spent without reaching 2.2 after 1,000 steps · 64,000 samples · "
         "1.5 s of training · runs/a"),
        ({"status": "diverged", "target_loss": None, "reason": "loss is nan"},
         "diverged after 1,000 steps · 64,000 samples · 1.5 s of training · loss is nan · runs/a"),
        ({"status": "reached", "target_loss": None, "target_metric": "accuracy",
          "target_value": 0.9, "target_direction": "max", "eval_loss": 0.2,
          "metrics": {"accuracy": 0.91}},
         "reached accuracy 0.9 after 1,000 steps · 64,000 samples · 1.5 s of training · "
         "evaluation loss 0.2000 · accuracy 0.9100 · runs/a"),
    ],
)  # fmt: skip
def test_how_a_run_ended_is_one_line(summary: dict[str, Any], words: str) -> None:
    told = summary | {"steps": 1000, "samples": 64_000, "seconds": 1.5}
    assert in_words(told, Path("runs/a")) == words


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (None, "3 of 8 · optim=lamb batch.size=1024 → reached 2.2 after 86 steps · 88,064 samples "
         "· 1.5 s of training · evaluation loss 2.1900 · accuracy 0.9100 · s/2"),
        (120, "3 of 8 · optim=lamb batch.size=1024 → reached 2.2 after 86 steps · evaluation loss "
         "2.1900 · accuracy 0.9100 · s/2"),
        (80, "3 of 8 · optim=lamb batch.size=1024 → reached 2.2 after 86 steps · s/2"),
        (69, "optim=lamb batch.size=1024 → reached 2.2 after 86 steps · s/2"),
        (59, "optim=lamb batch.size=1024 → reached 2.2 after 86 steps"),
        (30, "optim=lamb batch.size=1024 →\n  reached 2.2 after 86 steps"),
    ],
)  # fmt: skip
def test_a_sweep_s_line_leaves_out_whole_fields_to_fit(width: int | None, line: str) -> None:
    summary = {"status": "reached", "target_loss": 2.2, "eval_loss": 2.19, "steps": 86,
               "samples": 88_064, "seconds": 1.5, "metrics": {"accuracy": 0.91}}  # fmt: skip
    own = ["optim=lamb", "batch.size=1024"]
    assert line_of_sweep(3, 8, own, summary, Path("s/2"), width) == line
