"""The preflight by real gloo ranks: what is healthy gives nothing, each fault is named."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import preflight_ranks as fault
import pytest
import torch
from preflight_ranks import fly

from largebatch.launch.doctor.findings import Finding
from largebatch.launch.doctor.preflight.collectives import (
    DTYPES,
    GROUPS,
    SIZES,
    Collectives,
    CollectiveTrial,
    Problem,
    members,
    mistake,
    problem,
    term,
    total,
    trials,
)
from largebatch.launch.doctor.preflight.command import seconds_for
from largebatch.launch.doctor.preflight.nodes import TooFewNodes, choose
from largebatch.launch.doctor.preflight.speed import partners, slow_nodes
from largebatch.launch.doctor.preflight.watch import Stage, hang
from largebatch.launch.hosts import host_lines, write_hosts


def test_healthy_ranks_find_nothing_and_say_so_on_every_rank(tmp_path: Path) -> None:
    flight = fly(fault.Steady, tmp_path, sizes=SIZES["fast"])
    assert flight.findings == []
    assert flight.heard == [[], [], [], []]
    assert flight.exit_codes == [0, 0, 0, 0]
    assert len(flight.measured["collective_seconds"]) == len(trials("fast", all_to_all=True)) - 1
    assert set(flight.measured["node_gb_per_second"]) == {"n0", "n1", "n2", "n3"}


@pytest.mark.parametrize(
    ("broken", "nodes", "says", "per_node"),
    [
        (fault.WrongResult, ["n2"], "all_reduce bfloat16", 1),
        (fault.WrongGift, [], "reduce_scatter", 1),
        (fault.DroppedRank, [], "all_gather", 1),
        (fault.OpenBarrier, [], "barrier: open after ", 1),
        (fault.WrongTiny, [], "all_reduce float32 8 elements: 8 of 8 elements are wrong", 1),
        (fault.WrongGroup, [], "all_gather float32 1 element (the ranks of a node): 1 of 2", 2),
    ],
)
def test_a_wrong_result_is_named_with_its_collective_and_rank(
    broken: type[Collectives], nodes: list[str], says: str, per_node: int, tmp_path: Path
) -> None:
    flight = fly(broken, tmp_path, per_node=per_node)
    assert flight.codes == ["collective-wrong"]
    assert flight.findings[0]["nodes"] == nodes
    assert says in flight.findings[0]["found"]
    assert flight.heard == [["collective-wrong"]] * 4
    assert flight.exit_codes == [1, 1, 1, 1]


ENDLESS = {
    "stuck device": (fault.StuckDevice, [0, 1, 2]),
    "stuck inside": (fault.StuckInside, [0, 1, 2]),
    "stopped": (fault.Stopped, [0, 1, 2]),
    "raises": (fault.Raises, [0, 1, 2]),
    "killed": (fault.Killed, [0, 1, 2]),
    "never comes": (fault.Steady, [0, 1]),
}


@pytest.fixture(scope="module")
def flights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fault.Flight]:
    """All that wait for a time-out, at the same time: they wait most of it."""
    with ThreadPoolExecutor(len(ENDLESS)) as pool:
        flown = {
            name: pool.submit(
                fly,
                broken,
                tmp_path_factory.mktemp("flight"),
                size=3,
                present=present,
                timeout_seconds=6.0,
            )
            for name, (broken, present) in ENDLESS.items()
        }
        return {name: flight.result() for name, flight in flown.items()}


@pytest.mark.parametrize(
    ("name", "code", "nodes", "says"),
    [
        ("stuck device", "collective-not-entered", ["n1"], "(1) never made the call"),
        ("stuck inside", "collective-hangs", [], "all_gather float32 1 element"),
        ("stopped", "rank-silent", ["n2"], "rank 2 (n2) has not said a word"),
        ("raises", "collective-failed", ["n1"], "No VNIs available"),
    ],
)
def test_a_hang_is_reported_in_time_with_who_is_to_blame_and_ends_all(
    name: str, code: str, nodes: list[str], says: str, flights: dict[str, fault.Flight]
) -> None:
    flight = flights[name]
    # What hangs because another failed may be named too, after it.
    assert flight.codes[0] == code
    assert flight.findings[0]["nodes"] == nodes
    assert says in flight.findings[0]["found"]
    assert set(flight.exit_codes[: 2 if name == "stopped" else 3]) == {1}


def test_a_rank_that_dies_is_named(flights: dict[str, fault.Flight]) -> None:
    found = [f for f in flights["killed"].findings if f["code"] == "rank-silent"]
    assert [finding["nodes"] for finding in found] == [["n2"]]
    assert flights["killed"].exit_codes == [1, 1, -9]


def test_a_rank_that_never_comes_is_named_by_its_place_and_nothing_is_tried(
    flights: dict[str, fault.Flight],
) -> None:
    flight = flights["never comes"]
    assert flight.codes == ["rank-silent"]
    assert "rank 2 (the node of rank 2) has not come within 6 s" in flight.findings[0]["found"]
    assert flight.measured == {}
    assert flight.heard == [["rank-silent"], ["rank-silent"], None]


def test_a_slow_node_is_named_and_its_partners_are_not(tmp_path: Path) -> None:
    flight = fly(fault.SlowNode, tmp_path, clocks=[0, 0, -40, 0])
    found = {finding["code"]: finding["nodes"] for finding in flight.findings}
    assert found == {"node-slow": ["n3"], "clock-skew": ["n2"]}
    assert flight.exit_codes == [0, 0, 0, 0]  # warnings


@pytest.mark.parametrize("size", [1, 2, 7, 128, 129, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_expected_sum_is_the_sum_of_all_ranks_and_exact_in_any_order(
    size: int, dtype: str
) -> None:
    index = torch.arange(3 * size + 2)
    trial = CollectiveTrial("all_reduce", dtype)
    terms = torch.stack([term(rank, index, size, dtype) for rank in range(size)])
    assert torch.equal(terms.sum(0), total(index, size, trial))
    assert bool((terms.sum(1) > 0).all()), "every rank adds something"
    for order in (range(size), reversed(range(size))):
        summed = torch.zeros(len(index), dtype=DTYPES[dtype])
        for rank in order:
            summed += terms[rank].to(DTYPES[dtype])
        assert torch.equal(summed.long(), terms.sum(0))


def test_the_largest_sum_of_the_whole_machine_is_exact_in_fp32() -> None:
    size = 98_304
    largest = total(torch.arange(3), size, CollectiveTrial("all_reduce", "float32")).max()
    assert int(largest) < 2**24
    assert (
        int(total(torch.arange(3 * size), size, CollectiveTrial("all_reduce", "bfloat16")).max())
        <= 512
    )


def by_hand(kind: str, given: list[Problem], size: int) -> list[torch.Tensor]:
    """What a collective leaves on each rank, from what all ranks put in."""
    vectors = [one.given for one in given]
    parts = (
        [vector.reshape(size, -1) for vector in vectors] if "_to" in kind or "_s" in kind else []
    )
    if kind == "all_reduce":
        return [torch.stack(vectors).float().sum(0)] * size
    if kind == "all_gather":
        return [torch.cat(vectors)] * size
    if kind == "reduce_scatter":
        return list(torch.stack(vectors).float().sum(0).reshape(size, -1))
    if kind == "all_to_all":
        return [torch.cat([part[rank] for part in parts]) for rank in range(size)]
    return [vectors[given[0].source]] * size


def test_a_larger_world_has_more_time_and_groups_are_nodes_and_what_is_across() -> None:
    assert [seconds_for("fast", size) for size in (12, 38_400)] == [60.12, 444]
    rows = [[0, 1, 4], [2, 3]]
    for rank, found in {3: ([2, 3], [1, 3]), 4: ([0, 1, 4], [])}.items():
        assert tuple(members(among, rank, rows) for among in GROUPS[1:]) == found
    assert members("", 0, rows) == [0, 1, 2, 3, 4]
    # Those of all ranks are not tried twice.
    assert [members(among, 1, [[0], [1]]) for among in GROUPS] == [[0, 1], [], []]


@pytest.mark.parametrize("trial", trials("fast", all_to_all=True)[1:41], ids=str)
def test_what_has_to_come_out_is_what_the_collective_means(trial: CollectiveTrial) -> None:
    size = 5
    posed = [problem(trial, rank, size, torch.device("cpu")) for rank in range(size)]
    for one, right in zip(posed, by_hand(trial.collective, posed, size), strict=True):
        assert torch.equal(one.right.float(), right.float())
        assert mistake(one.right, one.right) is None
    if trial.collective != "all_reduce" and trial.num_bytes:
        assert len({tuple(one.right.tolist()) for one in posed}) in (1, size)


def test_a_mistake_is_told_with_its_place_and_value() -> None:
    right = torch.tensor([1.0, 2.0, 3.0])
    assert mistake(right.clone(), right) is None
    said = mistake(torch.tensor([1.0, float("nan"), 5.0]), right)
    assert said == "2 of 3 elements are wrong, the first is element 1: nan instead of 2"


@pytest.mark.parametrize("num_nodes", [2, 3, 4, 7, 12, 33])
def test_no_two_nodes_meet_twice_and_each_is_timed_with_several(num_nodes: int) -> None:
    rounds = partners(num_nodes, 3)
    met = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert len(met) == len(set(met))
    for pairs in rounds:
        assert len(set(itertools.chain(*pairs))) == 2 * len(pairs) == num_nodes - num_nodes % 2
    times = [sum(node in pair for pair in met) for node in range(num_nodes)]
    assert min(times) >= min(2, num_nodes - 1)


def test_a_node_is_slow_by_the_others_spread_not_by_its_own() -> None:
    rates = {f"n{i}": 20.0 + 0.1 * (i % 5) for i in range(20)}
    assert slow_nodes(rates) == []
    found = slow_nodes(rates | {"n7": 4.0, "n8": 15.0})
    assert [finding.nodes for finding in found] == [("n7",)]
    assert found[0].found.startswith("4 GB/s")
    # Of a few nodes the spread is hardly known.
    assert slow_nodes({"n0": 20.0, "n1": 20.1, "n2": 19.9, "n3": 7.0}) == []
    assert len(slow_nodes({"n0": 20.0, "n1": 20.1, "n2": 19.9, "n3": 4.0})) == 1
    # Where all differ widely nobody stands out, and two nodes say nothing of one another.
    assert slow_nodes({f"n{i}": 2.0**i for i in range(8)}) == []
    assert slow_nodes({"n0": 20.0, "n1": 1.0}) == []


def test_who_never_made_the_call_is_to_blame_whoever_waits_further_on() -> None:
    stages = {rank: Stage(4, "broadcast", True) for rank in range(6)}
    stages[5] = Stage(5, "all_to_all", True)  # a broadcast may let its receiver go early
    stages[3] = Stage(4, "broadcast", False)
    found = hang(stages, 6, lambda rank: f"n{rank}", 9)
    assert [(finding.code, finding.nodes) for finding in found] == [
        ("collective-not-entered", ("n3",))
    ]


def bad(code: str, *nodes: str) -> Finding:
    return Finding(code, "error", "found", "means", "do", nodes)


LINES = [f"x1c0s{n}b0n0.hsn.cm.example.org" for n in range(5)]


def test_bad_nodes_are_left_out_and_doubtful_ones_are_taken_last(tmp_path: Path) -> None:
    doubtful = Finding("node-slow", "warning", "found", "means", "do", ("x1c0s0b0n0",))
    found = [bad("rank-silent", "x1c0s3b0n0"), doubtful]
    choice = choose(LINES, found, 3)
    assert choice.lines == (LINES[1], LINES[2], LINES[4])
    assert choice.left_out == {"x1c0s0b0n0": "node-slow", "x1c0s3b0n0": "rank-silent"}
    assert choose(LINES, found, 4).lines == (LINES[0], LINES[1], LINES[2], LINES[4])
    write_hosts(choice.lines, tmp_path / "good")
    assert host_lines(tmp_path / "good") == list(choice.lines)
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_too_few_good_nodes_are_refused_with_the_reasons() -> None:
    found = [bad("rank-silent", "x1c0s3b0n0"), bad("disk", "x1c0s1b0n0")]
    with pytest.raises(TooFewNodes, match="4 nodes are wanted, and 3 of the allocation's 5") as no:
        choose(LINES, found, 4)
    assert "x1c0s1b0n0: disk; x1c0s3b0n0: rank-silent" in str(no.value)
    with pytest.raises(TooFewNodes, match="does not help against ccl-direct-on-ofi"):
        choose(LINES, [bad("ccl-direct-on-ofi")], 1)


def test_a_hostfile_counts_each_node_once_and_passes_comments_by(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# two\nn0.example\nn0.example\n\nn1.example slots=12\n", encoding="utf-8")
    assert host_lines(path) == ["n0.example", "n1.example slots=12"]
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match="names no node"):
        host_lines(path)
