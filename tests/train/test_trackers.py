"""Trackers, read back by their own libraries from what they leave without a server."""

import csv
import json
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fixture_types import Train

from largebatch.train.trackers.base import Labels
from largebatch.train.trackers.study import log_study
from largebatch.train.trackers.wandb import Wandb, has_login

if TYPE_CHECKING:
    from wandb.proto.wandb_internal_pb2 import Record

RUN = ("task=digits", "optim=lamb", "optim.lr=0.05", "batch.size=64", "budget.samples=192",
       "target.loss=null", "evaluation.growth=100", "noise.small=micro_batch",
       "engine.micro_batch_size=16", "hydra.run.dir=run")  # fmt: skip
FLAT = {"optimizer": "lamb", "task": "digits", "model": "digits_mlp", "batch_size": 64,
        "lr": 0.05, "seed": 0}  # fmt: skip


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def stored(log: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format, after seven bytes of wandb's own."""
    place, parts = 7, b""
    while place + 7 <= len(log):
        if (rest := 32768 - place % 32768) < 7:  # no header begins there
            place += rest
            continue
        _, length, kind = struct.unpack_from("<IHB", log, place)
        parts += log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield parts
            parts = b""


def records_in(folder: Path) -> "Iterator[Record]":
    """Of the only run in `folder/wandb`, once wandb's own process has written the last of them."""
    from wandb.proto.wandb_internal_pb2 import Record  # a second, which few workers need

    until = time.monotonic() + 600
    while time.monotonic() < until:
        found, whole = [], []
        for file in (folder / "wandb").glob("offline-run-*/run-*.wandb"):
            for data in stored(file.read_bytes()):
                found.append(Record())
                found[-1].ParseFromString(data)
            whole.append(bool(found) and found[-1].WhichOneof("record_type") == "exit")
        if whole and all(whole):
            yield from found
            return
        time.sleep(0.05)
    raise AssertionError(f"{folder} holds no whole run")


def labels(name: str = "mine") -> Labels:
    return Labels(name, "sweep", "lamb", "bytes", "byte_mlp", 64, 0.1, 0, None)


def test_wandbs_file_has_axis_sections_name_and_config(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert train(*RUN, "logger=wandb", "logger.group=mine") == 0
    (stored_in,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert f"wandb sync {os.path.relpath(stored_in)}" in capsys.readouterr().err
    rows, axes = [], {}
    config: dict[str, Any] = {}
    for record in records_in(tmp_path / "run"):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            row = {item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json)
                   for item in record.history.item}  # fmt: skip
            rows.append(row)
        elif kind == "metric":
            axes[record.metric.glob_name or record.metric.name] = record.metric.step_metric
        elif kind == "run":
            name, group = record.run.display_name, record.run.run_group
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    assert {axes[f"{section}/*"] for section in ("train", "eval", "optim", "noise")} == {"samples"}
    assert [row["samples"] for row in rows] == [64, 128, 192]
    lines = records(tmp_path / "run")
    assert [row["train/loss"] for row in rows] == [line["loss"] for line in lines]
    assert rows[-1]["eval/loss"] == lines[-1]["eval_loss"]
    assert {"optim/lr", "optim/batch_size", "noise/grad_trace"} <= rows[0].keys()
    assert name == " ".join(word for word in RUN if not word.startswith("hydra."))
    assert group == "mine"
    assert {key: config[key] for key in FLAT} == FLAT
    assert config["config"]["optim"]["lr"] == 0.05


def test_tensorboards_files_and_the_csv_have_every_number(train: Train, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(*RUN, "logger=tensorboard") == 0
    lines = records(tmp_path / "run")
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    losses = found.Scalars("train/loss")
    assert [event.step for event in losses] == [64, 128, 192]
    assert [event.value for event in losses] == pytest.approx([line["loss"] for line in lines])
    assert "config/text_summary" in found.Tags()["tensors"]


def test_the_csv_has_a_row_a_line(train: Train, tmp_path: Path) -> None:
    assert train(*RUN, "logger=csv") == 0
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    lines = records(tmp_path / "run")
    assert [float(row["loss"]) for row in rows] == [line["loss"] for line in lines]
    assert [row["eval_loss"] != "" for row in rows] == ["eval_loss" in line for line in lines]


@pytest.mark.filterwarnings("ignore")  # sqlalchemy about mlflow
def test_mlflows_store_has_metrics_by_samples_and_a_resumed_run_continues(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    store = f"sqlite:///{tmp_path}/runs.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    words = (*RUN, "logger=mlflow", "checkpoint.every_samples=64", "resume=auto")
    assert train(*words, "budget.samples=128") == 0
    assert train(*words) == 0
    client = MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("largebatch").experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    lines = records(tmp_path / "run")
    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == [
        (line["samples"], line["loss"]) for line in lines
    ]
    assert run.info.status == "FINISHED"
    assert {key: run.data.params[key] for key in FLAT} == {k: str(v) for k, v in FLAT.items()}
    assert run.data.params["optim.lr"] == "0.05"


@pytest.mark.filterwarnings("ignore")  # sqlalchemy about mlflow
def test_mlflow_keeps_a_study_as_one_run_with_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store := f"sqlite:///{tmp_path}/runs.db")
    study, table = tmp_path / "bytes", tmp_path / "curve.csv"
    study.mkdir()
    table.write_text("optimizer,steps\nlamb,19.4\n")
    node = {"_target_": "largebatch.train.trackers.mlflow.MLflow", "experiment": "mine"}
    for _ in range(2):
        log_study(node, study, {}, {"curve": table})
    client = MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert (run.info.run_name, run.info.status) == ("bytes: the study", "FINISHED")
    assert run.data.tags["group"] == "bytes"
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["curve.csv"]


@pytest.mark.parametrize("key", ["", "0" * 40])
def test_a_login_by_netrc_counts_for_its_own_host(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_login()
    host = "wandb.example.org" if key else "other.example.org"
    (tmp_path / "netrc").write_text(f"machine {host} login user password {'0' * 40}\n")
    assert has_login() == bool(key)


def test_the_environments_mode_wins_and_a_resumed_run_keeps_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Online, the key would make it wait for a server that is not there."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (1, 2):
        logger = Wandb(folder, {"seed": 0}, labels(), "project")
        logger.log({"step": step, "samples": 64 * step, "loss": 1.0 / step})
        logger.finish({"status": "interrupted"})
    assert [*records_in(folder)]
    files = [*(folder / "wandb").glob("offline-run-*/run-*.wandb")]
    first, *others = {file.stem.removeprefix("run-") for file in files}
    assert not others
    assert (folder / "wandb" / "run_id").read_text().strip() == first


def test_a_study_is_one_run_more_with_its_pictures_and_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from matplotlib.figure import Figure

    from largebatch.common.figures import COLOURS

    monkeypatch.setenv("WANDB_MODE", "offline")
    study, table, picture = tmp_path / "bytes", tmp_path / "curve.csv", tmp_path / "curve.png"
    study.mkdir()
    table.write_text("optimizer,steps\nlamb,19.4\n")
    Figure(figsize=(0.2, 0.2), facecolor=COLOURS[0]).savefig(picture)
    node = {"_target_": "largebatch.train.trackers.wandb.Wandb", "project": "p", "group": None}
    for _ in range(2):
        log_study(node, study, {"curve": picture}, {"curve": table})
    assert capsys.readouterr().err == ""
    runs, told = [], {}
    for record in records_in(study):
        if record.WhichOneof("record_type") == "run":
            runs.append((record.run.run_group, record.run.job_type, record.run.display_name))
        elif record.WhichOneof("record_type") == "history":
            told |= {tuple(item.nested_key): item.value_json for item in record.history.item}
    files = (study / "wandb").glob("offline-run-*/run-*.wandb")
    assert len({file.stem for file in files}) == 1  # the second continues the first
    assert runs[0] == ("bytes", "study", "bytes: the study")
    kinds = {key[0]: json.loads(value) for key, value in told.items() if key[1:] == ("_type",)}
    assert kinds == {"curve": "image-file", "tables/curve": "table-file"}
    assert told["tables/curve", "nrows"] == "1"
    log_study({"_target_": "no.such.Logger"}, study, {}, {})
    assert "the logger has not taken the study" in capsys.readouterr().err
