"""Trouble in the counters is found where and when it was; healthy noise is left in peace."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nic_noise import BEGIN, EVERY, healthy, write_records
from nic_recording import Trees, recording

from largebatch.launch.diagnose import command as explain
from largebatch.launch.diagnose.nic import command as nic
from largebatch.launch.diagnose.nic import survey as nic_survey
from largebatch.launch.diagnose.nic.record import NodeRecord
from largebatch.launch.diagnose.nic.report import Episode
from largebatch.launch.diagnose.nic.report import unusual as unusual_in
from largebatch.launch.diagnose.nic.survey import (
    Survey,
    borders_of,
    read_span,
    read_survey,
    rows_of,
    survey,
)


def span_of(record: NodeRecord) -> tuple[float, float, float]:
    """As `read_span` has it of the record's file."""
    begin = float(record.times[0] - record.lengths[0])
    return begin, float(record.times[-1]), float(np.median(record.lengths))


def survey_of(records: list[NodeRecord], borders: Any) -> Survey:
    return survey((rows_of(record, borders) for record in records), borders)


def unusual(records: list[NodeRecord]) -> list[Episode]:
    return unusual_in(survey_of(records, borders_of([span_of(record) for record in records])))


@pytest.mark.parametrize("nodes", [1, 2, 4, 20, 200])
def test_healthy_noise_stands_out_nowhere(nodes: int) -> None:
    seeds = range(3) if nodes == 200 else range(20)
    assert [episode for seed in seeds for episode in unusual(healthy(seed, nodes))] == []


def add(name: str, rate: float, first: int, last: int, on: set[int] | None = None) -> Any:
    """Trouble: `rate` more a second from sample `first` to `last`, on these nodes or on all."""

    def trouble(node: int, moved: dict[str, Any]) -> None:
        if on is None or node in on:
            key = next(key for key in moved if key.endswith(name))
            moved[key][first : last + 1] += rate * EVERY

    return trouble


def at(sample: int) -> float:
    return BEGIN + EVERY * sample


def check_time(episode: Episode, first: int, last: int) -> None:
    """To two samples: stretches of time are a little longer than a sample."""
    assert episode.begin == pytest.approx(at(first), abs=2.5 * EVERY)
    assert episode.end == pytest.approx(at(last + 1), abs=2.5 * EVERY)


@pytest.mark.parametrize("seed", range(3))
def test_a_node_that_waits_is_found_with_its_time_and_counter(seed: int) -> None:
    records = healthy(seed, trouble=add("hni_tx_paused_1", 4e8, 40, 60, {7}))
    (episode,) = unusual(records)
    assert (episode.kind.name, episode.nodes, episode.everywhere) == (
        "transmit pauses", ("x0007",), False,
    )  # fmt: skip
    assert episode.counter == "cxi7/hni_tx_paused_1"
    check_time(episode, 40, 60)
    assert episode.value == pytest.approx(0.4, rel=0.1)
    assert "x0007" in str(episode)


def test_several_nodes_are_named_in_the_order_of_their_trouble() -> None:
    def trouble(node: int, moved: dict[str, Any]) -> None:
        add("pct_sct_timeouts", 2.0 if node == 3 else 9.0, 20, 50, {3, 12})(node, moved)

    (episode,) = unusual(healthy(0, trouble=trouble))
    assert episode.kind.name == "time-outs"
    assert episode.nodes == ("x0012", "x0003")


def test_congestion_of_all_nodes_is_seen_in_time() -> None:
    (episode,) = unusual(healthy(1, trouble=add("hni_tx_paused_0", 5e8, 30, 55)))
    assert episode.everywhere
    assert len(episode.nodes) == 20
    check_time(episode, 30, 55)


def test_one_node_is_held_against_its_own_past() -> None:
    (episode,) = unusual(healthy(2, nodes=1, trouble=add("hni_rx_paused_0", 6e8, 50, 80)))
    assert (episode.kind.name, episode.nodes) == ("receive pauses", ("x0000",))
    check_time(episode, 50, 80)


def test_pauses_that_never_end_are_found_without_anything_to_compare() -> None:
    (episode,) = unusual(healthy(3, nodes=2, trouble=add("hni_tx_paused_0", 6e8, 0, 90, {1})))
    assert episode.nodes == ("x0001",)
    check_time(episode, 0, 89)


def test_paused_is_cycles_over_a_billion_a_second() -> None:
    moved = np.array([[2.5e8, 1e8], [7.5e8, 9e8], [0.0, 0.0]])
    names = ["cxi0/hni_tx_paused_0", "cxi1/hni_tx_paused_4"]
    times = BEGIN + np.array([1.0, 2.0, 3.0])
    record = NodeRecord("a", times, np.ones(3), names, moved)
    (reading,) = survey_of([record], BEGIN + np.array([0.0, 1.0, 2.0, 3.0])).readings
    assert reading.values.tolist() == [[0.25, 0.9, 0.0]]  # the interface that waited most
    assert reading.means.tolist() == [pytest.approx(1 / 3)]
    assert reading.worst == ["cxi0/hni_tx_paused_0"]


def test_trouble_of_two_nodes_at_two_times_is_two_episodes() -> None:
    def trouble(node: int, moved: dict[str, Any]) -> None:
        add("hni_tx_paused_1", 4e8, 10, 20, {3})(node, moved)
        add("hni_tx_paused_1", 4e8, 60, 70, {9})(node, moved)

    first, second = unusual(healthy(5, trouble=trouble))
    assert (first.nodes, second.nodes) == (("x0003",), ("x0009",))
    check_time(first, 10, 20)
    check_time(second, 60, 70)


@pytest.mark.parametrize("many", [64, 1])  # in this process, in several
def test_files_are_surveyed_as_what_was_written_into_them(
    many: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nic_survey, "MANY", many)
    records = healthy(6, nodes=5)
    write_records(tmp_path, records)
    (tmp_path / "nic-empty.jsonl").write_text('{"nic":1,"node":"e","names":[],"time":1}\n')
    for record in records:
        span = read_span(tmp_path / f"nic-{record.node}.jsonl")
        assert span is not None
        assert span[:2] == pytest.approx(span_of(record)[:2])
        assert span[2] == pytest.approx(EVERY, rel=0.02)
    of_files = read_survey(tmp_path, [])
    assert of_files is not None
    of_records = survey_of(records, of_files.borders)
    assert of_files.nodes == of_records.nodes
    for one, other in zip(of_files.readings, of_records.readings, strict=True):
        np.testing.assert_allclose(one.values, other.values, rtol=1e-6)
        assert one.worst == other.worst


def test_two_samples_are_enough_for_a_report_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = {"nic": 1, "node": "a", "time": 1.0, "every": 1.0, "names": ["cxi0/hni_tx_paused_0"]}
    lines = [header, {"t": 100.0, "v": [5]}, {"t": 101.0, "d": [0, 100_000_000]}]
    (tmp_path / "nic-a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert nic.main(["report", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "transmit pauses: 10.0% of the time on the median node" in told
    assert "nothing stands out" in told


def test_a_node_that_was_not_recorded_for_a_while_is_not_taken_for_quiet() -> None:
    records = healthy(4)
    cut = records[0]
    part = slice(30, 60)
    records[0] = NodeRecord(
        cut.node, cut.times[part], cut.lengths[part], cut.names, cut.moved[part]
    )
    borders = borders_of([span_of(record) for record in records])
    found = survey_of(records, borders).readings
    (reading,) = [r for r in found if r.kind.name == "transmit pauses"]
    assert np.isnan(reading.values[0]).sum() == pytest.approx(len(borders) * 2 / 3, abs=2)
    assert not np.isnan(reading.values[1:]).any()
    assert unusual(records) == []


def write_run(folder: Path, begun: float, ended: float, slow: tuple[float, float]) -> None:
    """A run's folder: a step every 0.02 s, ten times as long in the slow part."""
    folder.mkdir(exist_ok=True)
    now, step, lines = begun, 0, []
    while now < ended:
        took = 0.2 if slow[0] <= now < slow[1] else 0.02
        now, step = now + took, step + 1
        line = {"step": step, "samples": 64 * step, "seconds": round(now - begun, 4)}
        lines.append(line | {"global_batch_size": 64, "samples_per_second": 64 / took})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    (folder / "heartbeat.json").write_text(json.dumps({"step": step, "time": now}))


def test_a_congestion_in_living_counters_is_found_beside_the_steps_that_it_slowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six nodes; node 2 is made to wait for a while."""
    run = tmp_path / "run"
    names = [f"x{node}" for node in range(6)]
    with Trees(tmp_path / "tree", 6) as trees, recording(trees, run / "nic", names, 0.15):
        begun = time.time()
        time.sleep(1.5)
        trees.set_rate(2, "hni_tx_paused_3", 9e8)
        slow = [time.time()]
        time.sleep(1.5)
        trees.set_rate(2, "hni_tx_paused_3", 2e6)
        slow.append(time.time())
        time.sleep(1.5)
        ended = time.time()
    write_run(run, begun, ended, (slow[0], slow[1]))
    assert nic.main(["report", str(run)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("6 nodes, 2 interfaces that counted")
    # On a busy machine the counters may stand still for a while, which cuts an episode in two.
    lines = [line for line in told if line.startswith("unusual: ")]
    assert lines
    assert all(line.startswith("unusual: transmit pauses on x2, ") for line in lines)
    assert all(line.endswith("hni_tx_paused_3") for line in lines)
    line = next(line for line in told if line.startswith("at the same time: "))
    assert "took 0.2 s instead of 0.02 s, and transmit pauses on x2" in line
    assert (run / "nic.png").stat().st_size > 10_000
    assert explain.main([str(run)]) == 0
    told = capsys.readouterr().out
    assert told.split("\n1. ")[1].startswith("Steps ")
    first = told.split("\n1. ")[1].split("\n2. ")[0]
    assert "while the network showed transmit pauses on x2: the node had to wait" in first


@pytest.mark.parametrize(
    ("given", "sentence"),
    [("none", "is no folder"), (".", "holds no nic-NODE.jsonl")],
)
def test_what_cannot_be_reported_is_refused(
    given: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert nic.main(["report", str(tmp_path / given)]) == 2
    assert sentence in capsys.readouterr().err
