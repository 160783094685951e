"""The benchmark of collectives sees every wrong value, and its tables say what was measured."""

import csv
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from statistics import median

import collectives_sabotage
import forked
import pytest
import torch

from largebatch.benchmarks.collectives import command as collectives
from largebatch.benchmarks.collectives.models import Link, ring
from largebatch.benchmarks.collectives.steps import CollectiveJob, Measurement, elements, sums
from largebatch.distributed.ranks import free_port

CPU = torch.device("cpu")


def test_the_closed_form_is_the_sum_over_the_ranks() -> None:
    for ranks in (1, 2, 3, 15, 16, 17, 40):
        added = sum(elements(5, 100, rank, CPU) for rank in range(ranks))
        assert torch.equal(sums(5, 100, ranks, CPU), added)
    # The largest world there could be: 12 ranks on each of Aurora's nodes, doubled.
    assert sums(0, 16, 2 * 12 * 10_624, CPU).max() < 2**24  # whole numbers of FP32


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collectives") / "out"
    words = "--device cpu --processes 1,2,3 --sizes 4,10,4K,60000,1M --seconds 0.3"
    assert collectives.main([*words.split(), "--out", str(folder)]) == 0
    return folder


def test_every_collective_is_measured_at_every_size_and_rank_count(measured: Path) -> None:
    with (measured / "collectives.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 5 * 3
    assert {row["values"] for row in rows} == {"right"}
    assert {(row["backend"], row["device"]) for row in rows} == {("gloo", "cpu")}
    for row in rows:
        ranks, nbytes, seconds = int(row["ranks"]), int(row["bytes"]), float(row["seconds"])
        factor = {"all_reduce": 2 * (ranks - 1) / ranks, "broadcast": 1.0}.get(
            row["collective"], (ranks - 1) / ranks
        )
        assert float(row["busbw_factor_nccl_tests"]) == pytest.approx(factor)
        bus = nbytes / seconds * factor
        assert float(row["busbw_bytes_per_second"]) == pytest.approx(bus)
        assert float(row["seconds_least"]) <= seconds <= float(row["seconds_most"])
    # 60,000 bytes fall into 3 shares of whole numbers, 10 are rounded up to the next of them.
    sizes = {(row["collective"], row["ranks"]): [] for row in rows}  # type: dict[tuple[str, str], list[int]]
    for row in rows:
        sizes[row["collective"], row["ranks"]].append(int(row["bytes"]))
    assert sizes["all_reduce", "3"] == [4, 12, 4096, 60_000, 2**20]
    assert sizes["all_gather", "3"] == [12, 12, 4104, 60_000, 1048584]


def test_the_record_holds_every_round_and_what_it_was_measured_with(measured: Path) -> None:
    record = json.loads((measured / "collectives.json").read_text())
    assert record["busbw"] == "nccl-tests"
    assert record["provenance"]["versions"]["torch"] == torch.__version__
    with (measured / "collectives.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    for row, line in zip(record["measured"], table, strict=True):
        assert len(row["seconds"]) == int(line["rounds"]) >= 3
        assert median(row["seconds"]) == pytest.approx(float(line["seconds"]))
    assert {fit["algorithm"] for fit in record["fits"]} >= {"ring", "rabenseifner"}
    assert (measured / "collectives.png").stat().st_size > 10_000


def test_a_folder_with_a_measurement_is_not_written_over(
    measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (measured / "collectives.csv").read_bytes()
    assert collectives.main(["--alpha", "1e-6", "--beta", "1e-9", "--out", str(measured)]) == 2
    assert "--out must be a folder that holds no measurement yet" in capsys.readouterr().err
    assert (measured / "collectives.csv").read_bytes() == before


def test_a_wrong_value_is_found_named_and_not_timed(tmp_path: Path) -> None:
    job = CollectiveJob(["all_reduce", "broadcast"], [256, 1024], 0.1, "cpu")
    work, port = collectives_sabotage.work_as_rank, free_port()
    ranks = [forked.Popen(partial(work, rank, 3, port, job, str(tmp_path))) for rank in range(3)]
    assert forked.all_ended(ranks) is None
    told = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(3)]
    assert told[0] == told[1] == told[2]
    (wrong,) = [row for row in told[0] if row["wrong"]]
    assert (wrong["collective"], wrong["nbytes"], wrong["seconds"]) == ("all_reduce", 1024, [])
    total = 3 + 4 + 5  # element 3 of ranks 0, 1, 2
    fault = f"2 of 256 elements, the first is number 3: {total + 1} instead of {total}"
    assert wrong["wrong"] in {f"rank {rank}: {fault} (and 1 more ranks)" for rank in (1, 2)}
    assert all(len(row["seconds"]) >= 3 for row in told[0] if not row["wrong"])


@pytest.mark.matrix
def test_ranks_of_a_launcher_are_measured_as_they_are(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
            "-m", "largebatch", "bench", "collectives", "--device", "cpu", "--sizes", "8,4K",
            "--seconds", "0.1", "--out", str(tmp_path / "out"),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with (tmp_path / "out" / "collectives.csv").open(encoding="utf-8") as file:
        assert {row["ranks"] for row in csv.DictReader(file)} == {"2"}
    assert done.stdout.count("busbw is nccl-tests'") == 1


def test_a_projection_says_that_it_is_one_and_is_the_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--alpha 2e-6 --beta 4e-11 --inside-beta 0 --inside-alpha 0 --nodes 16,10624"
    assert collectives.main([*words.split(), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "PROJECTION, not a measurement" in told
    assert 'export CCL_ALLREDUCE="topo"' in told
    with (tmp_path / "out" / "projection.csv").open(encoding="utf-8") as file:
        rows = {(int(row["nodes"]), int(row["bytes"])): row for row in csv.DictReader(file)}
    assert {nodes for nodes, _ in rows} == {16, 10_624}
    # 12 ranks of a node share 8 interfaces; each carries a twelfth of the message.
    wanted = ring(10_624, 2**30 / 12).seconds(Link(2e-6, 4e-11 * 12 / 8))
    assert float(rows[10_624, 2**30]["ring_projected_seconds"]) == pytest.approx(wanted)
    settings = (tmp_path / "out" / "oneccl.env").read_text()
    assert settings.startswith("# PROJECTED")
    assert "CCL_ALLREDUCE_SCALEOUT=" in settings
    assert (tmp_path / "out" / "projection.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("local_ranks", "beta_between", "beta_inside", "trust"),
    [
        (1, 1.5e-10, 1 / 15e9, "its link is the network's"),  # 12 ranks would share 8 interfaces
        (4, 1e-10, 1e-10, "its link stands for the network's"),
        (2, 1e-10, 1e-10, "Measure with one rank a node"),
    ],
)
def test_a_fitted_link_is_taken_for_what_it_was_measured_on(
    local_ranks: int, beta_between: float, beta_inside: float, trust: str
) -> None:
    options = collectives.make_parser().parse_args([])
    measured = [Measurement("all_reduce", 4, local_ranks, 8, "gloo", "cpu")]
    cluster, told = collectives.cluster_measured(options, measured, Link(1e-6, 1e-10))
    assert cluster.shared_out.beta == pytest.approx(beta_between)
    assert cluster.inside.beta == pytest.approx(beta_inside)
    assert trust in told


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--processes 0", "--processes must be whole numbers from 1, as 1,2,4, got 0"),
        ("--sizes 4KB", "--sizes must be whole numbers, also as 4K, 2M, 1G, got '4KB'"),
        ("--sizes 0", "--sizes must be 1 byte or more, got 0"),
        ("--collectives gather", "--collectives must be of all_reduce, "),
        ("--alpha 1e-6", "--alpha and --beta must be given together, got 1e-06 and None"),
        ("--alpha 1e-6 --beta -1", "beta must be a number of seconds of at least 0, got -1"),
        ("--alpha 1e-6 --beta 0 --processes 2", "--processes must be left out with --alpha"),
        ("--alpha 0 --beta 0 --adapters 0", "adapters must be 1 or more, got 0"),
        ("--without direct", "--without must be of ring, "),
        ("--without ring,recursive_doubling,double_tree", "--without must be fewer than all"),
        ("--seconds nan", "--seconds must be > 0"),
        ("--device cpu --sizes 8,900G", "--sizes must be such that 2 ranks fit into the "),
        ("--device abacus", "--device must be one of cpu"),
    ],
)
def test_options_that_cannot_be_are_refused(
    words: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert collectives.main(words.split()) == 2
    assert sentence in capsys.readouterr().err


def test_ranks_of_a_launcher_are_not_multiplied(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from largebatch.distributed.ranks import Ranks

    monkeypatch.setattr(collectives, "find_ranks", lambda: Ranks("torchrun", 0, 2, 0, 2))
    assert collectives.main(["--processes", "2"]) == 2
    assert "--processes must be left out in a launch of 2 ranks" in capsys.readouterr().err
