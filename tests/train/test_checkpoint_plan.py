"""Ranks plan a checkpoint without asking one another, once, and as one or not at all."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from checkpoint_plan_ranks import Plans, Unread, work
from checkpoint_ranks import emptied
from gloo_ranks import Outcome, launch, successful


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sequence[Outcome]]:
    """What two ranks have found."""
    base = tmp_path_factory.mktemp("plans")
    jobs: dict[str, Any] = {
        "replicated": Plans(str(base / "replicated"), False),
        "sharded": Plans(str(base / "sharded"), True),
        "unread": Unread(str(base / "unread")),
    }
    for job in jobs.values():
        emptied(Path(job.folder))
    of_ranks = launch(work, list(jobs.values()), 2, base)
    return {name: successful([rank[str(job)] for rank in of_ranks]) for name, job in jobs.items()}


@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_a_plan_is_made_once_and_again_where_something_else_is_saved(
    kind: str, found: dict[str, Sequence[Outcome]]
) -> None:
    """And by torch, with all ranks' plans on one, where they have not the same."""
    for outcome in found[kind]:
        saves, loads = outcome["counts"][:4], outcome["counts"][4:]
        assert [save["plans"] for save in saves[:3]] == [1, 0, 1]
        assert [save["pickles"] for save in saves[:3]] == [0, 0, 0]
        assert saves[3]["pickles"] > 0
        assert [load["pickles"] for load in loads] == [0, 0, 0, 0]


@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_whoever_has_planned_it_a_checkpoint_is_read_in_the_other_layout(
    kind: str, found: dict[str, Sequence[Outcome]]
) -> None:
    for outcome in found[kind]:
        assert outcome["same"] == [True] * 4


def test_what_one_rank_cannot_read_all_refuse(found: dict[str, Sequence[Outcome]]) -> None:
    for outcome in found["unread"]:
        assert "does not fit this run: rank 1's own trouble" in outcome["refusal"]
