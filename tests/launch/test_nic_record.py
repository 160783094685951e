"""What the recorder saw is what is read again, however counters behave and recorders end."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from nic_tree import HANDLER, HEALTHY, plant, root_of, write

from largebatch.launch.diagnose.nic import command as nic
from largebatch.launch.diagnose.nic.counters import IMPORTANT, list_counters
from largebatch.launch.diagnose.nic.record import NodeRecord, Recorder, read_record

TREE = Path(__file__).with_name("nic_tree.py")


def moved(record: NodeRecord, name: str) -> list[float]:
    if name not in record.names:
        return [0.0] * len(record.times)
    column: list[float] = record.moved[:, record.names.index(name)].tolist()
    return column


def test_counters_are_found_by_listing(tmp_path: Path) -> None:
    plant(tmp_path, interfaces=11)
    (tmp_path / "sys/class/cxi/cxi1/device/telemetry/hni_of_a_later_release").write_text("1@2.5\n")
    (tmp_path / "sys/class/cxi/other").mkdir()
    found = list_counters(tmp_path, None)
    assert len(found) == 11 * (len(HEALTHY) + len(HANDLER)) + 1
    assert "cxi1/hni_of_a_later_release" in found
    assert not any("ALL-in-binary" in name for name in found)
    assert "cxi3/handler/spt_timeouts" in found
    order = list(dict.fromkeys(name.partition("/")[0] for name in found))
    assert order == [f"cxi{n}" for n in range(11)]
    important = list_counters(tmp_path, IMPORTANT)
    assert "cxi1/hni_of_a_later_release" not in important
    assert "cxi1/hni_sts_tx_ok_octets" not in important
    assert {"cxi0/hni_tx_paused_3", "cxi0/handler/trs_in_use"} <= important.keys()
    assert list_counters(tmp_path / "nowhere", None) == {}


def test_what_moved_is_read_again_to_the_last_unit(tmp_path: Path) -> None:
    paths = plant(tmp_path, interfaces=3)
    recorder = Recorder(tmp_path / "nic-a.jsonl", "a", list_counters(tmp_path, None), 1.0)
    recorder.sample()
    drawn = random.Random(0)
    values = dict.fromkeys(paths, 1000)
    truth = []
    for _ in range(20):
        row = {}
        for key, path in paths.items():
            if drawn.random() < 0.5:
                row[key] = drawn.choice([1, 17, 10**12])
                values[key] += row[key]
                write(path, values[key], time.time())
        truth.append(row)
        time.sleep(0.003)  # times are written to a millisecond
        recorder.sample()
    recorder.close()
    record = read_record(tmp_path / "nic-a.jsonl")
    assert (record.node, len(record.times), record.resets, record.lost_lines) == ("a", 20, 0, 0)
    for (index, name), path in paths.items():
        of = "handler/" if "run/cxi" in str(path) else ""
        wanted = [row.get((index, name), 0) for row in truth]
        assert moved(record, f"cxi{index}/{of}{name}") == wanted
    assert (record.lengths > 0).all()


def samples_of(path: Path, tmp_path: Path, texts: list[str | None]) -> NodeRecord:
    """A record of one counter that shows these texts in turn; None: it is gone."""
    recorder = Recorder(tmp_path / "nic-a.jsonl", "a", {"cxi0/hni_tx_paused_0": path}, 1.0)
    for text in texts:
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        time.sleep(0.002)
        recorder.sample()
    recorder.close()
    return read_record(tmp_path / "nic-a.jsonl")


@pytest.mark.parametrize("width", [32, 48, 56, 64])
def test_a_counter_that_runs_over_its_end_goes_on(tmp_path: Path, width: int) -> None:
    texts = [f"{2**width - 5}@1.5", "7@2.5", "9@3.5"]
    record = samples_of(tmp_path / "counter", tmp_path, list(texts))
    assert moved(record, "cxi0/hni_tx_paused_0") == [12, 2]
    assert record.resets == 0


def test_the_greatest_values_come_and_go(tmp_path: Path) -> None:
    top = 2**64 - 1
    texts = [f"{top - 9}", None, f"{top - 5}", f"{top - 2}", "4", None, f"{top}", f"{top}", "0"]
    record = samples_of(tmp_path / "counter", tmp_path, texts)
    assert moved(record, "cxi0/hni_tx_paused_0") == [0, 0, 3, 7, 0, 0, 0, 1]
    assert record.resets == 0


def test_a_counter_that_begins_anew_counts_from_zero(tmp_path: Path) -> None:
    record = samples_of(tmp_path / "counter", tmp_path, ["5000@1.5", "5100@2.5", "30@3.5", "31@4"])
    assert moved(record, "cxi0/hni_tx_paused_0") == [100, 30, 1]
    assert record.resets == 1


def test_a_counter_that_is_gone_for_a_while_moves_nothing_then(tmp_path: Path) -> None:
    record = samples_of(
        tmp_path / "counter", tmp_path, ["10@1.5", None, None, "500@4.5", "junk", "530@6", "533"]
    )
    assert moved(record, "cxi0/hni_tx_paused_0") == [0, 0, 0, 0, 0, 3]


def test_what_cannot_be_read_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(tmp_path / "root")
    telemetry = tmp_path / "root/sys/class/cxi/cxi0/device/telemetry"
    (telemetry / "hni_tx_paused_5").mkdir()
    (telemetry / "hni_tx_paused_6").symlink_to(tmp_path / "nowhere")
    (telemetry / "hni_tx_paused_7").write_text("none\n")
    words = f"record --out {tmp_path} --root {tmp_path / 'root'} --every 0.02 --seconds 0.2"
    assert nic.main([*words.split(), "--node", "n"]) == 0
    told = capsys.readouterr().err.splitlines()
    total = len(list_counters(tmp_path / "root", IMPORTANT))
    assert sorted(told) == [
        f"largebatch nic: 1 of {total} counters cannot be read ({reason}); going on without them"
        for reason in ("Is a directory", "No such file or directory", "no number in it")
    ]
    assert len(read_record(tmp_path / "nic-n.jsonl").times) >= 3


def test_a_record_survives_kill_minus_nine_and_is_gone_on_with(tmp_path: Path) -> None:
    tree = subprocess.Popen(
        [sys.executable, TREE, tmp_path / "tree", "1"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert tree.stdout is not None
    assert tree.stdin is not None
    path = tmp_path / "nic-n.jsonl"
    counts = []
    try:
        assert tree.stdout.readline() == "alive\n"
        for _ in range(2):
            recorder = start_recorder(root_of(tmp_path / "tree", 0), tmp_path, every=0.01)
            wait_for_lines(path, (counts or [0])[-1] + 40)
            recorder.kill()
            assert recorder.wait() == -signal.SIGKILL
            assert recorder.stdout is not None
            recorder.stdout.close()
            counts.append(path.read_bytes().count(b"\n"))
            with path.open("ab") as file:  # the worst that a kill can leave
                file.write(b'{"t":17000000')
        recorder = start_recorder(root_of(tmp_path / "tree", 0), tmp_path, every=0.01)
        wait_for_lines(path, counts[-1] + 40)
        with pytest.raises(ValueError, match="another recorder is at work"):
            Recorder(path, "n", {"cxi0/hni_tx_paused_0": Path("x")}, 1.0)
        recorder.terminate()
        assert recorder.wait(10) == 0
    finally:
        tree.stdin.close()
        tree.wait(10)
        tree.stdout.close()
    assert recorder.stdout is not None
    assert "bytes and" in recorder.stdout.read()
    recorder.stdout.close()
    whole = [text for text in path.read_text().splitlines() if text.endswith("}")]
    assert sum("nic" in json.loads(text) for text in whole) == 3  # each begins with its names
    record = read_record(path)
    assert record.lost_lines == 2
    assert len(record.times) >= 3 * 35
    assert (np.diff(record.times) > 0).all()
    # Cycles at the rates that the tree lives by, whatever was cut: 5 million a second.
    rates = np.array(moved(record, "cxi1/hni_tx_paused_0")).sum() / record.lengths.sum()
    assert rates == pytest.approx(5e6, rel=0.3)


def start_recorder(root: Path, out: Path, every: float) -> "subprocess.Popen[str]":
    module = "largebatch.launch.diagnose.nic.command"
    code = f"import sys; from {module} import main; sys.exit(main(sys.argv[1:]))"
    words = ["record", "--root", root, "--out", out, "--every", str(every), "--node", "n"]
    return subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True)


def wait_for_lines(path: Path, lines: int) -> None:
    end = time.monotonic() + 600
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("record --every 0", "--every must be > 0 seconds, got 0"),
        ("record --seconds nan", "--seconds must be > 0 seconds, got nan"),
        ("record --node a/b", "--node must be a name without /"),
        ("record", "has no counters in sys/class/cxi"),
    ],
)
def test_what_cannot_be_recorded_is_refused(
    words: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*words.split(), "--root", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    assert nic.main(given) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_record_of_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nic-a.jsonl"
    path.write_text(json.dumps({"nic": 2, "node": "a", "names": []}) + "\n")
    with pytest.raises(ValueError, match="a record in format 2, this version reads 1"):
        read_record(path)
    path.write_text("anything\n")
    with pytest.raises(ValueError, match="holds no record"):
        read_record(path)
