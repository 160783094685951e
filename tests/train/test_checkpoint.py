"""A checkpoint is complete or not there, tells whether it is whole; a full disk costs no more."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from checkpoint_ranks import SmallDisk, Trainee, sign, state_after, work
from gloo_ranks import launch, successful

from largebatch.common.errors import ConfigError
from largebatch.conf.config import CheckpointConfig
from largebatch.distributed.ranks import Ranks
from largebatch.records.checkpoints import listed, samples_of
from largebatch.train.checkpoints.checkpoint import CheckpointFailed, Checkpoints
from largebatch.train.checkpoints.command import main
from largebatch.train.checkpoints.files import check_elsewhere, problem, retire
from largebatch.train.checkpoints.resume import last_good

Train = Callable[..., int]
Saved = list[Path]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """The checkpoints of a run, oldest first: after 64, 128 and 192 samples."""
    save(tmp_path, 64, 128, 192)
    return listed(tmp_path)


def save(run: Path, *samples: int, **config: Any) -> Checkpoints:
    trainee = Trainee("AdamW", sharded=False, seed=0)
    options = CheckpointConfig(every_samples=64, **{"keep": 9} | config)
    checkpoints = Checkpoints(run, Ranks(), trainee.tensors(), options)
    for number in samples:
        trainee.step(number)
        checkpoints.save(state_after(number))
    checkpoints.wait()
    return checkpoints


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))


# Whole or broken ---------------------------------------------------------------------------------


def flipped(checkpoint: Path) -> None:
    flip(checkpoint / "__0_0.distcp", 1000)


def cut(checkpoint: Path) -> None:
    os.truncate(checkpoint / "__0_0.distcp", 100)


def lost(checkpoint: Path) -> None:
    (checkpoint / ".metadata").unlink()


def scrawled(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text('{"files": ')


def forged(checkpoint: Path) -> None:
    flip(checkpoint / "state.json", 20)


def unsigned(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def listing(checkpoint: Path, *names: str) -> None:
    """Have the manifest list these files only, and damage one of the others."""
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = {name: manifest["files"][name] for name in names}
    path.write_text(json.dumps(manifest))
    flipped(checkpoint)


def blank(checkpoint: Path) -> None:
    listing(checkpoint)


def partial(checkpoint: Path) -> None:
    listing(checkpoint, "state.json", ".metadata")


def stateless(checkpoint: Path) -> None:
    listing(checkpoint, ".metadata", "__0_0.distcp")


def nowhere(checkpoint: Path) -> None:
    (checkpoint / "state.json").write_text("{}")
    sign(checkpoint)


def from_later(checkpoint: Path) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(state | {"format": 7}))
    sign(checkpoint)


@pytest.mark.parametrize(
    ("damage", "says", "seen_by_size"),
    [
        (flipped, "__0_0.distcp is not what was written (CRC ", False),
        (cut, "__0_0.distcp has 100 bytes of ", True),
        (lost, ".metadata is missing", True),
        (scrawled, "Expecting value", True),
        (forged, "state.json is not what was written (CRC ", True),
        (unsigned, "manifest.json is missing", True),
        (blank, "manifest.json lists no files", True),
        (partial, "manifest.json does not list __0_0.distcp", True),
        (stateless, "manifest.json does not list state.json", True),
        (nowhere, "state.json cannot be read: KeyError('progress')", True),
        (from_later, "has format 7, and this version of largebatch reads up to 1", True),
    ],
)
def test_a_damaged_checkpoint_is_passed_by_for_the_last_good_one(
    damage: Callable[[Path], None], says: str, seen_by_size: bool, saved: Saved, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert [problem(path, "full") for path in saved] == [None] * 3
    make_large(saved[-1])
    damage(saved[-1])
    assert says in str(problem(saved[-1], "auto"))
    assert (problem(saved[-1], "size") is not None) == seen_by_size
    assert last_good(tmp_path) == saved[1]
    told = capsys.readouterr().err
    assert "passed by samples-000000000000192: " in told
    assert says in told
    assert "going on from samples-000000000000128" in told


def make_large(checkpoint: Path) -> None:
    """Above what is read in any case."""
    import largebatch.train.checkpoints.files as files

    whole = (checkpoint / "__0_0.distcp").read_bytes()
    larger = whole + bytes(2 << 20)
    written = files.write_file(checkpoint / "__0_0.distcp", larger)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["__0_0.distcp"] = list(written)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_where_all_are_broken_a_run_does_not_begin_again_by_itself(
    saved: Saved, tmp_path: Path
) -> None:
    for path in saved:
        cut(path)
    with pytest.raises(ConfigError, match=r"none of the 3 checkpoint\(s\) in .* is whole"):
        last_good(tmp_path)


def test_what_is_under_way_or_set_aside_is_no_checkpoint(saved: Saved, tmp_path: Path) -> None:
    saved[2].rename(saved[2].with_name(f".{saved[2].name}"))
    saved[1].rename(saved[1].with_name(f"passed-{saved[1].name}-0"))
    assert last_good(tmp_path) == saved[0]
    assert last_good(tmp_path / "nothing") is None


def test_a_run_goes_on_from_the_last_good_one_and_makes_the_broken_one_again(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        "task=digits", "optim=lamb", "batch.size=64", "target.loss=null", "budget.samples=1280",
        "evaluation.growth=100", "hydra.run.dir=run", "checkpoint.every_samples=320",
        "checkpoint.keep=9", "checkpoint.mode=async", "resume=auto",
    )  # fmt: skip
    assert train(*words) == 0
    run = tmp_path / "run"
    lines = losses(run)
    (run / "summary.json").unlink()  # as if killed at its end
    *_, before, last = listed(run)
    flipped(last)
    capsys.readouterr()
    assert train(*words) == 0
    assert f"passed by {last.name}: __0_0.distcp is not" in capsys.readouterr().err
    assert losses(run) == lines
    assert problem(last, "full") is None
    assert problem(before, "full") is None
    assert (last.parent / f"passed-{last.name}-0").is_dir()
    assert train(*words, "checkpoint.verify=some") == 2
    assert "checkpoint.verify must be one of auto, full, size, got 'some'" in (
        capsys.readouterr().err
    )


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


# How many stay, and when one is due --------------------------------------------------------------


def test_milestones_stay_beside_the_last_ones(tmp_path: Path) -> None:
    for samples in range(100, 2100, 100):
        (tmp_path / "checkpoints" / f"samples-{samples:015d}").mkdir(parents=True)
        retire(tmp_path, keep=2, keep_every=450)
    assert [samples_of(path) for path in listed(tmp_path)] == [500, 900, 1400, 1800, 1900, 2000]


def test_due_by_samples_and_by_minutes(tmp_path: Path) -> None:
    tensors = Trainee("AdamW", sharded=False, seed=0).tensors()

    def checkpoints(**config: Any) -> Checkpoints:
        return Checkpoints(tmp_path, Ranks(), tensors, CheckpointConfig(**config))

    by_samples = checkpoints(every_samples=100)
    assert [by_samples.due(before, before + 64) for before in (0, 64, 128, 192)] == [
        False, True, False, True,
    ]  # fmt: skip
    assert not by_samples.is_due_by_time()
    by_time = checkpoints(every_minutes=1e-9)
    assert by_time.is_due_by_time()
    assert not by_time.due(0, 10**9)
    assert not checkpoints(every_minutes=60).is_due_by_time()


# A full disk -------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of 256 kB on `folder`; False where this user may mount none."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_costs_the_checkpoint_and_no_more(tmp_path: Path) -> None:
    """Of a real file system where one may be mounted, else by the kernel's limit of file sizes."""
    with small_disk(tmp_path / "disk") as mounted:
        job = SmallDisk(str(tmp_path / "disk"), limited=not mounted)
        (outcomes,) = launch(work, [job], 1, tmp_path)
        (found,) = successful([outcomes[str(job)]])
    assert found["names"] == found["last"] == ["samples-000000000000064"]
    assert found["loaded_is_first"]
    (what,) = found["failures"]
    says = "[Errno 28] No space left on device" if mounted else "[Errno 27] File too large"
    assert f"samples-000000000000128 could not be saved: {says}" in what
    assert found["whole in the end"] == ["samples-000000000000064", "samples-000000000000192"]


def test_a_folder_that_cannot_be_made_is_told_like_a_full_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    checkpoints = save(tmp_path, 64)
    assert checkpoints.last is None
    assert len(checkpoints.failures) == 1
    assert "there is none yet, training continues" in capsys.readouterr().err
    with pytest.raises(CheckpointFailed, match="samples-000000000000064 could not be saved"):
        save(tmp_path, 64, required=True)


# What cannot be deleted --------------------------------------------------------------------------


@contextmanager
def as_a_user() -> Iterator[Path]:
    """A folder of a user whom permissions bind; this process is that user within it."""
    user = 65534 if os.geteuid() == 0 else os.geteuid()
    with TemporaryDirectory(dir="/tmp") as folder:
        os.chown(folder, user, -1)
        before = os.geteuid()
        os.seteuid(user)
        try:
            yield Path(folder)
        finally:
            os.seteuid(before)
            for path, _, _ in os.walk(folder):
                os.chmod(path, 0o700)


def stuck(folder: Path) -> None:
    """Make a folder that its owner cannot delete."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "file").touch()
    folder.chmod(0o500)


def test_what_cannot_be_deleted_costs_itself_only(capsys: pytest.CaptureFixture[str]) -> None:
    with as_a_user() as run:
        for number in (128, 192):  # half written, by a job that was killed
            stuck(run / "checkpoints" / f".samples-{number:015d}")
        assert save(run, 64).failures == []
        stuck(listed(run)[0])
        checkpoints = save(run, 128, 192, 256, keep=1)
        assert checkpoints.failures == []
        assert [samples_of(path) for path in listed(run)] == [256]
        assert problem(listed(run)[0], "full") is None
        left = {path.name for path in (run / "checkpoints").iterdir()} - {listed(run)[0].name}
        assert left == {f".samples-{number:015d}" for number in (64, 128, 192)}
        told = capsys.readouterr().err.splitlines()
        for number in (64, 128, 192):  # once by each run that meets it
            lines = [line for line in told if f"samples-{number:015d} could not be deleted" in line]
            assert len(lines) == (1 if number == 64 else 2)


def test_checkpoints_may_be_elsewhere_and_are_found_from_the_runs_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, scratch = [tmp_path / "one", tmp_path / "two"], str(tmp_path / "scratch")
    for run in runs:
        run.mkdir()
        check_elsewhere(run, scratch)
        assert save(run, 64, 128, keep=1, folder=scratch).failures == []
        check_elsewhere(run, scratch)  # and so it goes on
    there = tmp_path / "scratch" / str(runs[0])[1:]
    assert (runs[0] / "checkpoints").resolve() == there
    assert [path.name for path in there.iterdir()] == ["samples-000000000000128"]
    assert last_good(runs[0]) == listed(runs[0])[-1]
    assert main(["verify", str(runs[0])]) == 0
    assert "samples-000000000000128: whole" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"is not where this run's checkpoints are \(.*scratch"):
        check_elsewhere(runs[0], "/elsewhere")
    there.rename(there.with_name("gone"))  # or not mounted
    with pytest.raises(ConfigError, match=r"leads to .*, which is not here: mount it, or delete"):
        last_good(runs[0])
    assert main(["ls", str(runs[0])]) == 2
    (runs[1] / "checkpoints").unlink()
    with pytest.raises(ConfigError, match="holds checkpoints of a run whose record is gone"):
        check_elsewhere(runs[1], scratch)
    with pytest.raises(ConfigError, match=r"checkpoint\.folder must be a path from / on, got 'a'"):
        CheckpointConfig(folder="a")


def test_of_a_link_to_another_disk_the_link_is_deleted(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    save(tmp_path, 64)
    listed(tmp_path)[0].rename(disk)
    for name in ("samples-000000000000064", ".samples-000000000000128"):
        (tmp_path / "checkpoints" / name).symlink_to(disk)
    assert save(tmp_path, 128, 192, keep=1).failures == []
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert names == ["samples-000000000000192"]
    assert problem(disk, "full") is None


# The command -------------------------------------------------------------------------------------


def test_ls_names_what_resume_would_take(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(saved[2])
    (tmp_path / ".hydra").mkdir()
    for name in (".hydra/config.yaml", "metrics.jsonl"):  # as a run has them
        (tmp_path / name).touch()
    assert main(["ls", str(tmp_path)]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["samples", "step", "saved", "size", "by", "ranks"]
    assert [line.split()[0] for line in lines] == ["64", "128", "192"]
    assert ["<- resume=auto" in line for line in lines] == [False, True, False]
    assert "broken: __0_0.distcp has 100 bytes of" in lines[2]


def test_verify_reads_every_byte_and_its_exit_code_says_so(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tmp_path)]) == 0
    flipped(saved[1])
    assert main(["verify", str(tmp_path)]) == 1
    assert main(["verify", str(saved[1])]) == 1
    assert main(["verify", str(saved[0])]) == 0
    assert main(["verify", str(tmp_path / "nothing")]) == 2
    assert "there are no checkpoints in" in capsys.readouterr().err


def test_export_writes_the_weights_once(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    trainee = Trainee("AdamW", sharded=False, seed=0)
    for number in (64, 128):
        trainee.step(number)
    flipped(saved[2])
    file = tmp_path / "weights.safetensors"
    assert main(["export", str(tmp_path), str(file)]) == 0
    found = safetensors.load_file(file)
    assert found.keys() == dict(trainee.model.named_parameters()).keys()
    for name, param in trainee.model.named_parameters():
        assert torch.equal(found[name], param)
    assert main(["export", str(tmp_path), str(file)]) == 2
    assert "is there already: choose another name" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == [file.name]


def test_only_what_needs_it_is_converted(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["universal", str(tmp_path)]) == 2
    assert "a world of any size reads it as it is" in capsys.readouterr().err
