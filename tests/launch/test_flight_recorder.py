"""Records of ranks, compared: written down by hand as gloo, NCCL and a silent XCCL leave them."""

import json
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from largebatch.launch.watch.flight_recorder import compare, main, named
from largebatch.launch.watch.flight_records import read, record_of


def entry(number: int, op: str, sizes: Sequence[Sequence[int]] = ((10,),), **more: Any) -> Any:
    """One entry as torch's Flight Recorder writes it."""
    return {
        "process_group": ("0", "default_pg"),
        "collective_seq_id": number,
        "p2p_seq_id": 0,
        "is_p2p": False,
        "profiling_name": op,
        "state": "scheduled",
        "retired": False,
        "input_sizes": [list(size) for size in sizes],
        "output_sizes": [list(size) for size in sizes],
        "record_id": number - 1,
    } | more


def done(numbers: Iterable[int], op: str = "gloo:all_reduce", **more: Any) -> list[Any]:
    return [entry(number, op, **({"retired": True} | more)) for number in numbers]


def compared(dumps: Sequence[Sequence[Any]], size: int | None = None) -> Any:
    groups = {"0": {"range": [0, size or len(dumps), 1]}}
    records = {
        rank: record_of({"collectives": entries, "groups": groups}, rank)
        for rank, entries in enumerate(dumps)
    }
    return compare(records)


def test_a_rank_that_never_came_is_named_with_its_collective() -> None:
    waits = [*done(range(1, 4)), entry(4, "gloo:all_reduce", [(4, 5)])]
    found = compared([waits, done(range(1, 4)), waits, waits])
    (finding,) = found.findings
    assert (finding.kind, finding.number, finding.missing) == ("missing", 4, [1])
    assert finding.waiting == [0, 2, 3]
    assert found.culprits == [1]
    assert found.words[1] == (
        "rank 1 is missing from collective 4 of default_pg (gloo), all_reduce [4, 5]: "
        "ranks 0, 2, 3 are in it"
    )


def test_the_rank_furthest_behind_is_missing_from_the_first_that_others_wait_in() -> None:
    # Collectives in flight: rank 0 has entered 5 and 6 and waits for both, rank 1 only 5.
    one, two = (entry(number, "gloo:all_reduce") for number in (5, 6))
    found = compared([[*done([4]), one, two], [*done([4]), one], done([4])])
    (finding,) = found.findings
    assert (finding.number, finding.missing, finding.waiting) == (5, [2], [0, 1])


def test_a_rank_that_waits_for_another_is_not_the_one_to_look_at() -> None:
    """Rank 3 waits for rank 2 in their own group, ranks 0 and 1 for both."""
    high = {"process_group": ("1", "high"), "record_id": 7}
    world = [*done([1, 2]), entry(3, "gloo:all_reduce")]
    pair = [entry(9, "gloo:reduce_scatter", **high)]
    before = [entry(8, "gloo:reduce_scatter", **high, retired=True)]
    groups = {"0": {"range": [0, 4, 1]}, "1": {"ranks": [2, 3]}}
    dumps = [world, world, [*done([1, 2]), *before], [*done([1, 2]), *before, *pair]]
    found = compare(
        {
            rank: record_of({"collectives": entries, "groups": groups}, rank)
            for rank, entries in enumerate(dumps)
        }
    )
    assert {(f.group.about, tuple(f.missing)) for f in found.findings} == {
        ("default_pg", (2, 3)),
        ("high", (2,)),
    }
    assert found.culprits == [2]


def test_ranks_that_wait_for_one_another_are_told_so() -> None:
    """Rank 0 is in the first group's collective, rank 1 in the second's."""
    first, second = ({"process_group": (name, name)} for name in ("a", "b"))
    groups = {"a": {"ranks": [0, 1]}, "b": {"ranks": [0, 1]}}
    dumps = [
        [*done([1], **first), *done([1], **second), entry(2, "gloo:all_reduce", **first)],
        [*done([1], **first), *done([1], **second), entry(2, "gloo:all_reduce", **second)],
    ]
    found = compare(
        {
            rank: record_of({"collectives": entries, "groups": groups}, rank)
            for rank, entries in enumerate(dumps)
        }
    )
    assert found.culprits == []
    assert "ranks 0, 1 are waiting for one another" in found.words[-1]


def test_another_collective_under_the_same_number_is_found() -> None:
    dumps: list[list[Any]] = [[*done([1]), entry(2, "gloo:all_reduce")] for _ in range(4)]
    # A broadcast's source does not wait: it is one further than those it has left behind.
    dumps[2] = [*done([1]), *done([2], "gloo:broadcast"), entry(3, "gloo:all_reduce")]
    found = compared(dumps)
    assert [finding.kind for finding in found.findings] == ["mismatch"]
    assert found.findings[0].number == 2
    assert found.culprits == [2]
    assert "ranks 0, 1, 3 are in all_reduce [10]; rank 2 is in broadcast [10]" in found.words[1]


@pytest.mark.parametrize(
    ("op", "sizes", "kind"),
    [
        ("gloo:all_reduce", [(7,)], "mismatch"),
        ("nccl:_all_gather_base", [(7,)], "mismatch"),
        ("gloo:all_reduce", [(2, 5)], "inside"),  # as many numbers as 10
        ("gloo:all_to_all", [(7,)], "inside"),  # parts may differ
        ("gloo:scatter", [], "inside"),  # only its source has inputs
    ],
)
def test_sizes_are_compared_where_they_must_agree(op: str, sizes: Any, kind: str) -> None:
    dumps = [[*done([1], op), entry(2, op, [(10,)])], [*done([1], op), entry(2, op, sizes)]]
    assert [finding.kind for finding in compared(dumps).findings] == [kind]


def test_uneven_sizes_that_went_well_are_no_finding() -> None:
    past = [done([1], "nccl:all_gather", input_sizes=[[size]])[0] for size in (10, 9)]
    dumps = [[past[0], entry(2, "nccl:all_reduce")], [past[1]]]
    (finding,) = compared(dumps).findings
    assert (finding.kind, finding.missing) == ("missing", [1])


def test_ranks_that_are_all_in_a_collective_are_not_blamed() -> None:
    found = compared([[*done([1]), entry(2, "gloo:all_reduce")]] * 3)
    assert [finding.kind for finding in found.findings] == ["inside"]
    assert found.culprits == []
    assert "all of ranks 0-2 are in it, and it does not end" in found.words[0]


def test_a_call_that_nobody_has_waited_for_yet_hides_no_culprit() -> None:
    """Both have sent off a gradient in a group of their own; then rank 1 went astray."""
    pair = {"process_group": ("1", "pair")}
    begun = [*done([1], **pair), entry(2, "gloo:all_reduce", **pair), *done([1])]
    found = compared([[*begun, entry(2, "gloo:barrier")], begun])
    assert {finding.kind for finding in found.findings} == {"inside", "missing"}
    assert found.culprits == [1]


def test_ranks_outside_collectives_are_told_so() -> None:
    found = compared([done([1, 2])] * 2)
    assert found.findings == []
    assert found.words == ["no rank waits in a collective for another"]


def test_the_source_of_a_broadcast_may_be_gone_before_the_others_come() -> None:
    ahead = [*done([1]), *done([2], "gloo:broadcast")]
    assert compared([ahead, done([1])]).findings == []


def test_states_of_nccl_are_read_too() -> None:
    def nccl(number: int, state: str, op: str = "nccl:all_reduce") -> Any:
        return entry(number, op, state=state, retired=state == "completed")

    waits = [nccl(1, "completed"), nccl(2, "started")]
    found = compared([waits, [nccl(1, "completed")], waits])
    assert found.culprits == [1]
    early = entry(1, "nccl:all_reduce", state="completed")  # done, and not yet retired
    assert compared([[early], [early]]).findings == []


def test_a_backend_that_never_says_done_is_judged_by_its_numbers() -> None:
    """Some versions of XCCL leave every entry as it was made."""
    dumps = [
        [entry(number, "xccl:allreduce") for number in range(1, last + 1)] for last in (9, 7, 9)
    ]
    (finding,) = compared(dumps).findings
    assert (finding.number, finding.missing) == (8, [1])
    # On a level with each other: whether the last has ended, nobody knows.
    assert compared([dumps[0], dumps[0]]).findings == []


def test_a_member_without_a_record_is_the_one_that_others_wait_for() -> None:
    found = compared([[*done([1]), entry(2, "gloo:all_reduce")]] * 2, size=3)
    assert (found.findings[0].missing, found.culprits) == ([2], [2])


def test_a_rank_that_has_forgotten_a_group_is_not_taken_for_one_that_never_entered_it() -> None:
    """Rank 1's buffer was full long after it had done the group's only collective."""
    rare = {"process_group": ("1", "rare")}
    groups = {"0": {"range": [0, 2, 1]}, "1": {"range": [0, 2, 1]}}
    busy = done(range(3000, 3003), record_id=5000)
    dumps = [[*done([1], **rare), *busy], busy]
    records = {
        rank: record_of({"collectives": entries, "groups": groups}, rank)
        for rank, entries in enumerate(dumps)
    }
    assert compare(records).findings == []
    # One whose record is whole has never entered it, and one that others wait for is not there.
    waits = [[*done([1, 2]), entry(1, "gloo:barrier", **rare, record_id=9)], done([1, 2])]
    records = {
        rank: record_of({"collectives": entries, "groups": groups}, rank)
        for rank, entries in enumerate(waits)
    }
    assert compare(records).culprits == [1]


def test_a_rank_that_has_forgotten_a_group_is_missing_from_what_others_wait_in() -> None:
    rare, groups = {"process_group": ("1", "rare")}, {"1": {"range": [0, 2, 1]}}
    busy = done(range(3000, 3003), record_id=5000)
    dumps = [[*done([1], **rare), *busy, entry(2, "gloo:barrier", **rare)], busy]
    records = {
        rank: record_of({"collectives": entries, "groups": groups}, rank)
        for rank, entries in enumerate(dumps)
    }
    (finding,) = compare(records).findings
    assert (finding.number, finding.missing) == (2, [1])


def test_nothing_is_said_of_a_forgotten_group_where_no_entry_says_done() -> None:
    rare, groups = {"process_group": ("1", "rare")}, {"1": {"range": [0, 2, 1]}}
    busy = [entry(number, "xccl:allreduce", record_id=5000) for number in range(3000, 3003)]
    dumps = [[entry(1, "xccl:allreduce", **rare, record_id=7), *busy], busy]
    records = {
        rank: record_of({"collectives": entries, "groups": groups}, rank)
        for rank, entries in enumerate(dumps)
    }
    assert compare(records).findings == []


def test_a_receive_that_nobody_sends_to_is_named() -> None:
    waits = entry(0, "nccl:recv 1<-0", is_p2p=True, p2p_seq_id=1)
    assert compared([done([1]), [*done([1]), waits]]).words == [
        "rank 1 waits in recv 1<-0 of default_pg (nccl)"
    ]


def test_torchs_own_files_are_read_and_no_code_in_them_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"0": {"name": "0", "desc": "default_pg", "ranks": "[0, 1]"}}
    before = done([1], "nccl:all_reduce")
    for rank, entries in enumerate([[*before, entry(2, "nccl:all_reduce")], before]):
        dump = {"version": "2.10", "pg_config": config, "entries": entries}
        (tmp_path / f"trace_{rank}").write_bytes(pickle.dumps(dump))
    assert main([str(tmp_path / "trace_0"), str(tmp_path / "trace_1")]) == 0
    assert "rank 1 is missing from collective 2" in capsys.readouterr().out
    # With rank 1's file lost, the group's ranks still say who is missing.
    assert compare({0: read(tmp_path / "trace_0")}).culprits == [1]
    (tmp_path / "trace_3").write_bytes(pickle.dumps(Path("x")))
    assert main([str(tmp_path / "trace_3")]) == 2
    assert "it names pathlib" in capsys.readouterr().err
    (tmp_path / "rank-1.json").write_text(json.dumps([1]))
    assert main([str(tmp_path / "rank-1.json")]) == 2
    assert main([str(tmp_path / "none")]) == 2


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([4], "rank 4 is"),
        ([0, 1], "ranks 0, 1 are"),
        ([0, 1, 2, 5, 7, 8], "ranks 0-2, 5, 7, 8 are"),
        ([*range(0, 40, 2)], f"ranks {', '.join(map(str, range(0, 32, 2)))}, … (20 in all) are"),
    ],
)
def test_ranks_are_named_shortly(ranks: list[int], text: str) -> None:
    assert named(ranks) == text
