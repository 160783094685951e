"""A run's folder that came from elsewhere is data: whoever reads it runs nothing of it."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_ranks import Trainee, sign, state_after
from torch.distributed.checkpoint import metadata as describing
from torch.distributed.checkpoint.metadata import Metadata

from largebatch import cli
from largebatch.common.errors import ConfigError
from largebatch.conf.config import CheckpointConfig
from largebatch.distributed.ranks import Ranks
from largebatch.records.checkpoints import listed
from largebatch.train.checkpoints.checkpoint import Checkpoints
from largebatch.train.checkpoints.command import main
from largebatch.train.checkpoints.description import problem_of
from largebatch.train.checkpoints.files import problem
from largebatch.train.checkpoints.reading import weights_only
from largebatch.train.checkpoints.resume import last_good

Train = Callable[..., int]


class Program:
    """Pickled, a program that makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.mark}'",)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What a `Program` would make."""
    return tmp_path / "mark"


def test_the_program_works(mark: Path) -> None:
    """So the tests below can fail."""
    pickle.loads(pickle.dumps(Program(mark)))
    assert mark.exists()


def saved(run: Path, **options: Any) -> tuple[Checkpoints, Path]:
    """A checkpoint of a small network, with `options` in the optimizer's group."""
    trainee = Trainee("AdamW", sharded=False, seed=0)
    trainee.step(64)
    trainee.optimizer.param_groups[0].update(options)
    checkpoints = Checkpoints(run, Ranks(), trainee.tensors(), CheckpointConfig(every_samples=64))
    checkpoints.save(state_after(64))
    checkpoints.wait()
    return checkpoints, listed(run)[0]


def test_what_describes_a_checkpoint_names_no_code(
    mark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints, checkpoint = saved(tmp_path)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Program(mark)))
    sign(checkpoint)
    with pytest.raises(ConfigError, match=r"\.metadata cannot be read: it names posix.system"):
        checkpoints.load(checkpoint)
    assert main(["export", str(tmp_path), str(tmp_path / "file.safetensors")]) == 2
    assert "it names posix.system" in capsys.readouterr().err
    assert not mark.exists()


def described_by(checkpoint: Path, change: Callable[[Any], Any]) -> None:
    """Have the checkpoint, its checksums too, hold another description."""
    path = checkpoint / ".metadata"
    path.write_bytes(change(pickle.loads(path.read_bytes())))
    sign(checkpoint)


def pointing_to(name: str) -> Callable[[Any], bytes]:
    def change(metadata: Any) -> bytes:
        for info in metadata.storage_data.values():
            info.relative_path = name
        return pickle.dumps(metadata)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda _: pickle.dumps(Program(Path("mark"))), "cannot be read: it names posix.system"),
        (lambda _: pickle.dumps(torch.load), "cannot be read: it names torch.serialization.load"),
        (lambda _: b"no pickle", "cannot be read: "),
        (lambda whole: pickle.dumps(whole)[:-20], "cannot be read: "),
        (lambda _: pickle.dumps({"lr": 0.1}), "cannot be read: it describes no checkpoint"),
        (pointing_to("../elsewhere"), "points out of its folder, to ../elsewhere"),
        (pointing_to("__7_0.distcp"), "points to __7_0.distcp, which is not there"),
    ],
)
@pytest.mark.parametrize("verify", ["size", "auto", "full"])
def test_one_whose_description_is_no_data_is_passed_by(
    verify: str, change: Callable[[Any], Any], says: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    checkpoints, good = saved(tmp_path)
    checkpoints.save(state_after(128))
    bad = listed(tmp_path)[1]
    assert problem(bad, verify) is None
    described_by(bad, change)
    assert f".metadata {says}" in str(problem(bad, verify))
    assert last_good(tmp_path, verify) == good
    told = capsys.readouterr().err
    assert f"passed by {bad.name}: .metadata {says}" in told
    assert "going on from samples-000000000000064" in told
    with pytest.raises(ConfigError):  # as is what a run would have said
        checkpoints.load(bad)
    assert main(["verify", str(tmp_path)]) == 1
    assert main(["ls", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count(f"broken: .metadata {says}") == 2
    assert not Path("mark").exists()


def test_one_without_description_is_broken(tmp_path: Path) -> None:
    _, checkpoint = saved(tmp_path)
    (checkpoint / ".metadata").unlink()
    sign(checkpoint)
    assert problem(checkpoint, "size") == "manifest.json does not list .metadata"


def test_whatever_torch_describes_tensors_with_is_data() -> None:
    classes = [
        kind
        for kind in vars(describing).values()
        if isinstance(kind, type) and kind.__module__ == describing.__name__
    ]
    dtypes = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    known = Metadata({}, planner_data=[classes, dtypes, torch.Size([2]), torch.strided])
    assert problem_of(pickle.dumps(known), ()) is None


def test_no_item_names_code(mark: Path, tmp_path: Path) -> None:
    checkpoints, checkpoint = saved(tmp_path, note=[Program(mark)])
    with pytest.raises(ConfigError, match=r"is not read: it names posix\.system, .*"):
        checkpoints.load(checkpoint)
    assert not mark.exists()


def test_a_description_stays_in_its_folder(tmp_path: Path) -> None:
    checkpoints, checkpoint = saved(tmp_path)
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../elsewhere"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ConfigError, match=r"points out of its folder, to \.\./elsewhere"):
        checkpoints.load(checkpoint)


def test_numbers_texts_and_their_collections_are_read(tmp_path: Path) -> None:
    options = {"betas": (0.8, 0.7), "note": "text", "many": (1, {"two": 2.0}), "none": None}
    _, checkpoint = saved(tmp_path, **options)
    trainee = Trainee("AdamW", sharded=False, seed=1)
    trainee.optimizer.param_groups[0].update(dict.fromkeys(options, (0.1, 0.1)))
    config = CheckpointConfig(every_samples=64)
    Checkpoints(tmp_path, Ranks(), trainee.tensors(), config).load(checkpoint)
    assert {name: trainee.optimizer.param_groups[0][name] for name in options} == options
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_a_value_class_that_its_author_has_declared_is_read(tmp_path: Path) -> None:
    torch.save(Declared(3), tmp_path / "file.pt")
    with (
        pytest.raises(ValueError, match=r"add_safe_globals\(\[Declared\]\) where you define it"),
        weights_only(tmp_path),
    ):
        torch.load(tmp_path / "file.pt", weights_only=False)
    with torch.serialization.safe_globals([Declared]), weights_only(tmp_path):
        assert torch.load(tmp_path / "file.pt", weights_only=False).value == 3


class Declared:
    def __init__(self, value: int) -> None:
        self.value = value


@pytest.mark.parametrize("stage", [0, 1])
def test_files_of_deepspeed_name_no_code(
    stage: int, mark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("deepspeed")
    checkpoint = tmp_path / "checkpoints" / "samples-000000000000064"
    checkpoint.mkdir(parents=True)
    about = {"kind": "deepspeed", "world": 1, "zero_stage": stage}
    state = state_after(64) | {"format": 1, "saved_by": about}
    (checkpoint / "state.json").write_text(json.dumps(state))
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        torch.save({"module": Program(mark)}, checkpoint / name)
    sign(checkpoint)
    assert main(["export", str(tmp_path), str(tmp_path / "file.safetensors")]) == 2
    assert "it names posix.system" in capsys.readouterr().err
    if stage > 0:
        assert main(["universal", str(tmp_path), "--workers", "1"]) == 2
        assert "it names posix.system" in capsys.readouterr().err
    assert not mark.exists()


TARGETS = "task: {_target_: os.system, _args_: [touch MARK]}\nseed: 0\n"
TAGS = "!!python/object/apply:os.system ['touch MARK']\n"


def test_commands_that_read_a_run_run_nothing_of_its_configuration(
    train: Train, mark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        "task=digits", "optim=sgd", "target.loss=null", "budget.samples=256", "batch.size=64",
        "checkpoint.every_samples=128", "hydra.run.dir=run",
    )  # fmt: skip
    assert train(*words) == 0
    (tmp_path / "run" / "summary.json").unlink()
    for text in (TARGETS, TAGS):
        for path in (tmp_path / "run" / ".hydra").iterdir():
            path.write_text(text.replace("MARK", str(mark)))
        for command in ("report", "explain", "checkpoint ls", "checkpoint verify"):
            cli.main([*command.split(), "run"])
        assert train(*words, "resume=auto") == 2
        assert not mark.exists()
        assert "Traceback" not in capsys.readouterr().err
