"""Checkpoints of several ranks: the state at the call, in any world, and nobody left waiting."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_ranks import FullDisk, Load, Missing, Opens, Save, emptied, work
from gloo_ranks import Outcome, launch, one_thread, successful

Found = dict[Any, Sequence[Outcome]]

# Saved by 2 ranks.
KINDS = [(name, sharded) for name in ("LAMB", "AdamW") for sharded in (False, True)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def saves(base: Path) -> dict[tuple[str, bool], Save]:
    return {
        (name, sharded): Save(str(base / f"{name}-{sharded}"), name, sharded)
        for name, sharded in KINDS
    }


def special(base: Path) -> dict[str, Any]:
    return {
        "sync": Save(str(base / "sync"), "LARS", True, mode="sync"),
        "not staged": Save(str(base / "not-staged"), "LAMB", True, staged=False),
        "full": FullDisk(str(base / "full-sync"), "sync"),
        "full, async": FullDisk(str(base / "full-async"), "async"),
        "full, required": FullDisk(str(base / "full-required"), "async", required=True),
        "opens": Opens(str(base / "opens")),
        "missing": Missing(str(base / "missing")),
    }


@pytest.fixture(scope="module")
def found(base: Path) -> Found:
    """What two ranks have found, by job."""
    jobs = [*saves(base).values(), *special(base).values()]
    for job in jobs:
        emptied(Path(job.folder))
    of_ranks = launch(work, jobs, 2, base)
    return {job: [rank[str(job)] for rank in of_ranks] for job in jobs}


@pytest.fixture(scope="module")
def loaded(base: Path, found: Found) -> dict[tuple[str, bool, bool, int], Sequence[Outcome]]:
    """The same checkpoints in worlds of 3 and 1: by optimizer, how saved, how loaded, and world."""
    del found
    keys = [(name, saved, sharded) for name, saved in KINDS for sharded in (False, True)]
    jobs = {key: Load(saves(base)[key[0], key[1]].folder, key[0], key[2]) for key in keys}
    of_three = launch(work, list(jobs.values()), 3, base)
    result = {(*key, 3): [rank[str(job)] for rank in of_three] for key, job in jobs.items()}
    with one_thread():
        for key, job in jobs.items():
            if not key[2]:
                result[(*key, 1)] = [work(job)]
    return result


def same(one: Outcome, other: Outcome) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("name", "sharded"), KINDS)
def test_what_is_saved_is_the_state_at_the_call(
    name: str, sharded: bool, base: Path, found: Found, loaded: Any
) -> None:
    """The step after it was made before a byte was written."""
    one, _ = successful(found[saves(base)[name, sharded]])
    assert one["unnamed"]
    assert not same(one["before"], one["after"])
    (again,) = successful(loaded[name, sharded, False, 1])
    assert same(again["before"], one["before"])
    assert again["state"]["progress"] == {"samples": 192, "steps": 3}
    assert again["state"]["plan"] == {"decided": [64]}
    assert again["state"]["format"] == 1
    assert again["state"]["saved_by"]["world"] == 2


def test_without_staging_it_would_be_another(base: Path, found: Found) -> None:
    """So the test above can fail."""
    job = special(base)["not staged"]
    one, _ = successful(found[job])
    with one_thread():
        again = work(Load(job.folder, "LAMB", False))
    assert not same(again["before"], one["before"])


@pytest.mark.parametrize("loads_sharded", [False, True])
@pytest.mark.parametrize(("name", "saved_sharded"), KINDS)
def test_another_engine_in_another_world_goes_on_from_it(
    name: str, saved_sharded: bool, loads_sharded: bool, base: Path, found: Found, loaded: Any
) -> None:
    one, _ = successful(found[saves(base)[name, saved_sharded]])
    for again in successful(loaded[name, saved_sharded, loads_sharded, 3]):
        assert same(again["before"], one["before"])
        for key, value in again["after"].items():
            torch.testing.assert_close(value, one["after"][key], rtol=1e-6, atol=1e-7)


def test_a_synchronous_save_is_there_when_it_returns(base: Path, found: Found) -> None:
    job = special(base)["sync"]
    one, _ = successful(found[job])
    assert not one["unnamed"]
    with one_thread():
        assert same(work(Load(job.folder, "LARS", False))["before"], one["before"])


@pytest.mark.parametrize("case", ["full", "full, async", "full, required"])
def test_a_rank_that_cannot_write_leaves_the_last_checkpoint_and_nobody_waiting(
    case: str, base: Path, found: Found
) -> None:
    outcomes = successful(found[special(base)[case]])
    for rank, outcome in enumerate(outcomes):
        assert outcome["names"] == [outcome["last"]] == ["samples-000000000000064"]
        assert outcome["loaded_is_first"]
        (what,) = outcome["failures"]
        assert what == outcomes[0]["failures"][0]
        assert "samples-000000000000128 could not be saved: [Errno 27] File too large" in what
        assert "(rank 1 on " in what
        required = case == "full, required"
        assert outcome["raised"] == (what if required else "")
        assert outcome["told"] == ([(128, what)] if rank == 0 and not required else [])
        assert any("samples-000000000000192" in name for name in outcome["in the end"])


def test_ranks_ask_the_file_system_for_little(base: Path, found: Found) -> None:
    """One file a rank, which alone each rank opens; rank 0 asks for all the rest."""
    first, second = successful(found[special(base)["opens"]])
    files = [".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "state.json"]
    assert first["files"] == files
    assert second["saving"] == [("open", "__1_0.distcp")]
    opened = {name for event, name in first["saving"] if event == "open"}
    flushed = {".samples-000000000000064", "checkpoints"}
    written = {".metadata.tmp", "__0_0.distcp", "manifest.json", "state.json"}
    assert opened == written | flushed
    assert len(first["saving"]) == 12  # whatever the number of ranks
    assert {name for event, name in second["loading"]} <= {"__0_0.distcp", "__1_0.distcp"}
    assert ("open", "state.json") in first["loading"]


def test_a_flag_may_be_missing_but_no_moment(base: Path, found: Found) -> None:
    for outcome in successful(found[special(base)["missing"]]):
        assert outcome["same"]
        assert outcome["flag"] == "default"
        assert "does not fit this run: it has no optimizer.state." in outcome["refusal"]
        assert "exp_avg" in outcome["refusal"]
