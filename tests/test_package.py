"""The wheel holds what the checkout holds, and works where there is no checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUN = ["task=digits", "batch.size=64", "budget.samples=640", "target.loss=null"]

Python = Callable[..., "subprocess.CompletedProcess[str]"]


def run(
    *command: str, cwd: Path | None = None, env: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel is installed in, far from the checkout."""
    folder = tmp_path_factory.mktemp("installed")
    pip = ["pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    run("-m", *pip, "--target", str(folder), str(wheel))
    return folder


@pytest.fixture
def python(installed: Path, tmp_path: Path) -> Python:
    """Run Python in an empty folder, with the installed wheel before any checkout."""
    environment = os.environ | {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    return lambda *command: run(*command, cwd=tmp_path, env=environment)


def test_the_wheel_holds_every_file_of_the_code_folders_and_nothing_else(wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    build = project["tool"]["hatch"]["build"]
    destinations = build["targets"]["wheel"]["sources"]
    assert sorted(destinations) == sorted(build["only-include"])
    expected = {
        f"{destination}/{path.relative_to(ROOT / source).as_posix()}"
        for source, destination in destinations.items()
        for path in (ROOT / source).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    held = {name for name in names if not re.match(r"largebatch-[^/]+\.dist-info/", name)}
    assert held == expected
    assert len(names) == len(set(names))
    assert {name.partition("/")[0] for name in held} == {"largebatch", "hydra_plugins"}


def test_the_code_folders_of_the_checkout_are_all_shipped(wheel: Path) -> None:
    # Those that tests/test_architecture.py has rules for, by another road: what is importable here.
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    with zipfile.ZipFile(wheel) as archive:
        packages = set(re.findall(r"largebatch/(\w+)/__init__\.py", " ".join(archive.namelist())))
        assert {"largebatch/py.typed", "largebatch/conf/train.yaml"} <= set(archive.namelist())
    assert packages == folders
    assert {"optim", "schedules", "train", "study", "conf"} <= packages


def test_every_module_is_that_of_the_wheel(installed: Path, python: Python) -> None:
    done = python(
        "-c",
        "import largebatch, largebatch.optim, largebatch.train\n"
        "import hydra_plugins.largebatch as plugins\n"
        "print(largebatch.__file__, largebatch.optim.__file__, largebatch.train.__file__,"
        " plugins.__file__, *largebatch.__path__, sep='\\n')",
    )
    files = done.stdout.splitlines()
    assert len(files) == 5  # the package has one path: no checkout is joined to it
    assert all(Path(file).is_relative_to(installed) for file in files)


def test_hydra_finds_the_plugin_of_the_wheel(installed: Path, python: Python) -> None:
    done = python(
        "-c",
        "from hydra.core.plugins import Plugins; from hydra.plugins.sweeper import Sweeper\n"
        "import sys\n"
        "for plugin in Plugins.instance().discover(Sweeper):\n"
        "    print(plugin.__name__, sys.modules[plugin.__module__].__file__)",
    )
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert Path(found["StudySweeper"]).is_relative_to(installed)


@pytest.mark.matrix
def test_the_wheel_trains(python: Python, tmp_path: Path) -> None:
    python("-m", "largebatch", "train", *RUN, "optim=sgd", "hydra.run.dir=one")
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["samples"]) == ("exhausted", 10, 640)
    assert summary["provenance"]["git_commit"] is None
    assert len((tmp_path / "one" / "metrics.jsonl").read_text().splitlines()) == 10


def test_the_wheel_sweeps(python: Python, tmp_path: Path) -> None:
    many = ["optim=sgd,lamb", "hydra.sweep.dir=many", "hydra.launcher.n_jobs=1"]
    python("-m", "largebatch", "sweep", *RUN, *many)
    summaries = [json.loads(path.read_text()) for path in tmp_path.glob("many/*/summary.json")]
    assert sorted(summary["optimizer"] for summary in summaries) == ["lamb", "sgd"]
    assert {summary["status"] for summary in summaries} == {"exhausted"}
    assert {summary["provenance"]["git_commit"] for summary in summaries} == {None}


@pytest.mark.parametrize("has_numpy", [True, False])
def test_a_sites_torch_is_held_by_the_name_that_a_package_index_knows(
    has_numpy: bool, tmp_path: Path
) -> None:
    """`torch.__version__` may say more than the distribution does; numpy need not be there."""
    venv.create(tmp_path / "site", symlinks=True)
    (packages,) = (tmp_path / "site" / "lib").glob("python*/site-packages")
    held = {"torch": "2.10.0", **({"numpy": "2.4.0"} if has_numpy else {})}
    for name, version in held.items():
        (packages / name).mkdir()
        (packages / name / "__init__.py").write_text(f"__version__ = '{version}+cu128'\n")
        (packages / f"{name}-{version}.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (packages / f"{name}-{version}.dist-info" / "METADATA").write_text(metadata)
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    subprocess.run(["make", "VENV=site", "site/held.txt"], cwd=tmp_path, timeout=600, check=True)
    lines = (tmp_path / "site" / "held.txt").read_text().splitlines()
    assert lines == [f"{name}=={version}" for name, version in held.items()]
