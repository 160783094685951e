"""Jobs from `largebatch submit` to their last line: the fake PBS keeps them, the fake PALS starts
real MPI ranks, and what they train is the real thing.
"""

import json
import os
import shutil
import sys
import sysconfig
import venv
from pathlib import Path

import forked
import pytest
from fake_cluster import AURORA, BIN, SMALL, Cluster, read

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


@pytest.mark.parametrize(
    ("nodes", "queue", "stand_in"),
    [
        pytest.param(1, "debug", 1, marks=pytest.mark.matrix),
        pytest.param(8, "debug-scaling", 2, marks=pytest.mark.matrix),
        pytest.param(256, "debug-scaling", 1, marks=pytest.mark.matrix),
        (2048, "prod", 2),
        pytest.param(10624, "prod", 1, marks=pytest.mark.matrix),
    ],
)
def test_a_job_of_any_size_is_submitted_and_trains_to_its_end(
    cluster: Cluster, nodes: int, queue: str, stand_in: int
) -> None:
    ranks = 12 * nodes
    cluster.environment["FAKE_PALS_RANKS"] = str(stand_in)
    sent = cluster.submit(
        *AURORA, f"cluster.nodes={nodes}", f"cluster.queue={queue}", "folder=jobs/one",
        "--", "train", *SMALL, f"batch.size={ranks}", f"budget.samples={2 * ranks}",
    )  # fmt: skip
    assert sent.returncode == 0, sent.stderr
    assert sent.stdout == (
        "1000.pbs: jobs/one/job.sh, with its output beside it; record in jobs/one/run\n"
    )
    job = cluster.job(0)
    assert (job["A"], job["q"], job["select"]) == ("project", queue, str(nodes))
    assert (job["walltime"], job["filesystems"]) == ("00:30:00", "home:flare")
    assert job["place"] == "scatter"

    done = cluster.run(0)
    assert done.returncode == 0, done.stdout + done.stderr
    asked = cluster.asked()
    assert (asked["n"], asked["ppn"]) == (ranks, 12)
    environment = asked["environment"]
    assert environment["VENV"] == "active"
    assert environment["CCL_ATL_TRANSPORT"] == "mpi"
    assert ("FI_CXI_DEFAULT_CQ_SIZE" in environment) == (nodes >= 256)
    assert environment["MASTER_ADDR"] == "x40000c0s0b0n0.hsn.cm.aurora.alcf.anl.gov"
    notes = (cluster.jobs / "notes").read_text()
    assert notes == "module load frameworks/2025.3.1\n"

    record = cluster.work / "jobs" / "one" / "run"
    summary = read(record)
    assert (summary["status"], summary["steps"]) == ("exhausted", 2)
    assert summary["data_parallel_size"] == stand_in
    assert summary["provenance"]["launcher"] == "pals"
    # Rank 0 alone is heard.
    logs = list((cluster.work / "jobs" / "one").glob("logs.1000.pbs/*/rank*.log"))
    assert [log.name for log in logs] == (["rank1.log"] if stand_in > 1 else [])
    assert done.stdout.count("budget spent after 2 steps") == 1


def test_the_ranks_exit_code_is_the_jobs(cluster: Cluster) -> None:
    del cluster.environment["FAKE_PALS_FORKS"]  # mpiexec makes one code of those of its own ranks
    asked = [*AURORA, "cluster.queue=debug", "folder=jobs/refused"]
    words, record = [*asked, "--", "train", *SMALL, "batch.size=24"], "jobs/refused/run"
    assert cluster.submit(*words, "budget.samples=24").returncode == 0
    script = cluster.job(0)["script"].replace("\n  budget.samples=24\n", "\n  budget.samples=0\n")
    (cluster.jobs / "1000.pbs.json").write_text(json.dumps(cluster.job(0) | {"script": script}))
    done = cluster.run(0)
    assert done.returncode == 2, done.stderr  # refused, says docs and `largebatch --help`
    assert done.stdout.endswith(f"largebatch: exit code 2, record in {record}\n")
    assert "budget.samples must be a whole number of at least 1" in done.stderr


def test_a_job_with_fewer_nodes_than_it_asked_for_starts_nothing(cluster: Cluster) -> None:
    words = [*AURORA, "cluster.queue=debug", "cluster.nodes=2", "--", "train", "batch.size=24"]
    assert cluster.submit(*words).returncode == 0
    done = cluster.run(0, ["x1", "x1"])  # one name, twice
    assert done.returncode == 1
    assert "2 nodes were asked for, and 1 are here" in done.stderr
    assert not (cluster.jobs / "asked").exists()


@pytest.mark.matrix
def test_of_an_allocation_with_a_spare_the_nodes_that_answer_train(cluster: Cluster) -> None:
    sent = cluster.submit(
        *AURORA, "cluster.queue=debug-scaling", "cluster.nodes=2", "cluster.spares=1",
        # Else the doctor finds, with reason, that there are no tiles here.
        "cluster.settings.device.export.ZE_FLAT_DEVICE_HIERARCHY=null",
        "folder=jobs/spare", "--", "train", *SMALL, "batch.size=24", "budget.samples=48",
    )  # fmt: skip
    assert sent.returncode == 0, sent.stderr
    assert cluster.job(0)["select"] == "3"
    cluster.environment["FAKE_PALS_RANKS"] = "1"
    cluster.environment["FAKE_PALS_DEAD"] = "x40000c0s0b0n0"  # the first, where ranks would meet
    done = cluster.run(0)
    assert done.returncode == 0, done.stdout + done.stderr
    asked = cluster.asked()
    assert (asked["n"], asked["ppn"]) == (24, 12)
    hosts = Path(asked["hostfile"]).read_text().split()
    assert [host.partition(".")[0] for host in hosts] == ["x40001c0s0b0n0", "x40002c0s0b0n0"]
    assert asked["environment"]["MASTER_ADDR"].startswith("x40001c0s0b0n0.hsn.")
    assert read(cluster.work / "jobs" / "spare" / "run")["status"] == "exhausted"


@pytest.mark.matrix
def test_an_environment_is_spread_before_it_is_used(cluster: Cluster) -> None:
    prefix = cluster.home / "packed"
    venv.create(prefix, system_site_packages=True)
    pack = ["env", "pack", str(cluster.work / "env.tar.gz"), "--python", str(prefix)]
    forked.run([sys.executable, "-m", "largebatch", *pack], check=True, capture_output=True)
    sent = cluster.submit(
        *AURORA, "cluster.queue=debug", "cluster.environment=spread", "cluster.archive=env.tar.gz",
        "folder=jobs/spread", "--", "train", *SMALL, "batch.size=24", "budget.samples=48",
    )  # fmt: skip
    assert sent.returncode == 0, sent.stderr
    # What a module would bring.
    beside = [str(ROOT / "src"), sysconfig.get_path("purelib")]
    cluster.environment["PYTHONPATH"] = os.pathsep.join(beside)
    cluster.environment["FAKE_PALS_RANKS"] = "1"
    del cluster.environment["FAKE_PALS_FORKS"]  # which would not see it
    cluster.environment["LD_LIBRARY_PATH"] = str(BIN.parent / "lib")  # MPI's
    there = Path("/tmp/largebatch-1000.pbs")
    try:
        done = cluster.run(0)
    finally:
        shutil.rmtree(there, ignore_errors=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert cluster.asked()["environment"]["VIRTUAL_ENV"] == str(there)
    assert read(cluster.work / "jobs" / "spread" / "run")["status"] == "exhausted"


def test_a_queue_that_holds_one_job_of_a_user_is_not_given_two(cluster: Cluster) -> None:
    words = [*AURORA, "cluster.queue=debug", "--", "train", "batch.size=12"]
    assert cluster.submit("folder=jobs/a", *words).returncode == 0
    second = cluster.submit("folder=jobs/b", *words)
    assert second.returncode == 2
    assert "queue debug holds 1 of your jobs, and has 1 of them already (1000.pbs)" in second.stderr
    assert not (cluster.work / "jobs" / "b").exists()
    (cluster.jobs / "1000.pbs.ended").touch()
    assert cluster.submit("folder=jobs/b", *words).returncode == 0


def test_what_the_scheduler_refuses_leaves_nothing_behind(cluster: Cluster) -> None:
    words = [*AURORA, "cluster.queue=debug", "folder=jobs/a", "--", "train", "batch.size=12"]
    refused = cluster.submit("cluster.filesystems=[]", *words)
    assert refused.returncode == 2
    assert "qsub refused jobs/a/job.sh: qsub: missing ['filesystems']" in refused.stderr
    assert not (cluster.work / "jobs" / "a").exists()
    assert cluster.submit(*words).returncode == 0


def test_what_the_job_would_miss_is_missed_at_once(cluster: Cluster) -> None:
    words = [*AURORA, "cluster.queue=debug", "folder=jobs/a", "--", "train", "batch.size=12"]
    nowhere = cluster.submit("cluster.venv=~/nowhere", *words)
    assert "cluster.venv=$HOME/nowhere is no virtual environment" in nowhere.stderr
    spread = ["cluster.environment=spread", "cluster.archive=env.tar.gz"]
    assert "largebatch env pack" in cluster.submit(*spread, *words).stderr
    ended = cluster.work / "jobs" / "a" / "run"
    ended.mkdir(parents=True)
    (ended / "metrics.jsonl").touch()
    (ended / "summary.json").write_text('{"status": "reached"}')
    assert "jobs/a/run already holds a run" in cluster.submit(*words).stderr
    over = cluster.submit(*words, "resume=auto")
    assert "jobs/a/run holds a run that has ended (reached)" in over.stderr
    assert not list(cluster.jobs.glob("*.json"))


def test_a_folder_that_is_there_is_left_alone(cluster: Cluster) -> None:
    taken = cluster.work / "jobs" / "mine"
    taken.mkdir(parents=True)
    (taken / "job.sh").write_text("precious")
    words = ["cluster.queue=debug", "folder=jobs/mine", "--", "train", "batch.size=12"]
    refused = cluster.submit(*AURORA, *words)
    assert refused.returncode == 2
    assert "jobs/mine is there already" in refused.stderr
    assert (taken / "job.sh").read_text() == "precious"


def test_the_jobs_of_a_chain_go_on_from_one_another_and_stop_at_the_end(cluster: Cluster) -> None:
    sent = cluster.submit(
        *AURORA, "cluster.queue=capacity", "cluster.chain=3", "folder=jobs/chain", "--", "train",
        *SMALL, "batch.size=24", "budget.samples=2400", "checkpoint.every_samples=480",
    )  # fmt: skip
    assert sent.returncode == 0, sent.stderr
    assert sent.stdout.startswith("1000.pbs, then 1001.pbs, then 1002.pbs: jobs/chain/job.sh, ")
    assert [cluster.job(n)["depend"] for n in range(3)] == [
        None, "depend=afterany:1000.pbs", "depend=afterany:1001.pbs",
    ]  # fmt: skip
    assert "  resume=auto\n" in cluster.job(0)["script"]
    record = cluster.work / "jobs" / "chain" / "run"

    cluster.environment["FAKE_PALS_RANKS"] = "1"
    cluster.environment["FAKE_PALS_KILL_AFTER"] = str(record / "checkpoints")
    killed = cluster.run(0)
    del cluster.environment["FAKE_PALS_KILL_AFTER"]
    assert killed.returncode != 0
    assert not (record / "summary.json").exists()

    resumed = cluster.run(1)
    assert resumed.returncode == 0, resumed.stderr
    summary = read(record)
    assert (summary["status"], summary["samples"], summary["steps"]) == ("exhausted", 2400, 100)
    lines = (record / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 101))
    assert list((record / ".hydra").glob("resumed-*-config.yaml"))

    (cluster.jobs / "asked").unlink()
    last = cluster.run(2)
    assert last.returncode == 0
    assert "jobs/chain/run has ended (exhausted)" in last.stdout
    assert not (cluster.jobs / "asked").exists()  # no rank was started


def test_two_launchers_of_one_path_train_the_same(cluster: Cluster) -> None:
    words = [*SMALL, "optim=lamb", "batch.size=64", "budget.samples=6400"]
    cluster.environment["PATH"] = f"{BIN}:{os.environ['PATH']}"  # no fakes
    losses = {}
    for launcher in ("mpich", "torchrun"):
        done = cluster.submit(
            "cluster=local", f"cluster.launcher={launcher}", f"folder={launcher}",
            "--", "train", *words,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        record = cluster.work / launcher / "run"
        assert read(record)["provenance"]["launcher"] == launcher.replace("mpich", "mpi")
        assert read(record)["data_parallel_size"] == 2
        lines = (record / "metrics.jsonl").read_text().splitlines()
        losses[launcher] = [json.loads(line)["loss"] for line in lines]
    assert len(losses["mpich"]) == len(losses["torchrun"]) == 100
    apart = max(abs(a - b) / a for a, b in zip(losses["mpich"], losses["torchrun"], strict=True))
    print(f"mpich and torchrun: largest relative difference in 100 losses {apart:.1e}")
    assert apart <= 1e-6
