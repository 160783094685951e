"""The formulas count what real vectors, moved round by round, take."""

from collections.abc import Callable
from functools import partial
from math import log2

import collective_schedules as schedules
import numpy as np
import pytest
from collective_schedules import ELEMENT_BYTES, Schedule, Vectors, play

from largebatch.benchmarks.collectives import models
from largebatch.benchmarks.collectives.models import Cluster, Cost, Link

RANKS = range(1, 49)


def random_vectors(ranks: int, elements: int) -> Vectors:
    """Whole numbers: their sums are exact in any order."""
    return np.random.default_rng(ranks).integers(-1000, 1000, (ranks, elements)).astype(float)


def check(schedule: Schedule, ranks: int, elements: int, cost: Cost | None) -> schedules.Count:
    """Every rank ends with the sum of all; the rounds are those that `cost` counts."""
    vectors = random_vectors(ranks, elements)
    wanted = vectors.sum(0)
    count = play(schedule, vectors)
    assert (vectors == wanted).all()
    if cost is not None:
        found = (count.messages, count.bytes, count.added)
        assert found == pytest.approx((cost.messages, cost.bytes, cost.added), rel=1e-12)
    return count


@pytest.mark.parametrize("name", ["ring", "recursive_doubling", "rabenseifner"])
def test_all_reduce_costs_what_moving_the_vectors_takes(name: str) -> None:
    for p in RANKS:
        elements = p * 32  # blocks of equal size for p and for each power of two below 49
        schedule = getattr(schedules, name)(range(p), 0, elements)
        check(schedule, p, elements, getattr(models, name)(p, elements * ELEMENT_BYTES))


@pytest.mark.parametrize("chunks", [1, 2, 3, 7])
def test_double_tree_costs_what_moving_the_vectors_takes(chunks: int) -> None:
    for p in RANKS:
        elements = 2 * chunks * 4
        schedule = schedules.double_tree(range(p), 0, elements, chunks)
        cost = models.double_tree(p, elements * ELEMENT_BYTES, chunks)
        check(schedule, p, elements, cost)


@pytest.mark.parametrize(
    "make",
    [
        schedules.ring,
        schedules.recursive_doubling,
        schedules.rabenseifner,
        partial(schedules.double_tree, chunks=3),
    ],
)
@pytest.mark.parametrize("elements", [49, 97, 1009])
def test_blocks_of_unequal_size_still_add_up(make: Callable[..., Schedule], elements: int) -> None:
    for p in RANKS:
        check(make(range(p), 0, elements), p, elements, None)


def test_the_trees_share_no_inner_rank_and_are_as_high_as_the_model_says() -> None:
    for p in RANKS[1:]:
        trees = schedules.two_trees(p)
        inner = [set(tree.values()) - {0} for tree in trees]
        assert not inner[0] & inner[1]
        assert all(set(tree) == set(range(1, p)) for tree in trees)
        heights = {max(schedules.depth(tree, rank) for rank in tree) for tree in trees}
        assert heights == {models.tree_height(p)}


def test_reduce_scatter_and_all_gather_cost_what_moving_the_vectors_takes() -> None:
    for p in RANKS:
        elements = 3 * p
        nbytes = elements * ELEMENT_BYTES
        vectors = random_vectors(p, elements)
        wanted = vectors.sum(0)
        count = play(schedules.ring_reduce_scatter(range(p), 0, elements), vectors)
        for rank in range(p):
            own = slice(3 * rank, 3 * rank + 3)
            assert (vectors[rank, own] == wanted[own]).all()
        cost = models.reduce_scatter(p, nbytes)
        assert (count.messages, count.bytes, count.added) == (
            cost.messages, pytest.approx(cost.bytes), pytest.approx(cost.added),
        )  # fmt: skip
        count = play(schedules.ring_all_gather(range(p), 0, elements), vectors)
        assert (vectors == wanted).all()
        cost = models.all_gather(p, nbytes)
        assert (count.messages, count.bytes, count.added) == (
            cost.messages, pytest.approx(cost.bytes), 0,
        )  # fmt: skip


@pytest.mark.parametrize("name", [*models.ALL_REDUCE])
@pytest.mark.parametrize(("nodes", "g"), [(1, 12), (2, 12), (3, 4), (4, 3), (5, 2), (8, 1), (6, 7)])
def test_hierarchical_all_reduce_costs_what_moving_the_vectors_takes(
    name: str, nodes: int, g: int
) -> None:
    elements = g * nodes * 48
    nbytes = elements * ELEMENT_BYTES
    cluster = Cluster(g, 8, Link(1e-6, 1e-10, 1e-11), Link(2e-6, 4e-11, 1e-11))
    across = getattr(schedules, name)
    uneven = 0  # bytes a message by which chunks may differ
    if name == "double_tree":
        chunks = models.best_chunks(nodes, nbytes / g, cluster.shared_out)
        across, uneven = partial(across, chunks=chunks), ELEMENT_BYTES
    before, between, after = schedules.hierarchical(nodes, g, elements, across)
    vectors = random_vectors(nodes * g, elements)
    wanted = vectors.sum(0)
    counts = [play(part, vectors) for part in (before, between, after)]
    assert (vectors == wanted).all()

    inside, out = models.hierarchical(cluster, nodes, nbytes, name)
    for cost, parts in ((inside, (counts[0], counts[2])), (out, (counts[1],))):
        assert cost.messages == sum(count.messages for count in parts)
        close = uneven * cost.messages
        assert cost.bytes == pytest.approx(sum(count.bytes for count in parts), abs=close)
        assert cost.added == pytest.approx(sum(count.added for count in parts), abs=close)

    # All ranks of a node send at once: what leaves it in a round is g times what a rank sends.
    shares = []
    for messages in between:
        sizes = [(m.last - m.first) * ELEMENT_BYTES for m in messages]
        leaving = [
            sum(size for m, size in zip(messages, sizes, strict=True) if m.source // g == node)
            for node in range(nodes)
        ]
        shares.append(max(leaving) / max(sizes))
    assert all(share == pytest.approx(g, rel=0.25 if uneven else 1e-12) for share in shares)
    assert cluster.shared_out.beta == pytest.approx(4e-11 * max(1, g / 8))


def test_one_rank_of_rabenseifner_sends_no_more_than_oneccls_does() -> None:
    """n (1 + 2 (q-1)/q) bytes in 2 lg q + 1 messages, where ranks are folded."""
    for p in RANKS:
        q = 1 << (p.bit_length() - 1)
        if p == q:
            continue
        elements = p * 32
        count = check(schedules.rabenseifner(range(p), 0, elements), p, elements, None)
        n = elements * ELEMENT_BYTES
        assert max(count.sent_by.values()) == pytest.approx(n * (1 + 2 * (q - 1) / q))
        assert max(count.sends_by.values()) == 2 * log2(q) + 1


def test_the_best_number_of_chunks_is_the_best() -> None:
    for alpha, beta, gamma in ((2e-6, 4e-11, 0.0), (1e-5, 1e-9, 1e-10), (0.0, 1e-9, 0.0)):
        link = Link(alpha, beta, gamma)
        for p in (1, 2, 3, 12, 100):
            for n in (8, 4096, 10**6):
                best = models.best_chunks(p, n, link)
                times = (
                    [
                        models.double_tree(p, n, k).seconds(link)
                        for k in range(1, max(1, n // 8) + 1)
                    ]
                    if n <= 4096
                    else [
                        models.double_tree(p, n, k).seconds(link)
                        for k in {1, max(1, best - 1), best, min(n // 8, best + 1)}
                    ]
                )
                assert models.double_tree(p, n, best).seconds(link) == min(times)


@pytest.mark.parametrize(
    ("ranks", "nbytes", "ring_ms", "rabenseifner_ms"),
    [(8192, 1e6, 32.8, 0.13), (8192, 1e9, 112.8, 80.0), (3200, 1e9, 92.8, 160.0)],
)
def test_seconds_at_a_scale_known_by_other_means(
    ranks: int, nbytes: float, ring_ms: float, rabenseifner_ms: float
) -> None:
    link = Link(2e-6, 1 / 25e9)
    assert 1e3 * models.ring(ranks, nbytes).seconds(link) == pytest.approx(ring_ms, abs=0.05)
    slow = models.rabenseifner(ranks, nbytes).seconds(link)
    assert 1e3 * slow == pytest.approx(rabenseifner_ms, abs=0.05)


def test_links_that_cannot_be_are_refused() -> None:
    for wrong in (-1e-9, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"beta must be .*, got"):
            Link(1e-6, wrong)
    with pytest.raises(ValueError, match="adapters must be 1 or more, got 0"):
        Cluster(12, 0, Link(0, 0), Link(0, 0))
