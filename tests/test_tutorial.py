"""docs/tutorial.md as a reader follows it: its files in an empty folder, its commands on a smaller
grid, in an environment of the wheel and what that declares to need. The checkout is not seen there.
"""

import re
import shlex
import subprocess
from importlib.util import find_spec
from pathlib import Path

import fresh_environment
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`([\w.]+)`:\n\n```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
]
# The same study, on fewer points and for fewer steps.
SMALLER = (
    "study.batch_sizes=[128,512]", "study.optimizers=[lamb]", "study.search=[lr]",
    "study.report_seeds=[2,3]", "study.rules=[]", "target.loss=1.5", "hydra.launcher.n_jobs=2",
)  # fmt: skip
EPOCHS = "max_epochs=2"  # of the loop in Lightning, which takes each sample by itself; here 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the page."""
    made = tmp_path_factory.mktemp("tutorial")
    for name, text in FILES.items():
        (made / name).write_text(text, encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that the page's first command has made."""
    (_, _, wanted), *_ = COMMANDS
    extras = re.fullmatch(r"largebatch\[(.*)\]", wanted)
    assert extras is not None
    folder = tmp_path_factory.mktemp("environment")
    return fresh_environment.make(folder, wheel, extras[1].split(","))


def run(folder: Path, programs: Path, command: str, *more: str) -> str:
    """Run the page's command that begins so; returns what it prints."""
    (words,) = (words for words in COMMANDS if " ".join(words).startswith(command))
    return started(folder, programs, *words, *more)


def started(folder: Path, programs: Path, program: str, *words: str) -> str:
    done = subprocess.run(
        [programs / program, *words], cwd=folder, capture_output=True, text=True, timeout=600,
        env={"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(programs.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_files_are_short_and_the_commands_few() -> None:
    task = FILES["my_project.py"].partition("class MyTask")[2].partition("class MyModel")[0]
    assert len([line for line in task.splitlines() if line.strip()]) <= 25
    assert "](docs/tutorial.md)" in (ROOT / "README.md").read_text(encoding="utf-8")[:2000]
    assert [words[0] for words in COMMANDS] == ["pip", *["largebatch"] * 3, "python"]


def test_the_environment_has_the_wheel_and_not_the_checkout(folder: Path, programs: Path) -> None:
    code = "import largebatch, sys; print(*largebatch.__path__, *sys.path, sep=chr(10))"
    package, *paths = started(folder, programs, "python", "-c", code).splitlines()
    assert Path(package).is_relative_to(programs.parent)
    assert not any(Path(path).is_relative_to(ROOT) for path in paths if path)


def test_one_run_is_made_and_drawn(folder: Path, programs: Path) -> None:
    assert "runs/first" in run(folder, programs, "largebatch train", "budget.samples=2e4")
    run(folder, programs, "largebatch report")
    assert (folder / "runs" / "first" / "run.html").stat().st_size > 1000


def test_the_study_ends_with_the_picture_and_the_answer(folder: Path, programs: Path) -> None:
    told = run(folder, programs, "largebatch sweep", *SMALLER)
    study = folder / "studies" / "MyTask"
    assert "lamb" in told
    assert re.search(r"How far", told), told
    assert (study / "curve.png").stat().st_size > 1000
    assert "MyTask" in (study / "report.html").read_text(encoding="utf-8")


def test_lamb_trains_in_lightning_in_half_precision_and_clipped(
    folder: Path, programs: Path
) -> None:
    if find_spec("lightning") is None:
        pytest.skip("lightning is not installed")
    assert "bf16-mixed" in FILES["my_lightning.py"]
    assert "gradient_clip_val" in FILES["my_lightning.py"]
    file = folder / "my_lightning.py"
    assert EPOCHS in file.read_text(encoding="utf-8")
    file.write_text(file.read_text(encoding="utf-8").replace(EPOCHS, "max_epochs=1"))
    loss = re.search(r"loss (\d+\.\d+)", run(folder, programs, "python my_lightning.py"))
    assert loss is not None
    assert float(loss[1]) < 1.2
