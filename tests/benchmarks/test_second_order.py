"""What `largebatch bench second_order` says is what was measured."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from largebatch.benchmarks import command, harness
from largebatch.benchmarks.contenders import REFERENCE
from largebatch.benchmarks.harness import Traffic
from largebatch.benchmarks.noise.command import collectives_of
from largebatch.benchmarks.second_order import command as second_order
from largebatch.benchmarks.second_order.command import PARTS, Part, line, rank_line, spread
from largebatch.benchmarks.second_order.steps import (
    ROWS,
    SecondOrderStepper,
    StepSamples,
    run_rounds,
)
from largebatch.benchmarks.workloads import Bytewise, Decoding
from largebatch.distributed.ranks import Ranks
from largebatch.optim import KFAC

CPU = torch.device("cpu")
TINY = Decoding(batch_size=8, places=5, width=12, num_blocks=1, vocabulary=7)
SECOND_ORDER = ("Shampoo", "SOAP", "K-FAC")


def test_the_model_has_a_few_million_parameters_in_few_matrices() -> None:
    decoder = PARTS[0].workload.model()
    shapes = [tuple(param.shape) for param in decoder.parameters() if param.dim() == 2]
    assert {shapes.count(shape) for shape in ((1024, 256), (256, 1024), (768, 256))} == {2}
    assert 1e6 < sum(param.numel() for param in decoder.parameters()) < 4e6
    assert sum(part.share for part in PARTS) == pytest.approx(1)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("interval", [1, 3])
def test_a_row_takes_roots_at_its_interval(name: str, interval: int) -> None:
    """Between the steps that take them, what has come out of them last stays as it is."""
    stepper = SecondOrderStepper(ROWS[name], interval, TINY, Ranks(), CPU)
    keys = ("root_", "basis_", "inverse_")
    seen: list[list[torch.Tensor]] = []
    for _ in range(12):
        stepper.take()
        stepper.backward()
        stepper.step()
        states = stepper.optimizer.state.values()
        seen.append(
            [
                v.clone()
                for state in states
                for key, v in state.items()
                if any(k in key for k in keys)
            ]
        )
    assert bool(seen[0]) == (name in SECOND_ORDER)
    turned = [
        sum(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
        for before, after in itertools.pairwise(seen[-1 - 2 * 3 :])
    ]
    # Two intervals of 3: in each everything turns once, or three times at an interval of 1.
    assert sum(turned[:3]) == sum(turned[3:]) == len(seen[0]) * 3 // interval


def test_every_row_steps_the_same_model_over_the_same_samples() -> None:
    steppers = {
        name: SecondOrderStepper(make, 2, TINY, Ranks(), CPU) for name, make in ROWS.items()
    }
    gradients = []
    for stepper in steppers.values():
        before = [param.detach().clone() for param in stepper._model.parameters()]
        stepper.take()
        stepper.backward()
        gradients.append([param.grad for param in stepper._model.parameters()])
        stepper.step()
        after = stepper._model.parameters()
        assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    for found in gradients[1:]:
        torch.testing.assert_close(found, gradients[0])


def test_kfac_hears_how_many_terms_the_loss_is_the_mean_of() -> None:
    stepper = SecondOrderStepper(ROWS["K-FAC"], 1, TINY, Ranks(), CPU)
    stepper.take()
    stepper.backward()
    assert isinstance(stepper.optimizer, KFAC)
    _, items = stepper.optimizer._statistics.take()
    assert items == TINY.batch_size * TINY.places


class Fake:
    """A stepper that tells what is asked of it."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.take = lambda: None
        self.backward = lambda: told.append(name.lower())
        self.step = lambda: told.append(name)


def test_rounds_are_interleaved_and_whole_intervals() -> None:
    told: list[str] = []
    steppers: dict[str, Any] = {name: Fake(name, told) for name in "ABC"}
    samples = run_rounds(steppers, 5, CPU, 1e-6, lambda elapsed, what: None)
    assert told == [*"aAbBcC"] * (5 + 5)
    for found in samples.values():
        times = (found.steps, found.work, found.wholes, found.early)
        assert [len(each) for each in times] == [5] * 4
        assert len(found.traffic) == 4  # but of the first
    told.clear()
    assert (
        len(run_rounds(steppers, 1, CPU, 1e-6, lambda elapsed, what: None)["A"])
        == harness.FEWEST_ROUNDS
    )
    # As many intervals as fit: a clock that moves by one with each look at it.
    with pytest.MonkeyPatch.context() as patch:
        clock = itertools.count()
        patch.setattr(harness.time, "perf_counter", lambda: float(next(clock)))
        assert len(run_rounds(steppers, 5, CPU, 1000.0, lambda elapsed, what: None)["A"]) % 5 == 0
        assert 900 < next(clock) < 1010


def test_a_line_tells_medians_and_sums_and_the_worst() -> None:
    # A machine that is slow in the third round; roots in the fourth.
    reference = StepSamples([1.0, 1.0, 4.0, 2.0], [1.0] * 4, [4.0, 4.0, 8.0, 4.0], [5.0])
    own = StepSamples(
        [2.0, 3.0, 8.0, 11.0], [2.0, 2.0, 2.0, 6.0], [5.0, 6.0, 12.0, 14.0], [7.0, 9.0]
    )
    told = line("own", 4, {REFERENCE: reference, "own": own})
    assert told == {
        "name": "own", "interval": 4, "num_rounds": 4,
        "seconds": 5.5, "ratio": 2.5,  # of 2, 2, 3, 5.5
        "mean_ratio": 24 / 8, "work_ratio": 12 / 4,
        "worst_seconds": 11.0, "worst_by_median": 2.0, "early_worst_seconds": 9.0,
        "whole_seconds": 37 / 4, "whole_ratio": 37 / 20, "whole_worst_by_median": 14 / 9,
    }  # fmt: skip


def test_what_every_rank_has_is_told_apart_from_what_is_shared_out() -> None:
    common = {
        "num_rounds": 2, "step_seconds": 1.0, "work_seconds": 1.0, "worst_seconds": 1.0,
        "num_collectives": 1.0, "sent_bytes": 8.0,
    }  # fmt: skip
    one = {**common, "state": {"0/step": 4, "0/factor": 100, "1/factor": 0}}
    other = {**common, "state": {"0/step": 4, "0/factor": 0, "1/factor": 60}}
    told = rank_line("own", [one, other])
    assert (told["state_bytes"], told["replicated_bytes"], told["num_ranks"]) == ([104, 64], 4, 2)
    assert spread([1.04, 1.01], 1.0) == "1.0"
    assert spread([0.002, 0.001], 1e3) == "1.0-2.0"


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_traffic_is_what_goes_into_collectives() -> None:
    def talk() -> None:
        dist.all_reduce(torch.ones(3))  # 12 bytes
        dist.all_to_all_single(torch.empty(5), torch.ones(5))  # 20
        dist.broadcast(torch.ones(2, dtype=torch.float64), 0)  # 16
        dist.all_gather([torch.empty(7)], torch.ones(7))  # 28
        dist.reduce(torch.ones(11), 0)  # 44
        dist.all_reduce(torch.ones(13), async_op=True).wait()  # 52
        torch.ones(100).sum()

    with Traffic() as seen:
        talk()
    assert [sent for _, sent, _ in seen.collectives] == [12, 20, 16, 28, 44, 52]
    assert collectives_of(talk) == 6  # as the profiler counts


@pytest.mark.matrix
def test_the_record_and_the_tables_hold_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(second_order, "PARTS", (Part(TINY, 0.5), Part(Bytewise(32), 0.5)))
    monkeypatch.setattr(second_order, "INTERVALS", (1, 4))
    monkeypatch.setattr(second_order, "INTERVAL_ON_RANKS", 3)
    monkeypatch.setattr(second_order, "WORLD_SIZES", (1, 2))
    monkeypatch.setenv("COLUMNS", "200")  # that no name is broken over lines
    file = tmp_path / "record.json"
    assert second_order.main(["--seconds", "0.01", "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    shown = capsys.readouterr().out

    for found, workload in zip(record["alone"], (TINY, Bytewise(32)), strict=True):
        assert found["name"] == workload.name
        told = [(entry["name"], entry["interval"], entry["num_rounds"]) for entry in found["rows"]]
        assert told == [
            (name, interval, num_rounds)
            for interval, num_rounds in ((1, 3), (4, 4))
            for name in ROWS
        ]
        assert all(f" {name} " in shown for name in ROWS)
    for found, workload in zip(record["on_ranks"], (TINY, Bytewise(32)), strict=True):
        check_ranks(found["rows"], workload.model())
    assert record["provenance"]["device"] in shown
    formulas = [*record["formulas"].values(), *record["rank_formulas"].values()]
    assert all(formula in shown for formula in formulas)


def check_ranks(rows: list[dict[str, Any]], model: nn.Module) -> None:
    """Memory and traffic follow from the parameters alone."""
    params = [*model.parameters()]
    held = 4 * sum(param.numel() for param in params)
    matrices = 4 * sum(param.numel() for param in params if param.dim() == 2)
    found = {(row["name"], row["num_ranks"]): row for row in rows}
    assert set(found) == {(name, num_ranks) for num_ranks in (1, 2) for name in ROWS}
    for num_ranks in (1, 2):
        # Two moments and a count of steps of every parameter, on every rank.
        row = found[REFERENCE, num_ranks]
        assert row["state_bytes"] == [2 * held + 4 * len(params)] * num_ranks
        assert row["replicated_bytes"] == row["state_bytes"][0]
        assert (row["num_collectives"], row["sent_bytes"]) == ([0] * num_ranks, [0] * num_ranks)
    for name in SECOND_ORDER:
        alone, shared = found[name, 1], found[name, 2]
        assert (alone["num_collectives"], alone["sent_bytes"]) == ([0], [0])
        # Every byte of state that is not everywhere lies with one rank.
        (whole,), (one, other) = alone["state_bytes"], shared["state_bytes"]
        assert one + other - shared["replicated_bytes"] == whole
        assert shared["replicated_bytes"] < min(one, other) < max(one, other) < whole
        # Directions go from their owner to the other rank: those of matrices, K-FAC's with a bias;
        # and of K-FAC's factors, the bias among the inputs, the triangles of both ranks.
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        least, most = matrices, matrices
        if name == "K-FAC":
            sides = [n for m in linear for n in (m.in_features + 1, m.out_features)]
            least += 2 * 4 * sum(n * (n + 1) // 2 for n in sides)
            most = least + 4 * sum(m.out_features for m in linear) + embedding_factors(model)
        assert least <= sum(shared["sent_bytes"]) <= most + 2 * 4 * 10 * len(params)  # and numbers
        assert shared["num_collectives"] == ([3, 3] if name == "K-FAC" else [2, 2])


def embedding_factors(model: nn.Module) -> int:
    """Bytes of two triangles as wide as its output, and of as many diagonals as it has rows."""
    found = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return sum(
        2 * 4 * (e.num_embeddings + e.embedding_dim * (e.embedding_dim + 1) // 2) for e in found
    )


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
    assert second_order.main(arguments) == 2
    assert sentence in capsys.readouterr().err


def test_the_command_knows_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["second_order", "--threads", "0"]) == 2
    assert "bench second_order: --threads" in capsys.readouterr().err
