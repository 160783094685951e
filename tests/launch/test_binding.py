"""Every rank, and everybody beside the ranks, has cores of its own."""

from itertools import product

import pytest

from largebatch.common.errors import ConfigError
from largebatch.common.text import spell_cores
from largebatch.conf.cluster_config import DomainConfig, NodeConfig
from largebatch.launch.jobs.binding import (
    Binding,
    bind,
    pals_list,
    parse_cores,
    prove_disjoint,
    slurm_mask,
)
from largebatch.launch.jobs.submit import composed

ASKED = ["cluster.queue=debug", "cluster.account=p", "cluster.walltime=01:00:00"]
CLUSTERS = {"aurora": 12, "sunspot": 12, "polaris": 4}


def node(cluster: str, *overrides: str) -> NodeConfig:
    words = [f"cluster={cluster}", *ASKED, *(f"cluster.node.{word}" for word in overrides)]
    return composed(words).cluster.node


# The lists that are documented, from the topology alone.
def test_auroras_is_the_list_of_alcfs_pytorch_page_with_the_workers_of_its_oneccl_page() -> None:
    binding = bind(node("aurora"), oneccl=True)
    assert binding is not None
    assert pals_list(binding) == (
        "list:4-7:8-11:12-15:16-19:20-23:24-27:56-59:60-63:64-67:68-71:72-75:76-79"
    )
    assert binding.workers == (42, 43, 44, 45, 46, 47, 94, 95, 96, 97, 98, 99)


def test_seven_cores_a_rank_are_those_of_alcfs_own_script() -> None:
    binding = bind(
        node("aurora", "cores_per_rank=7", "rank_cores='1-51,53-103'",
             "ccl_workers='46-51,98-103'"),
        oneccl=True,
    )  # fmt: skip
    assert binding is not None
    assert pals_list(binding) == (
        "list:1-7:8-14:15-21:22-28:29-35:36-42:53-59:60-66:67-73:74-80:81-87:88-94"
    )


def test_the_documented_eight_cores_a_rank_are_refused_by_the_cores_that_two_would_have() -> None:
    eight = "1-8:9-16:17-24:25-32:33-40:41-48:53-60:61-68:69-76:77-84:85-92:93-100"
    with pytest.raises(ConfigError, match=r"rank 5 and oneCCL's workers both have core 42-47"):
        bind(node("aurora", f"bind='{eight}'"), oneccl=True)
    with pytest.raises(ConfigError, match=r"rank 5 and Copper both have core 48"):
        bind(node("aurora", f"bind='{eight}'"), copper=True)
    # oneCCL, left to itself, takes among the last twelve of each socket.
    with pytest.raises(ConfigError, match=r"rank 4 and oneCCL's own choice both have core 40"):
        bind(node("aurora", f"bind='{eight}'", "ccl_workers=null"), oneccl=True)
    assert bind(node("aurora", f"bind='list:{eight}'")) is not None  # alone on the node


def test_copper_where_oneccl_may_choose_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"oneCCL's own choice and Copper both have core 48-51"):
        bind(node("aurora", "ccl_workers=null"), oneccl=True, copper=True)


def test_each_gpu_of_polaris_has_the_cores_near_to_it() -> None:
    binding = bind(node("polaris"))
    assert binding is not None
    assert pals_list(binding) == "list:24-31:16-23:8-15:0-7"
    assert slurm_mask(binding) == "mask_cpu:0xff000000,0xff0000,0xff00,0xff"


def settings() -> list[tuple[str, int, int | None, tuple[bool, bool, bool]]]:
    helpers = list(product((False, True), repeat=3))
    return [
        (cluster, ranks, cores, who)
        for cluster, devices in CLUSTERS.items()
        for ranks in range(1, devices + 1)
        for cores in (None, 1, 4, 6, 8)
        for who in helpers
    ]


def test_every_binding_that_is_made_is_disjoint_complete_and_near_its_device() -> None:
    made = refused = 0
    asked = {cluster: node(cluster) for cluster in CLUSTERS}
    for cluster, ranks, cores, (oneccl, copper, daos) in settings():
        config = asked[cluster]
        config.ranks, config.cores_per_rank = ranks, cores
        try:
            binding = bind(config, oneccl=oneccl, copper=copper, daos=daos)
        except ConfigError as error:
            assert "cluster.node.cores_per_rank must be at most" in str(error)  # noqa: PT017
            refused += 1
            continue
        made += 1
        assert binding is not None
        check(binding, config, cores, oneccl, copper)
    assert (made > 700, refused > 20) == (True, True), (made, refused)


def check(
    binding: Binding, config: NodeConfig, cores: int | None, oneccl: bool, copper: bool
) -> None:
    """What holds of a binding, said a second time and otherwise."""
    held = [core for theirs in binding.ranks for core in theirs] + list(binding.workers)
    held += list(range(48, 52)) if copper and config.copper else []
    reserved = [0, 52] if config.reserved else []
    assert len(set(held)) == len(held)
    assert not set(held) & set(reserved)
    assert len(binding.ranks) == config.ranks
    assert {len(theirs) for theirs in binding.ranks} == {cores or binding.cores_per_rank}
    assert len(binding.workers) == (config.ranks if oneccl and config.ccl_workers else 0)
    if config.num_devices == 12:  # tiles 0-5 at socket 0, 6-11 at socket 1
        for rank, theirs in enumerate(binding.ranks):
            assert {core // 52 for core in theirs} == {rank // 6}
        assert all(core // 52 == rank // 6 for rank, core in enumerate(binding.workers))
    else:
        for rank, theirs in enumerate(binding.ranks):
            assert {core // 8 for core in theirs} == {3 - rank}


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["ranks=13"], "cluster.node.ranks must be at most 12, a device each, got 13"),
        (["cores_per_rank=9"], "must be at most 7 for 6 ranks on cores 4-41,48-51, .* got 9"),
        (["bind='1-8:9-16'"], "a list of cores for each of 12 ranks, separated by colons, got 2"),
        (["ranks=1", "bind='0-3'"], "rank 0 and the operating system both have core 0"),
        (["ranks=1", "bind='103-105'"], "rank 0 has core 104-105, and the node has 0-103"),
        (["ccl_workers='42-45,94-99'"], "has no core for the oneCCL worker of rank 4 near its"),
        (["reserved='7-3'"], r"cores are written as 0,52 or 42-47,94-99, got '7-3'"),
        (["reserved='a'"], r"cores are written as 0,52 or 42-47,94-99, got 'a'"),
    ],
)  # fmt: skip
def test_what_cannot_be_bound_is_refused_in_a_sentence(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        bind(node("aurora", *overrides), oneccl=True)


def test_a_node_without_a_topology_is_not_bound() -> None:
    assert bind(NodeConfig(ranks=64)) is None


def test_ranks_without_devices_are_spread_over_the_domains() -> None:
    two = [DomainConfig("0-3"), DomainConfig("4-7")]
    binding = bind(NodeConfig(ranks=3, domains=two))
    assert binding is not None
    assert binding.ranks == ((0, 1), (2, 3), (4, 5))


def test_the_proof_can_fail() -> None:
    prove_disjoint({"a": (1, 2), "b": (3,)}, range(4))
    with pytest.raises(ConfigError, match=r"a and b both have core 2-3; a and c both have core 1"):
        prove_disjoint({"a": (1, 2, 3), "b": (2, 3), "c": (1,)}, range(4))


@pytest.mark.parametrize("text", ["", "0", "0,52", "42-47,94-99", "1-8,105-112"])
def test_cores_read_as_they_are_written(text: str) -> None:
    assert spell_cores(parse_cores(text)) == text
