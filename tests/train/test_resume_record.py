"""What resumption does where a part of the record, or of the data, is gone, damaged or another's:
nothing is begun again, lost or skipped in silence.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from token_writers import plain

from largebatch.common.files import write_whole
from largebatch.train import command
from largebatch.train.checkpoints.command import main

Train = Callable[..., int]

STEPS = 20
WORDS = (
    "task=digits", "optim=sgd", "batch.size=64", "target.loss=null", f"budget.samples={64 * STEPS}",
    "evaluation.growth=100", "checkpoint.every_samples=320", "checkpoint.keep=9", "resume=auto",
    "hydra.run.dir=run",
)  # fmt: skip


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has spent its budget, at a constant learning rate."""
    folder = tmp_path_factory.mktemp("ended")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert command.main([*WORDS]) == 0
    return folder / "run"


@pytest.fixture
def run(ended: Path, tmp_path: Path) -> Path:
    """The same run, in a folder of its own."""
    shutil.copytree(ended, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def killed(run: Path) -> Path:
    """The same run as if killed after step 17: the last checkpoint is of step 15."""
    (run / "summary.json").unlink()
    shutil.rmtree(checkpoint(run, STEPS))
    cut(run, 17)
    return run


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"samples-{64 * step:015d}"


def cut(run: Path, steps: int) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:steps]))


def read_lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_lines(run)}


def content(run: Path) -> dict[str, bytes]:
    """All that is in a run's folder."""
    files = [path for path in run.rglob("*") if path.is_file()]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


# A record that was left behind --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "way"),
    [
        ([".hydra"], "lacks .hydra/config.yaml, so nothing is resumed and nothing begun again"),
        (["metrics.jsonl"], "lacks metrics.jsonl, so nothing is resumed and nothing begun again"),
        ([".hydra", "metrics.jsonl"], "lacks .hydra/config.yaml and metrics.jsonl, so nothing"),
        ([".hydra", "metrics.jsonl", "events.jsonl", "heartbeat.json"], "or choose another hydra"),
        ([".hydra", "checkpoints"], "holds the lines of a run and lacks .hydra/config.yaml"),
    ],
)
def test_a_run_whose_record_was_left_behind_is_not_begun_again(
    missing: list[str], way: str, killed: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in missing:
        path = killed / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    before = content(killed)
    assert train(*WORDS) == 2
    assert way in capsys.readouterr().err
    assert train(*WORDS, "resume=null") == 2
    assert "already holds a run" in capsys.readouterr().err
    assert content(killed) == before


@pytest.mark.parametrize("left", [0, 5])
def test_lines_that_are_lost_are_said(
    left: int, killed: Path, ended: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(killed, left)
    assert train(*WORDS) == 0
    said = f"metrics.jsonl ends after step {left}, and the checkpoint is of step 15"
    assert said in capsys.readouterr().err
    (event,) = map(json.loads, (killed / "events.jsonl").read_text().splitlines())
    assert (event["kind"], event["step"], event["samples"]) == ("hole", 15, 960)
    assert said in event["reason"]
    kept = [*range(1, left + 1), *range(16, STEPS + 1)]
    assert losses(killed) == {step: losses(ended)[step] for step in kept}


def test_lines_that_were_never_written_are_no_loss(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*WORDS, "record.every=7", "budget.samples=640")
    assert train(*words) == 0
    (tmp_path / "run" / "summary.json").unlink()
    shutil.rmtree(checkpoint(tmp_path / "run", 10))
    capsys.readouterr()
    assert train(*words) == 0
    assert "largebatch: " not in capsys.readouterr().err
    assert not (tmp_path / "run" / "events.jsonl").exists()


def test_half_a_line_and_what_is_made_again_may_be_damaged(
    killed: Path, ended: Path, train: Train
) -> None:
    text = (killed / "metrics.jsonl").read_text()
    for tail in ('{"step": 18, "sam', "\0\0\0\n", "[1]\n\n{}\n"):
        (killed / "metrics.jsonl").write_text(text + tail)
        shutil.rmtree(checkpoint(killed, STEPS), ignore_errors=True)
        (killed / "summary.json").unlink(missing_ok=True)
        assert train(*WORDS) == 0
        assert losses(killed) == losses(ended)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("summary.json", "", "summary.json is empty: restore it, or delete it if the run is to go"),
        ("summary.json", '{"status": "int', "summary.json is not valid JSON"),
        ("summary.json", "[]", "summary.json must hold an object"),
        ("summary.json", "{}", "summary.json: the key status is missing"),
        ("summary.json", '{"status": [7]}', "summary.json: status must be one of reached, "),
        (".hydra/config.yaml", "", "config.yaml is damaged (it is empty): restore it, or choose"),
        (".hydra/config.yaml", "seed: [", "config.yaml is damaged (while parsing"),
        (".hydra/config.yaml", "seed: 0\n", "config.yaml has no batch, budget, evaluation, guard"),
        (".hydra/config.yaml", "!!python/name:os.system\n", "config.yaml is damaged (could not"),
        (".hydra/config.yaml", "\x00", "config.yaml is damaged ("),
        ("metrics.jsonl", "5\n", "metrics.jsonl:1 must be an object, got 5: mend that line, or"),
        ("metrics.jsonl", "{oops\n", "metrics.jsonl:1 is not valid JSON"),
        ("metrics.jsonl", '{"samples": null}\n', "metrics.jsonl:1: samples must be a whole number"),
        ("metrics.jsonl", '{"samples": 1}\n', "metrics.jsonl:1: the key seconds is missing"),
    ],
)
def test_a_damaged_file_is_named_with_the_way_out(
    name: str, text: str, says: str, killed: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    more = (killed / name).read_text() if name == "metrics.jsonl" else ""
    (killed / name).write_text(text + more)
    before = content(killed)
    assert train(*WORDS) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert content(killed) == before


def test_drafts_of_a_process_that_was_killed_are_removed(killed: Path, train: Train) -> None:
    drafts = [".heartbeat.json.4711", ".summary.json.1", ".hydra/.config.yaml.12"]
    for name in drafts:
        (killed / name).touch()
    assert train(*WORDS) == 0
    assert not [name for name in drafts if (killed / name).exists()]


def test_what_cannot_be_replaced_leaves_no_draft(tmp_path: Path) -> None:
    (tmp_path / "file" / "within").mkdir(parents=True)
    with pytest.raises(OSError, match="file"):
        write_whole(tmp_path / "file", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# The data -----------------------------------------------------------------------------------------


TOKENS = (
    "task=tokens", "task.path=data", "task.dtype=uint16", "task.vocabulary=64",
    "task.sequence_length=16", "model=transformer", "model.dim=16", "model.depth=1",
    "model.heads=2", "optim=sgd", "batch.size=16", "budget.samples=96", "evaluation.growth=100",
    "checkpoint.every_samples=32", "resume=auto", "hydra.run.dir=run",
)  # fmt: skip


def test_other_data_under_the_same_name_is_refused(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = (np.random.default_rng(0).integers(0, 64, 6000)).tolist()
    plain(tmp_path / "data.bin", tokens)
    assert train(*TOKENS) == 0
    run = tmp_path / "run"
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / f"samples-{96:015d}")
    before = content(run)
    for other, says in (
        (tokens[::-1], "(data_hash was "),
        (tokens + tokens[:2000], "(num_train was "),
    ):
        plain(tmp_path / "data.bin", other)
        capsys.readouterr()
        assert train(*TOKENS) == 2
        told = capsys.readouterr().err
        assert f"the data is not what {run}/checkpoints/samples-{64:015d} was trained on" in told
        assert says in told
        assert "or begin a run with the new data in a folder of its own" in told
        assert content(run) == before
    plain(tmp_path / "data.bin", tokens)
    assert train(*TOKENS) == 0


def test_a_record_of_before_there_was_a_key_is_resumed(
    killed: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    config = killed / ".hydra" / "config.yaml"
    lines = config.read_text().splitlines(keepends=True)
    before = [line for line in lines if "duration_exponent: null" not in line]
    assert len(before) == len(lines) - 1
    config.write_text("".join(before))
    moved = ("scaling.duration_exponent=0.5", "scaling.base_samples=1000")
    assert train(*WORDS, *moved) == 2
    assert "scaling.duration_exponent=None (now 0.5)" in capsys.readouterr().err
    assert train(*WORDS) == 0
    assert len(read_lines(killed)) == STEPS


# A longer run -------------------------------------------------------------------------------------

LONGER = f"budget.samples={64 * 2 * STEPS}"


def test_a_run_whose_schedule_does_not_depend_on_its_budget_can_be_lengthened(
    run: Path, train: Train, tmp_path: Path
) -> None:
    assert train(*WORDS, LONGER) == 0
    assert train(*WORDS, LONGER, "hydra.run.dir=at-once") == 0
    assert losses(run) == losses(tmp_path / "at-once")
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["budget_samples"]) == ("exhausted", 64 * 2 * STEPS)
    assert train(*WORDS) == 2  # back to the budget that it began with


def test_a_budget_in_tokens_grows_too(train: Train, tmp_path: Path) -> None:
    plain(tmp_path / "data.bin", (np.arange(6000) % 64).tolist())
    words = [word for word in TOKENS if not word.startswith("budget")]
    assert train(*words, f"budget.tokens={16 * 64}") == 0
    assert train(*words, f"budget.tokens={16 * 96}") == 0
    assert [line["samples"] for line in read_lines(tmp_path / "run")] == [16, 32, 48, 64, 80, 96]


WSD = (*WORDS, "lr=wsd", "lr.decay_fraction=0.5")


def test_a_curve_that_would_have_been_another_is_refused(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*WSD) == 0
    run = tmp_path / "run"
    before = content(run)
    assert train(*WSD, LONGER) == 2
    told = capsys.readouterr().err
    assert "budget.samples=2560 was 1280, and the schedule depends on it: after 6" in told
    assert "checkpoints of up to 640 samples can be lengthened" in told
    assert content(run) == before
    for step in (15, 20):
        checkpoint(run, step).rename(tmp_path / str(step))
    assert train(*WSD, LONGER) == 0
    assert train(*WSD, LONGER, "hydra.run.dir=at-once") == 0
    assert losses(run) == losses(tmp_path / "at-once")


def test_rates_that_follow_the_length_of_the_run_are_another_run_s_in_a_longer_one(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*WORDS, "scaling.duration_exponent=0.5", "scaling.base_samples=320", "optim.lr=0.4")
    assert train(*words) == 0
    assert {line["lr"] for line in read_lines(tmp_path / "run")} == {0.2}
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["lr"] == 0.2
    assert train(*words, LONGER) == 2
    assert "the schedule depends on it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("budget.samples=640",), "was made with budget.samples=1280 (now 640)"),
        ((LONGER, "optim.lr=0.5"), "was made with optim.lr="),
        ((), "there is nothing to resume; choose another folder with hydra.run.dir=…, or a larger"),
    ],
)
def test_a_budget_only_grows(
    words: tuple[str, ...], says: str, run: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(run)
    assert train(*WORDS, *words) == 2
    assert says in capsys.readouterr().err
    assert content(run) == before


def test_a_run_without_checkpoints_is_not_lengthened_by_beginning_again(
    run: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "checkpoints")
    before = content(run)
    assert train(*WORDS, LONGER) == 2
    assert "there is nothing to resume" in capsys.readouterr().err
    assert content(run) == before


# What ls promises ---------------------------------------------------------------------------------


def test_ls_offers_what_resume_takes_and_no_more(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def offered(path: Path = run) -> tuple[list[str], str]:
        assert main(["ls", str(path)]) == 0
        _, *lines = capsys.readouterr().out.splitlines()
        marked = [line.split()[0] for line in lines if line.endswith("<- resume=auto")]
        return marked, lines[-1]

    assert offered()[0] == []
    assert "resume=auto takes none: " in offered()[1]
    assert "holds a run that has ended (exhausted)" in offered()[1]
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"status": "diverged"}))
    assert "holds a run that has ended (diverged)" in offered()[1]
    (run / "summary.json").write_text(json.dumps(summary | {"status": "interrupted"}))
    assert offered()[0] == ["1280"]
    assert offered(checkpoint(run, 20))[0] == ["1280"]
    assert offered(checkpoint(run, 15))[0] == []
    monkeypatch.chdir(run / "checkpoints")
    assert offered(Path(checkpoint(run, 20).name))[0] == ["1280"]
    assert offered(Path(".."))[0] == ["1280"]
    (run / ".hydra" / "config.yaml").unlink()
    assert offered()[0] == []
    assert "lacks .hydra/config.yaml" in offered()[1]


def test_a_run_goes_on_whose_engine_was_recorded_under_an_earlier_name(
    killed: Path, train: Train
) -> None:
    recorded = killed / ".hydra" / "config.yaml"
    text = recorded.read_text()
    assert "largebatch.train.engines.ddp.DDP" in text
    recorded.write_text(text.replace("engines.ddp.DDP", "engines.DDP"))
    assert train(*WORDS, "engine._target_=largebatch.train.engines.DDP") == 0
    assert losses(killed).keys() == {*range(1, STEPS + 1)}
