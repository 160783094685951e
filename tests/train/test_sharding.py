"""Where a model lies on nodes: a copy a node unless told otherwise, and always the same update."""

import pytest
import torch
from gloo_ranks import Outcome, launch
from sharding_ranks import Way, shared

from largebatch.train.engines.ddp import bucket_size

# Four ranks, how often each way holds the model, and a word of the refusal where there is one.
HELD = {
    Way(2): 2,
    Way(4): 1,
    Way(1): 1,  # one rank a node: a copy a node would be no sharding
    Way(3): 1,  # unequal nodes
    Way(2, keys=(("shard_nodes", 2),)): 1,
    Way(1, keys=(("shard_nodes", 1),)): 4,
    Way(2, keys=(("replicas", 1),)): 1,
}
REFUSED = {
    Way(2, keys=(("shard_nodes", 3),)): "must divide the 2 node(s) of 2 rank(s)",
    Way(3, keys=(("shard_nodes", 1),)): "engine.shard_nodes must divide",
    Way(2, keys=(("shard_nodes", 1), ("replicas", 2))): "set one of them",
    Way(2, keys=(("replicas", 3),)): "engine.replicas must divide the 4 rank(s), got 3",
}
REPLICATED = Way(4, "ddp")
SMALL_BUCKETS = Way(4, "ddp", (("bucket_mb", 0.001),))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    ways = [*HELD, *REFUSED, REPLICATED, SMALL_BUCKETS]
    return launch(shared, ways, 4, tmp_path_factory.mktemp("sharding"))[1]


@pytest.mark.parametrize("way", HELD, ids=str)
def test_nodes_share_a_copy_as_told_and_the_update_stays(
    way: Way, found: dict[str, Outcome]
) -> None:
    assert found[str(way)].get("error") is None, found[str(way)]
    assert found[str(way)]["copies"] == HELD[way]
    expected = found[str(REPLICATED)]["weights"]
    for name, weight in found[str(way)]["weights"].items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)


def test_numbers_that_do_not_divide_are_refused(found: dict[str, Outcome]) -> None:
    for way, told in REFUSED.items():
        assert told in found[str(way)]["refused"]


def test_a_bucket_holds_what_its_key_says(found: dict[str, Outcome]) -> None:
    whole, parts = (
        found[str(way)]["reductions"]["allreduce_.default SUM"]
        for way in (REPLICATED, SMALL_BUCKETS)
    )
    assert parts > 4 * whole


def test_buckets_grow_with_the_nodes_and_leave_some_to_overlap() -> None:
    seven_billion = 28_000_000_000
    assert bucket_size(seven_billion, 1) is None
    assert bucket_size(300_000_000, 3200) is None  # torch's own is enough for a small model
    sizes = [bucket_size(seven_billion, nodes) for nodes in (8, 64, 256, 3200)]
    assert sizes == pytest.approx([30.5, 244.1, 976.6, 1668.9], rel=1e-3)
