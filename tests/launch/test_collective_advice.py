"""The advice is the minimum over the models, and its thresholds are where they cross."""

from itertools import pairwise

import pytest

from largebatch.benchmarks.collectives.models import (
    Cluster,
    Link,
    Range,
    hierarchical_seconds,
    oneccl_settings,
    project,
    rabenseifner,
    ranges,
    ring,
)

AURORA = Cluster(12, 8, Link(2e-6, 1 / 15e9), Link(2e-6, 1 / 25e9))


@pytest.mark.parametrize("nodes", [2, 3, 100, 8192, 10_624])
def test_every_size_is_in_the_range_of_its_fastest_algorithm(nodes: int) -> None:
    found = ranges(AURORA, nodes)
    assert found[0].first == 0
    assert found[-1].last is None
    for row, after in pairwise(found):
        assert row.last is not None
        assert row.last + 1 == after.first
    for power in range(2, 34):
        size = 2**power + 4
        (row,) = [r for r in found if r.first <= size and (r.last is None or size <= r.last)]
        told = project(AURORA, nodes, 12 * size)
        assert told.seconds[row.algorithm] == pytest.approx(min(told.seconds.values()))
        alone = hierarchical_seconds(AURORA, nodes, 12 * size, row.algorithm)
        assert told.seconds[row.algorithm] == alone


@pytest.mark.parametrize(
    ("ranks", "megabytes"), [(3200, 159), (8191, 409), (38_400, 1900), (98_304, 4900)]
)
def test_the_ring_overtakes_where_rabenseifner_folds(ranks: int, megabytes: float) -> None:
    """One rank a node and an interface each: the flat case, whose crossings are known."""
    link = Link(2e-6, 1 / 25e9)
    flat = Cluster(1, 1, link, link)
    found = ranges(flat, ranks, ("ring", "rabenseifner"))
    assert [row.algorithm for row in found] == ["ring", "rabenseifner", "ring"]
    assert found[-1].first == pytest.approx(1e6 * megabytes, rel=0.03)
    size = found[-1].first
    assert ring(ranks, size).seconds(link) <= rabenseifner(ranks, size).seconds(link)
    assert ring(ranks, size - 2).seconds(link) > rabenseifner(ranks, size - 2).seconds(link)


def test_rabenseifner_is_not_named_where_oneccl_would_fall_back() -> None:
    small = project(AURORA, 1024, 12 * 4 * 1023).seconds
    assert "rabenseifner" not in small
    assert "rabenseifner" in project(AURORA, 1024, 12 * 4 * 1024).seconds


def test_an_algorithm_can_be_left_out() -> None:
    found = ranges(AURORA, 8192, ("ring", "recursive_doubling"))
    assert {row.algorithm for row in found} == {"ring", "recursive_doubling"}


def test_settings_are_in_oneccls_syntax() -> None:
    found = [Range("recursive_doubling", 0, 8192), Range("ring", 8193, None)]
    assert oneccl_settings(found) == {
        "CCL_ALLREDUCE": "topo",
        "CCL_ALLREDUCE_SCALEOUT": "recursive_doubling:0-8192;ring:8193-max",
    }
