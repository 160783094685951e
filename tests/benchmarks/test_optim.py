"""What `largebatch bench optim` says is what was measured."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from torch import nn
from torch.nn import Parameter

from largebatch.benchmarks import contenders as contenders_module
from largebatch.benchmarks import harness, optim
from largebatch.benchmarks.contenders import REFERENCE, Contender, contenders
from largebatch.benchmarks.optim import (
    Inventory,
    Tensors,
    run_rounds,
    small_tensors,
    transformer,
)

CPU = torch.device("cpu")
TINY = Inventory("tiny", ((5, 3), (3,)))
ROWS, LEFT_OUT = contenders()


class Observed(torch.optim.Optimizer):
    """Calls `observe` with its parameters at each step."""

    def __init__(self, params: list[Parameter], observe: Callable[[list[Parameter]], None]) -> None:
        super().__init__(params, {})
        self.observe = observe

    def step(self, closure: Any = None) -> None:
        self.observe(self.param_groups[0]["params"])


def test_the_transformer_is_one() -> None:
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(512, nhead=8, dim_feedforward=4 * 512)
        blocks = nn.TransformerEncoder(layer, 8, nn.LayerNorm(512), enable_nested_tensor=False)
        model = nn.ModuleList([nn.Embedding(8192, 512), blocks])
    shapes = [tuple(param.shape) for param in model.parameters()]
    assert sorted(transformer().shapes) == sorted(shapes)
    assert round(transformer().num_parameters / 1e6, 1) == 29.4
    assert len(small_tensors().shapes) == 600


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_least_traffic_is_that_of_weight_gradient_and_state(row: Contender) -> None:
    tensors = Tensors(TINY, CPU)
    before = [param.detach().clone() for param in tensors.params]
    optimizer = row.make(tensors.params)
    optimizer.step()
    for param, old in zip(tensors.params, before, strict=True):
        state = [v for v in optimizer.state[param].values() if isinstance(v, torch.Tensor)]
        num_states = sum(value.shape == param.shape for value in state)
        assert row.words == 3 + 2 * num_states  # w and g read, w written; states read and written
        assert not torch.equal(param, old)


def test_rounds_are_interleaved_and_every_optimizer_finds_the_same_gradients() -> None:
    calls: list[str] = []
    found: list[torch.Tensor] = []

    def row(name: str) -> Contender:
        def observe(params: list[Parameter]) -> None:
            calls.append(name)
            for param in params:
                assert param.grad is not None
                found.append(param.grad.clone())
                param.grad.zero_()  # as a careless optimizer would

        return Contender(name, 0, lambda params: Observed(params, observe))

    done = run_rounds(TINY, [row("A"), row("B"), row("C")], CPU, 1e-6, lambda elapsed, what: None)
    num_turns = harness.NUM_WARM_UP + harness.FEWEST_ROUNDS
    assert calls == ["A", "B", "C"] * num_turns
    assert {name: len(times) for name, times in done.items()} == dict.fromkeys(
        [*"ABC", "memory"], harness.FEWEST_ROUNDS
    )
    assert all(len(pair) == 2 for pair in done["memory"])  # in place, and copied
    assert all(torch.equal(one, other) for one, other in zip(found, found[2:], strict=False))
    assert all(grad.abs().min() > 0 for grad in found)


def test_a_ratio_is_taken_round_by_round() -> None:
    row = Contender("slow", 7, ROWS[0].make)
    # A machine that is slow in the second round, slower in the third: 2, 1 and 3 times the
    # reference, where the medians alone would say 2 / 2.
    measured = {REFERENCE: [1.0, 2.0, 4.0], "slow": [2.0, 2.0, 12.0]}
    assert optim.line(row, TINY, measured, memory_speed=2016.0) == {
        "name": "slow", "seconds": 2.0, "ratio": 2.0, "ratio_quartiles": (1.5, 2.5),
        "least_bytes": 4 * 7 * (5 * 3 + 3), "bytes_per_second": 252.0, "share_of_memory": 0.125,
    }  # fmt: skip


def test_the_record_and_the_table_hold_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = ("absent Lamb", 7, ("no_such_library", "Lamb"), {})
    monkeypatch.setattr(contenders_module, "PEERS", (absent,))
    monkeypatch.setattr(optim, "PEERS", (absent,))
    monkeypatch.setattr(optim, "small_tensors", lambda: small_tensors(num_each=2))
    monkeypatch.setattr(optim, "transformer", lambda: TINY)
    file = tmp_path / "record.json"
    assert optim.main(["--seconds", "0.01", "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    shown = capsys.readouterr().out

    assert [entry["name"] for entry in record["inventories"]] == ["small tensors", "tiny"]
    for inventory in record["inventories"]:
        names = [entry["name"] for entry in inventory["optimizers"]]
        assert names == [row.name for row in contenders()[0]]
        assert "absent Lamb" not in names
        assert all(shown.count(f" {name} ") >= 2 for name in names)
        reference = inventory["optimizers"][0]
        assert (reference["name"], reference["ratio"]) == (REFERENCE, 1.0)
    assert record["left_out"] == [
        "absent Lamb: left out, as no_such_library is not installed: pip install no_such_library"
    ]
    assert record["left_out"][0] in shown
    assert record["provenance"]["num_threads"] == torch.get_num_threads()
    assert record["provenance"]["versions"]["torch"] == torch.__version__
    assert record["provenance"]["device"] in shown
    assert all(formula in shown for formula in record["formulas"].values())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--device", "abacus"], "--device must be one of cpu"),
        (["--threads", "0"], "--threads must be 1 or more, got 0"),
        (["--seconds", "nan"], "--seconds must be > 0, got nan"),
        (["--json", "no/such/folder.json"], "--json must be a file in a folder that exists"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert optim.main(arguments) == 2
    assert sentence in capsys.readouterr().err


def bench(*arguments: str, without: str | None = None) -> "subprocess.CompletedProcess[str]":
    """`largebatch bench`, in a Python where the module `without` is not to be found."""
    hide = f"import sys; sys.modules[{without!r}] = None\n" if without else ""
    code = f"{hide}from largebatch.cli import main\nraise SystemExit(main({['bench', *arguments]}))"
    # What is imported already is there all the same.
    return (subprocess if without else forked).run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_the_command_lists_its_benchmarks_and_says_what_it_lacks() -> None:
    listed = bench("--help")
    assert listed.returncode == 0
    assert "optim" in listed.stdout
    unknown = bench("abacus")
    assert unknown.returncode == 2
    assert "no benchmark 'abacus'" in unknown.stderr
    lacking = bench("optim", without="rich")
    assert lacking.returncode == 2
    assert "bench optim needs rich" in lacking.stderr
    assert "pip install 'largebatch[train]'" in lacking.stderr
