"""`optim.groups`: which parameters decay, adapt and are preconditioned, in a run's own words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Train = Callable[..., int]

SHORT = ("task=digits", "batch.size=64", "budget.samples=192", "target.loss=null",
         "hydra.run.dir=run")  # fmt: skip


@pytest.fixture
def run(train: Train, tmp_path: Path) -> Callable[..., tuple[dict[str, Any], list[Any]]]:
    """Train with more words; returns the summary and the lines of the record."""

    def short(*words: str) -> tuple[dict[str, Any], list[Any]]:
        assert train(*SHORT, *words) == 0
        summary: dict[str, Any] = json.loads((tmp_path / "run" / "summary.json").read_text())
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        return summary, [json.loads(line) for line in lines]

    return short


@pytest.mark.parametrize("optim", ["adamw", "sgd", "lars", "lamb", "shampoo", "soap", "kfac"])
def test_vectors_neither_decay_nor_adapt_whatever_the_optimizer(optim: str, run: Any) -> None:
    groups = run(f"optim={optim}", "optim.weight_decay=0.1")[0]["groups"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert sum(group["elements"] for group in groups) == 64 * 64 + 64 + 64 * 10 + 10
    assert groups[1]["elements"] == 64 + 10
    if optim in ("lars", "lamb"):
        assert [group["adapt"] for group in groups] == [True, False]


@pytest.mark.parametrize("optim", ["muon", "mano", "soap_muon"])
def test_each_group_keeps_what_the_modules_say(optim: str, run: Any) -> None:
    groups = run(f"optim={optim}", "optim.weight_decay=0.1")[0]["groups"]
    # The hidden matrix, the head by AdamW, and the vectors.
    assert [group["elements"] for group in groups] == [64 * 64, 64 * 10, 64 + 10]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]


def test_nothing_is_left_out_where_that_is_asked_for(run: Any) -> None:
    words = ("optim=lamb", "optim.weight_decay=0.1", "record.layers=true")
    nothing = ("optim.groups.no_decay=[]", "optim.groups.no_adapt=[]")
    summary, lines = run(*words, *nothing)
    assert len(summary["groups"]) == 1
    assert len([key for key in lines[0] if key.startswith("trust_ratio/")]) == 4


def test_the_record_has_the_trust_ratios_of_what_adapts(run: Any) -> None:
    _, lines = run("optim=lamb", "record.layers=true")
    ratios = {key: value for key, value in lines[0].items() if key.startswith("trust_ratio/")}
    assert len(ratios) == 2
    assert all(key.endswith("weight") for key in ratios)
    assert lines[0]["trust_ratio_max"] == max(ratios.values())


def test_no_ratio_is_recorded_where_nothing_adapts(run: Any) -> None:
    _, lines = run("optim=lamb", "optim.groups.no_adapt=['']", "record.layers=true")
    assert not [key for key in lines[0] if key.startswith("trust_ratio")]


def test_a_layer_is_split_and_a_factor_left_out_by_words_of_the_command_line(run: Any) -> None:
    _, lines = run("optim=lars", "optim.groups.norm_groups={2.weight: 2}", "record.layers=true")
    ratios = [key for key in lines[0] if key.startswith("trust_ratio/")]
    assert len(ratios) == 3
    assert len([key for key in ratios if key.endswith(("[0]", "[1]"))]) == 2


def test_only_what_is_selected_is_preconditioned(run: Any) -> None:
    groups = run("optim=soap", "optim.groups.precondition=['2.weight']")[0]["groups"]
    assert [(group["elements"], group["precondition"]) for group in groups] == [
        (64 * 64, False), (64 + 10, False), (64 * 10, True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("optim.groups.no_decay=[gain]",), "no_decay: 'gain' matches none of the 4 parameters"),
        (("optim.groups.no_adapt=['(']",), "no_adapt: '(' is neither one of the words"),
        (("+optim.groups.decay=[bias]",), "optim.groups"),
        (("+optim.groups.weight_decay=1",), "set optim.weight_decay"),
        (("optim.groups=[bias]",), "optim.groups"),
        (("optim=muon", "optim.adamw=[haed]"), "adamw: 'haed' matches none of the 4 parameters"),
        (("optim.groups.precondition=[bias]",), "is for optim=shampoo and optim=soap"),
    ],
)
def test_groups_that_cannot_be_are_refused_in_a_sentence(
    words: tuple[str, ...], said: str, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*SHORT, "optim=lamb", *words) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.startswith("largebatch: ")
    assert told.count("\n") == 1
