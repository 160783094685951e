"""Imports point down only, a folder loads no more than it says, every choice can be composed."""

import ast
import inspect
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import get_object
from omegaconf import OmegaConf

from largebatch.conf.config import TrainConfig, typed
from largebatch.conf.errors import ConfigError
from largebatch.train.order import make_plan

ROOT = Path(__file__).resolve().parents[1]
OURS = ("largebatch", "hydra_plugins")

# What of the project the modules of a folder may import. Nothing below src imports src.
MAY_IMPORT = {
    "records": ["largebatch.records"],
    "optim": ["largebatch.optim"],
    "schedules": ["largebatch.schedules"],
    "conf": ["largebatch.conf", "largebatch.schedules"],
    "train": [
        "largebatch.train",
        "largebatch.optim",
        "largebatch.schedules",
        "largebatch.conf",
        "largebatch.records",
    ],
    "study": [
        "largebatch.study",
        "largebatch.records",
        "largebatch.schedules",
        "largebatch.conf",
        "largebatch.train.locks",
        "largebatch.train.record",
        "largebatch.train.ranks",
    ],
    "launch": [
        "largebatch.launch",
        "largebatch.records",
        "largebatch.conf",
        "largebatch.train.locks",
        "largebatch.train.record",
        "largebatch.train.ranks",
        "largebatch.train.unpickling",
        "largebatch.train.walltime",
    ],
    "benchmarks": [
        "largebatch.benchmarks",
        "largebatch.records",
        "largebatch.conf",
        "largebatch.optim",
        "largebatch.schedules",
        "largebatch.launch",
        "largebatch.train",
    ],
    "src/largebatch": ["largebatch.cli", "largebatch.completion", "largebatch.train.hydra_app"],
    "src/hydra_plugins": [
        "largebatch.study",
        "largebatch.launch",
        "largebatch.train",
        "largebatch.conf",
    ],
}


def imported(source: str, package: str) -> Iterator[list[str]]:
    """Each import of `source`, a module of `package`, as the names it may stand for.

    `from a import b` may mean the module a.b or the name b in a.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ([alias.name] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # A relative import of level n starts n - 1 packages above this one.
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(part for part in (above, node.module) if part)
            yield from ([module, f"{module}.{alias.name}"] for alias in node.names)


def strays(source: str, folder: str, package: str) -> list[str]:
    """The imports of the project in `source` that a module of `folder` may not make."""

    def within(name: str, tops: list[str]) -> bool:
        return any(name == top or name.startswith(f"{top}.") for top in tops)

    # By its bare name a folder would be a second copy of its modules.
    ours = [*OURS, *(name for name in MAY_IMPORT if "/" not in name)]
    return [
        names[-1]
        for names in imported(source, package)
        if within(names[0], ours) and not any(within(name, MAY_IMPORT[folder]) for name in names)
    ]


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def package_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parent.parts
    return ".".join(parts[1:] if parts[0] == "src" else ("largebatch", *parts))


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_down_only(folder: str) -> None:
    found = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(folder)
        for name in strays(path.read_text(encoding="utf-8"), folder, package_of(path))
    }
    assert modules(folder)
    assert found == set()


def test_every_folder_that_is_shipped_has_its_rule() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(MAY_IMPORT) == set(project["tool"]["hatch"]["build"]["only-include"])


@pytest.mark.parametrize(
    ("folder", "source", "found"),
    [
        ("optim", "import largebatch.train.loop", ["largebatch.train.loop"]),
        ("optim", "def f():\n    from largebatch.schedules import x", ["largebatch.schedules.x"]),
        ("optim", "from largebatch import schedules", ["largebatch.schedules"]),
        ("optim", "from ..train import loop", ["largebatch.train.loop"]),
        ("optim", "import train.loop", ["train.loop"]),
        ("optim", "import torch\nfrom largebatch.optim.lars import x\nfrom .lamb import LAMB", []),
        ("schedules", "from largebatch.conf.config import x", ["largebatch.conf.config.x"]),
        ("conf", "from largebatch.optim import LAMB", ["largebatch.optim.LAMB"]),
        ("train", "if TYPE_CHECKING:\n    import largebatch.study", ["largebatch.study"]),
        ("train", "from largebatch.cli import main", ["largebatch.cli.main"]),
        ("train", "import hydra_plugins.largebatch", ["hydra_plugins.largebatch"]),
        ("study", "from largebatch.train.loop import Loop", ["largebatch.train.loop.Loop"]),
        ("study", "from largebatch.train import run, record", ["largebatch.train.run"]),
        ("study", "from largebatch.train.records import x", ["largebatch.train.records.x"]),
        ("study", "from largebatch.train.record import lock\nimport largebatch.conf.config", []),
    ],
)  # fmt: skip
def test_an_import_that_points_up_is_found(folder: str, source: str, found: list[str]) -> None:
    assert strays(source, folder, f"largebatch.{folder}") == found


HEAVY = ["hydra", "matplotlib", "numpy", "omegaconf", "parsl", "scipy", "sklearn", "torch", "wandb"]


REPORT_HELP = """
import contextlib, largebatch.cli
with contextlib.suppress(SystemExit):
    largebatch.cli.main(["report", "--help"])
"""


@pytest.mark.parametrize(
    ("code", "loads", "allowed"),
    [
        ("import largebatch.schedules", "largebatch.schedules.plan", []),
        ("import largebatch.records", "largebatch.records.reading", []),
        ("import largebatch.cli", "largebatch.cli", []),
        ("import largebatch.optim", "torch", ["numpy", "torch"]),
        ("import largebatch.conf.config", "omegaconf", ["omegaconf"]),
        ("import largebatch.train.order", "hydra", ["hydra", "omegaconf"]),
        ("import hydra_plugins.largebatch.study_sweeper", "hydra", ["hydra", "omegaconf"]),
        ("import hydra_plugins.largebatch.parsl_launcher", "hydra", ["hydra", "omegaconf"]),
        (REPORT_HELP, "largebatch.study.report", ["matplotlib", "numpy", "scipy"]),
    ],
    ids=[
        "schedules",
        "records",
        "cli",
        "optim",
        "conf",
        "train.order",
        "study_sweeper",
        "parsl_launcher",
        "report --help",
    ],
)
def test_a_folder_loads_no_more_than_it_says(code: str, loads: str, allowed: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    loaded = done.stdout.splitlines()[-1].split()
    assert loads in loaded
    assert [name for name in HEAVY if name in loaded and name not in allowed] == []


CHOICES = [
    (path.parent.name, path.stem)
    for path in sorted((ROOT / "conf").glob("*/*.yaml"))
    if path.stem != "custom" and path.parent.name != "cluster"  # not of a run: tests/launch
]


def composed(*overrides: str) -> TrainConfig:
    with initialize_config_module("largebatch.conf", version_base="1.3"):
        return typed(compose("train", list(overrides)))


# What has to be measured first has no default.
MEASURED = {"adascale": ["scaling.noise_scale=1000"], "surge": ["scaling.noise_scale=1000"]}


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=map("=".join, CHOICES))
def test_every_choice_composes_to_a_run_that_can_be_planned(group: str, choice: str) -> None:
    config = composed(f"{group}={choice}", *MEASURED.get(choice, []))
    assert next(iter(make_plan(config))).samples == 0
    for node in (config.task, config.model, config.optim, config.lr, config.batch, config.logger):
        if node["_target_"] is not None:
            taken = inspect.signature(get_object(node["_target_"])).parameters
            assert node.keys() - {"_target_", "_partial_", "_recursive_"} <= taken.keys()


@pytest.mark.parametrize(
    ("overrides", "missing"),
    [
        (["task=custom", "model=digits_mlp"], "task._target_"),
        (["model=custom"], "model._target_"),
        (["task=custom", "model=custom"], "task._target_"),
        (["task=custom", "model=custom", "task._target_=my.Task"], "model._target_"),
    ],
)
def test_a_custom_choice_without_its_class_is_refused_by_the_key(
    overrides: list[str], missing: str
) -> None:
    with pytest.raises(ConfigError, match="must be given, as KEY=VALUE") as refusal:
        composed(*overrides)
    assert missing in str(refusal.value)


def test_every_custom_choice_is_one_of_these() -> None:
    custom = sorted(path.parent.name for path in (ROOT / "conf").glob("*/custom.yaml"))
    assert custom == ["model", "scaling", "task"]


def test_every_optimizer_is_in_a_study_and_every_study_names_optimizers_there_are() -> None:
    studied = {
        name
        for path in (ROOT / "conf" / "study").glob("*.yaml")
        if path.stem != "none"
        for name in OmegaConf.load(path).study.optimizers
    }
    assert studied == {path.stem for path in (ROOT / "conf" / "optim").glob("*.yaml")}
