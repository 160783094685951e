"""Clusters are YAML: those that are here, and a user's own without any code."""

from pathlib import Path

import pytest

from largebatch.common.errors import ConfigError
from largebatch.common.text import clock
from largebatch.conf.cluster_config import seconds
from largebatch.launch.jobs.cluster import check_queue
from largebatch.launch.jobs.job import Job
from largebatch.launch.jobs.script import script
from largebatch.launch.jobs.submit import completed, composed

ROOT = Path(__file__).resolve().parents[2]
CLUSTERS = sorted(path.stem for path in (ROOT / "conf" / "cluster").glob("*.yaml"))


ASKED = ["cluster.queue=debug", "cluster.account=p", "cluster.walltime=01:00:00"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_cluster_has_a_job_once_it_knows_whose(name: str) -> None:
    config = composed([f"cluster={name}", *ASKED])
    check_queue(config.cluster)
    assert config.cluster.name == name
    told = ["cluster"]
    assert "python -m largebatch\n  train\n" in script(
        Job(config, *completed(config, ["train"]), told)
    )


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_reason_is_of_a_variable_that_is_exported(name: str) -> None:
    for group in composed([f"cluster={name}", *ASKED]).cluster.settings.values():
        assert group.because.keys() <= group.export.keys()
        assert group.source


def test_sunspot_is_aurora_under_other_names() -> None:
    here, there = (composed([f"cluster={name}", *ASKED]).cluster for name in ("aurora", "sunspot"))
    assert (here.node, here.settings, here.modules) == (there.node, there.settings, there.modules)
    assert there.hsn_suffix == "hsn.cm.sunspot.alcf.anl.gov"


def test_a_cluster_of_the_users_own_needs_no_code(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "ours.yaml").write_text(
        "defaults: [slurm, _self_]\n"
        "name: ours\n"
        "queue: gpu\n"
        "walltime: 02:00:00\n"
        "queues: {gpu: {walltime: {4: 24:00:00}}}\n"
        "modules: [cuda/12.8]\n"
        "node: {ranks: 8}\n"
        "settings: {net: {source: our wiki, export: {NCCL_DEBUG: WARN}}}\n"
    )
    config = composed(["cluster=ours", "cluster.nodes=2"], str(tmp_path))
    check_queue(config.cluster)
    assert config.cluster.num_ranks == 16
    text = script(Job(config, *completed(config, ["train"]), ["cluster=ours"]))
    for line in (
        "#SBATCH --partition=gpu",
        "#SBATCH --time=02:00:00",
        "module load cuda/12.8 || exit 1",
        'export NCCL_DEBUG="WARN"',
        "  srun --nodes=2 --ntasks=16 --ntasks-per-node=8",
    ):
        assert f"\n{line}\n" in text
    with pytest.raises(ConfigError, match=r"queue gpu takes 1 to 4 nodes, got 5"):
        check_queue(composed(["cluster=ours", "cluster.nodes=5"], str(tmp_path)).cluster)


@pytest.mark.parametrize(
    ("value", "total"), [("00:30:00", 1800), ("168:00:00", 604800), (90, 90), ("0:01:00", 60)]
)
def test_wall_times_are_read(value: object, total: int) -> None:
    assert seconds(value, "walltime") == total
    assert seconds(clock(total), "walltime") == total


@pytest.mark.parametrize("value", ["30", "1:00", "00:60:00", "00:00:00", 0, -5, None, 1.5])
def test_what_is_no_wall_time_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"walltime must be HH:MM:SS, such as 00:30:00, got"):
        seconds(value, "walltime")
