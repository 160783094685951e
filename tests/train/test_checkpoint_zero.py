"""DeepSpeed's checkpoints: at the call, of one world size, and converted for any."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_zero_ranks import ZeroJob, work
from gloo_ranks import Outcome, launch, successful

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

KINDS = [(1, "AdamW"), (1, "LARS"), (2, "LAMB"), (2, "SGD"), (3, "LAMB"), (3, "LARS"), (3, "AdamW")]
Found = dict[str, Sequence[Outcome]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Two ranks, then one from what they saved, then two again; each converts for the next."""
    base = tmp_path_factory.mktemp("zero")
    outcomes: dict[str, Any] = {}

    def run(world: int, load: int | None, save: int | None, *more: ZeroJob) -> None:
        jobs = [
            ZeroJob(folder(base, stage, name), stage, name, load, save, mode="async")
            for stage, name in KINDS
        ]
        of_ranks = launch(work, [*jobs, *more], world, base)
        outcomes.update({str(job): [rank[str(job)] for rank in of_ranks] for job in [*jobs, *more]})

    plain = folder(base, 0, "plain")
    whole = ZeroJob(plain, 2, "LAMB", None, 64, converts=False)
    again = ZeroJob(plain, 2, "LAMB", 64, None)
    other = ZeroJob(plain, 3, "LAMB", 64, None)
    forged = ZeroJob(plain, 2, "LAMB", 64, None, forged=True)
    run(2, None, 64, whole, again, other, forged)
    elsewhere = ZeroJob(plain, 2, "LAMB", 64, None, mode="async")
    small = folder(base, 1, "tiny")
    run(1, 64, 128, elsewhere, ZeroJob(small, 1, "LAMB", None, 128, tiny=True))
    tiny = ZeroJob(small, 1, "LAMB", 128, None, tiny=True)
    run(2, 128, None, tiny)
    outcomes |= {"whole": outcomes[str(whole)], "again": outcomes[str(again)]}
    outcomes |= {"tiny": outcomes[str(tiny)], "forged": outcomes[str(forged)]}
    outcomes["made by it"] = list(base.rglob("mark"))
    return outcomes | {"other": outcomes[str(other)], "elsewhere": outcomes[str(elsewhere)]}


def folder(base: Path, stage: int, name: str) -> str:
    path = base / f"[{stage}]+({name})"  # the converter takes paths for patterns
    path.mkdir(exist_ok=True)
    return str(path)


def equal(one: Outcome, other: Outcome) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("stage", "name"), KINDS)
def test_a_converted_checkpoint_is_the_same_in_a_world_of_another_size(
    stage: int, name: str, found: Found
) -> None:
    """Weights, moments, step and options; two ranks to one and back, bit by bit."""
    two = successful(found[f"ZeRO-{stage} {name} None 64 async"])
    (one,) = successful(found[f"ZeRO-{stage} {name} 64 128 async"])
    back = successful(found[f"ZeRO-{stage} {name} 128 None async"])
    assert equal(one["loaded"], two[0]["saved"])
    assert not equal(one["loaded"], one["saved"])
    for rank in back:
        assert equal(rank["loaded"], one["saved"])


def test_a_world_of_the_same_size_needs_no_conversion(found: Found) -> None:
    for before, after in zip(successful(found["whole"]), successful(found["again"]), strict=True):
        assert equal(after["loaded"], before["saved"])


def test_without_conversion_another_world_is_told_the_command(found: Found) -> None:
    (one,) = successful(found["elsewhere"])
    assert "was saved by ZeRO-2 on 2 rank(s) and there are 1 now" in one["refusal"]
    assert "`largebatch checkpoint universal " in one["refusal"]


def test_another_stage_is_refused(found: Found) -> None:
    for rank in successful(found["other"]):
        assert "was saved with engine.stage=2, which engine.stage=3 does" in rank["refusal"]


def test_a_file_that_names_code_is_refused_on_all_ranks(found: Found) -> None:
    for rank in successful(found["forged"]):
        assert "is not read: it names posix.system" in rank["refusal"]
    assert found["made by it"] == []


def test_a_rank_without_anything_of_a_group_is_refused_on_all_ranks(found: Found) -> None:
    for rank in successful(found["tiny"]):
        assert "a group of 1 parameter element(s) leaves one of 2 ranks without" in rank["refusal"]
