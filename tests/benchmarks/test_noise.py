"""What `largebatch bench noise` says is what was measured."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from largebatch.benchmarks import command, harness
from largebatch.benchmarks.noise import command as noise
from largebatch.benchmarks.noise import steps as noise_steps
from largebatch.benchmarks.noise.command import collectives_of, line, run_rounds
from largebatch.benchmarks.noise.steps import ALONE, ON_RANKS, NoiseStepper, Row
from largebatch.benchmarks.workloads import Bytewise, Decoding
from largebatch.distributed.ranks import Ranks

CPU = torch.device("cpu")
TINY = Decoding(batch_size=32, places=5, width=12, num_blocks=1, vocabulary=7)


def test_the_decoder_is_one() -> None:
    """As many parameters as torch's own blocks with embedding, last norm and head."""
    work = Decoding()
    layer = nn.TransformerEncoderLayer(work.width, nhead=6, dim_feedforward=4 * work.width)
    num_blocks = work.num_blocks * sum(p.numel() for p in layer.parameters())
    around = 2 * work.vocabulary * work.width + work.vocabulary + 2 * work.width
    model = work.model()
    assert sum(p.numel() for p in model.parameters()) == num_blocks + around
    assert 10e6 < num_blocks + around < 30e6
    symbols = torch.randint(work.vocabulary, (2, 9))
    changed = symbols.clone()
    changed[:, 5] = (changed[:, 5] + 1) % work.vocabulary
    one, other = model(symbols), model(changed)
    assert torch.allclose(one[:, :5], other[:, :5], atol=1e-5)  # none looks ahead
    assert not torch.allclose(one[:, 5:], other[:, 5:], atol=1e-3)


@pytest.mark.parametrize("workload", [Bytewise(64), TINY], ids=lambda workload: workload.name)
def test_every_row_takes_the_same_steps_and_reads_what_it_says(workload: Any) -> None:
    steppers = {row.name: NoiseStepper(row, workload, Ranks(), CPU) for row in ALONE}
    for stepper in steppers.values():
        for _ in range(3):
            stepper.step()
    models = {name: [*stepper.model.parameters()] for name, stepper in steppers.items()}
    readings = {}
    for row in ALONE:
        pairs = zip(models["without"], models[row.name], strict=True)
        assert all(torch.equal(one, other) for one, other in pairs), row.name
        measured = steppers[row.name].noise
        assert (measured is None) == (row.source is None)
        if measured is None:
            continue
        layers = {f"/{name}" for name in measured.source.layers} if row.by_layer else set()
        weighted = {"_preconditioned"} if row.preconditioned else set()
        assert measured.state_dict()["scales"].keys() == {""} | layers | weighted
        assert steppers[row.name].num_summed == 3 + 2 * (1 + len(layers | weighted))
        readings[row.name] = measured.state_dict()["scales"][""]["trace"]
    assert readings["example"] == readings["example by layer"]
    assert readings["micro_batch"] == readings["micro_batch by layer"]


def test_the_floor_is_what_norms_are_taken_of() -> None:
    def bytes_of(name: str) -> int:
        row = next(row for row in ALONE if row.name == name)
        return NoiseStepper(row, Bytewise(64), Ranks(), CPU).least_bytes

    held = 96 * 16 + (128 * 128 + 128) + (128 * 96 + 96)
    # Out of the embedding, into and out of the hidden layer, into and out of the last one.
    by_sample = 128 + (128 + 128) + (128 + 96)
    assert bytes_of("without") == 0
    assert bytes_of("micro_batch") == 4 * 3 * held  # two small ones and their mean
    assert bytes_of("micro_batch preconditioned") == 2 * 4 * 3 * held
    assert bytes_of("example by layer") == 4 * (held + 64 * by_sample)


def test_rounds_are_interleaved() -> None:
    calls: list[str] = []
    steppers: dict[str, Any] = {
        name: SimpleNamespace(step=lambda name=name: calls.append(name)) for name in "ABC"
    }
    samples = run_rounds(steppers, CPU, 1e-6, lambda elapsed, what: None)
    assert calls == ["A", "B", "C"] * (harness.NUM_WARM_UP + harness.FEWEST_ROUNDS)
    assert {name: len(pairs) for name, pairs in samples.items()} == dict.fromkeys(
        [*"ABC", "memory"], harness.FEWEST_ROUNDS
    )
    assert all(len(pair) == 2 for pairs in samples.values() for pair in pairs)


def test_own_work_is_that_of_the_calls_that_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that moves by one with each look at it, a call takes one."""
    clock = itertools.count()
    monkeypatch.setattr(noise_steps.time, "process_time", lambda: float(next(clock)))
    without, example = (NoiseStepper(ALONE[n], TINY, Ranks(), CPU) for n in (0, 5))
    assert without.own_work(2) == 0.0
    example.step()  # `take` hears of the step before
    seen = sum(
        isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm)
        for module in TINY.model().modules()
    )
    assert example.own_work(2) == 3 + 2 * seen  # two micro-batches
    assert "see" not in vars(example.noise.source)  # nothing is left behind


def test_ratio_and_extra_are_taken_round_by_round() -> None:
    # A machine that is slow in the second round and slower in the third.
    samples = {
        "without": [(1.0, 1.0), (2.0, 1.0), (4.0, 1.0)],
        "measured": [(1.5, 1.1), (2.0, 1.3), (12.0, 1.2)],
    }
    steppers: Any = {
        "without": SimpleNamespace(num_summed=2, least_bytes=0),
        "measured": SimpleNamespace(num_summed=9, least_bytes=48),
    }
    told = line(
        Row("measured", "example"), samples, steppers,
        {"without": 2, "measured": 3}, own_seconds=0.25, read_speed=96.0,
    )  # fmt: skip
    assert told == {
        "name": "measured", "seconds": 2.0, "ratio": 1.5, "ratio_quartiles": (1.25, 2.25),
        "work_ratio": 1.2, "extra_seconds": 0.5, "own_seconds": 0.25, "own_share": 0.25,
        "floor_seconds": 0.5, "extra_collectives": 1, "extra_floats": 7,
    }  # fmt: skip


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_collectives_are_counted() -> None:
    def step(num: int) -> None:
        for _ in range(num):
            dist.all_reduce(torch.ones(3), async_op=True)

    assert [collectives_of(lambda num=num: step(num)) for num in (0, 1, 3)] == [0, 1, 3]


@pytest.mark.matrix
def test_the_record_and_the_table_hold_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(noise, "ONE_PROCESS", (Bytewise(32),))
    monkeypatch.setattr(noise, "RANKS", (TINY,))
    monkeypatch.setenv("COLUMNS", "200")  # that no name is broken over lines
    monkeypatch.setenv("KINETO_LOG_LEVEL", "5")
    file = tmp_path / "record.json"
    assert noise.main(["--seconds", "0.01", "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    shown = capsys.readouterr().out

    alone, ranks = record["workloads"]
    assert [(each["name"], each["num_ranks"]) for each in record["workloads"]] == [
        ("byte MLP, batch 32", 1),
        ("decoder, batch 32 x 5", 2),
    ]
    for workload, rows in ((alone, ALONE), (ranks, ON_RANKS)):
        assert [entry["name"] for entry in workload["rows"]] == [row.name for row in rows]
        assert all(f" {row.name} " in shown for row in rows)
        # The numbers travel with the loss: they are more values, and no collective more.
        for entry, row in zip(workload["rows"], rows, strict=True):
            assert entry["extra_collectives"] == 0
            assert (entry["extra_floats"] > 0) == (row.source is not None)
    assert set(alone["collectives"].values()) == {0}
    assert ranks["collectives"]["without"] == 2  # the gradient's, and that of the loss
    floats = {entry["name"]: entry["extra_floats"] for entry in ranks["rows"]}
    num_layers = len([*TINY.model().parameters()])
    groups = 2  # the block, and the rest
    assert floats == {
        "without": 0, "without, again": 0, "rank": 2, "rank by layer": 2 + 2 * num_layers,
        "rank preconditioned": 4, "FSDP2 without": 0, "FSDP2 rank": 2,
        "FSDP2 rank by group": 2 + 2 * groups,
    }  # fmt: skip
    assert record["provenance"]["device"] in shown
    assert all(formula in shown for formula in record["formulas"].values())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--device", "abacus"], "--device must be one of cpu"),
        (["--threads", "0"], "--threads must be 1 or more, got 0"),
        (["--seconds", "0"], "--seconds must be > 0, got 0.0"),
        (["--json", "no/such/folder.json"], "--json must be a file in a folder that exists"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert noise.main(arguments) == 2
    assert sentence in capsys.readouterr().err


def test_the_loop_of_the_documentation_finds_the_noise_of_a_regression() -> None:
    """y = 1ᵀx + e with 8 normal x and normal e: at the optimum a sample's gradient is -2 e (x, 1),
    so tr Σ = 4 E[e²] E[‖x‖² + 1] = 4 · 9.
    """
    text = (Path(__file__).parents[2] / "docs" / "schedules.md").read_text(encoding="utf-8")
    (code,) = (
        block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        if "MicroBatchGradients" in block
    )  # fmt: skip
    found: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(code, found)
    reading = found["noise"].reading()
    assert reading.trace == pytest.approx(36, rel=0.1)
    assert reading.grad_sq_norm < 1  # nothing is left to learn but noise


def test_the_command_knows_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["noise", "--threads", "0"]) == 2
    assert "bench noise: --threads" in capsys.readouterr().err
