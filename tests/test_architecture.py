"""Imports point down only, a folder loads no more than it says, every choice can be composed."""

import ast
import inspect
import os
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import get_object
from omegaconf import OmegaConf

from largebatch.common.errors import ConfigError
from largebatch.conf.config import TrainConfig, typed
from largebatch.train.run_spec import make_plan

ROOT = Path(__file__).resolve().parents[1]
OURS = ("largebatch", "hydra_plugins")

# What of the project the modules of a folder may import. Nothing below src imports src.
GROUND = ["largebatch.common"]
MAY_IMPORT = {
    "common": [*GROUND],
    "records": [*GROUND, "largebatch.records"],
    "distributed": [*GROUND, "largebatch.records", "largebatch.distributed"],
    "optim": ["largebatch.optim"],
    "schedules": [*GROUND, "largebatch.schedules"],
    "conf": [*GROUND, "largebatch.conf", "largebatch.records", "largebatch.schedules"],
    "train": [
        *GROUND,
        "largebatch.train",
        "largebatch.optim",
        "largebatch.schedules",
        "largebatch.conf",
        "largebatch.records",
        "largebatch.distributed",
    ],
    "study": [
        *GROUND,
        "largebatch.study",
        "largebatch.records",
        "largebatch.schedules",
        "largebatch.conf",
        "largebatch.distributed.ranks",
    ],
    "launch": [
        *GROUND,
        "largebatch.launch",
        "largebatch.records",
        "largebatch.distributed",
        "largebatch.conf",
    ],
    "benchmarks": [
        *GROUND,
        "largebatch.benchmarks",
        "largebatch.records",
        "largebatch.distributed",
        "largebatch.conf",
        "largebatch.optim",
        "largebatch.schedules",
        "largebatch.launch",
        "largebatch.train",
        "largebatch.study",
    ],
    "src/largebatch": [
        *GROUND,
        "largebatch.cli",
        "largebatch.completion",
        "largebatch.records",
        "largebatch.train.hydra_app",
    ],
    "src/hydra_plugins": [
        *GROUND,
        "largebatch.study",
        "largebatch.launch",
        "largebatch.train",
        "largebatch.conf",
    ],
}

# What a room may import of the other rooms of its folder, and "." of the files beside the rooms.
# A room that is not here stands alone.
ROOMS = {
    "optim/sharding": ["."],
    "optim/math": [".", "sharding"],
    "optim/layerwise": [".", "math", "sharding"],
    "optim/blockwise": [".", "math", "sharding"],
    "optim/kronecker": [".", "blockwise", "math", "sharding"],
    "train/api": [".", "tasks"],
    "train/tasks": ["data"],
    "train/checkpoints": ["tasks"],
    "train/engines": ["checkpoints", "noise", "tasks"],
    "train/reporting": [".", "models", "tasks", "trackers"],
    "train/plan": ["."],
    "train/branch": [".", "checkpoints"],
    "train/transfer": [".", "models", "tasks"],
    "train/weights": ["engines"],
    "study/statistics": [],
    "study/page": [".", "statistics"],
    "study/final_loss": [".", "page", "statistics"],
    "study/protocol": ["."],
    "study/nqm": [".", "protocol"],
    "study/single_runs": [".", "page"],
    "launch/jobs": ["doctor"],
    "launch/doctor": ["."],
    "launch/sweeps": ["jobs"],
    "launch/watch": ["."],
    "launch/diagnose": ["."],
    "launch/environments": ["."],
    "benchmarks/collectives": ["."],
    "benchmarks/gauss_newton": ["."],
    "benchmarks/noise": ["."],
    "benchmarks/scale": [".", "collectives"],
    "benchmarks/second_order": ["."],
    "benchmarks/statistics": ["."],
    "benchmarks/time_to_target": [".", "collectives", "scale"],
}
LARGEST_FOLDER, LONGEST_FILE = 15, 400

nodes = cache(lambda source: [*ast.walk(ast.parse(source))])  # several tests look at each file


def imported(source: str, package: str) -> Iterator[list[str]]:
    """Each import of `source`, a module of `package`, as the names it may stand for.

    `from a import b` may mean the module a.b or the name b in a.
    """
    for node in nodes(source):
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


def files_of(found: Iterable[Path]) -> dict[str, set[str]]:
    """Of each module, by its path, those of the project that it imports."""
    paths = {
        ".".join(("largebatch", *path.relative_to(ROOT).with_suffix("").parts)): path
        for path in found
    }
    paths |= {
        name.removesuffix(".__init__"): path
        for name, path in paths.items()
        if name.endswith(".__init__")
    }
    needs = {}
    for path in set(paths.values()):
        names = imported(path.read_text(encoding="utf-8"), package_of(path))
        needs[shown(path)] = {
            shown(paths[name])
            for alternatives in names
            for name in reversed(alternatives)
            if name in paths
        } - {shown(path)}
    return needs


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def needs() -> dict[str, set[str]]:
    return files_of(path for folder in MAY_IMPORT if "/" not in folder for path in modules(folder))


def test_imports_between_rooms_point_one_way(needs: dict[str, set[str]]) -> None:
    """Whatever lies in folders of a room belongs to it."""

    def room(path: str) -> str:
        folder, *inside = path.split("/")
        return f"{folder}/{inside[0]}" if len(inside) > 1 else folder

    arrows = {
        (room(path), room(other))
        for path, others in needs.items()
        for other in others
        if path.split("/")[0] == other.split("/")[0] and room(path) != room(other)
    }
    inside = {(one, other) for one, other in arrows if "/" in one}
    may = {
        (one, f"{one.split('/')[0]}/{other}".removesuffix("/."))
        for one, others in ROOMS.items()
        for other in others
    }
    assert inside == may
    between = {(one, other) for one, other in inside if "/" in other}
    assert circles(between) == []
    assert len([one for one, _ in between if one.startswith("launch/")]) <= 2


def circles(arrows: Iterable[tuple[str, str]]) -> list[str]:
    """What neither leads out of a circle nor into one, taken away; the rest."""
    left = set(arrows)
    while True:
        starts, ends = {one for one, _ in left}, {other for _, other in left}
        inner = {(one, other) for one, other in left if one in ends and other in starts}
        if inner == left:
            return sorted({name for arrow in left for name in arrow})
        left = inner


def test_no_files_import_one_another_in_a_circle(needs: dict[str, set[str]]) -> None:
    # What a package's own file imports is not for the modules in it to wait for.
    assert circles(
        (path, other)
        for path, others in needs.items()
        for other in others
        if not path.endswith("__init__.py")
    ) == []  # fmt: skip
    assert circles([("a", "b"), ("b", "c"), ("c", "b"), ("c", "d")]) == ["b", "c"]


def test_no_class_name_stands_for_two_things(needs: dict[str, set[str]]) -> None:
    where: dict[str, list[str]] = {}
    for path in sorted(needs):
        for node in nodes((ROOT / path).read_text(encoding="utf-8")):
            if isinstance(node, ast.ClassDef):
                where.setdefault(node.name, []).append(path)
    assert {name: paths for name, paths in where.items() if len(paths) > 1} == {}


def test_folders_and_files_are_of_a_size_to_walk(needs: dict[str, set[str]]) -> None:
    beside = Counter(str(Path(path).parent) for path in needs)
    assert {folder for folder, count in beside.items() if count > LARGEST_FOLDER} == set()
    long = {path for path in needs if len((ROOT / path).read_text().splitlines()) > LONGEST_FILE}
    assert long == set()


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
        ("study", "from largebatch import train, schedules", ["largebatch.train"]),
        ("study", "from largebatch.train.records import x", ["largebatch.train.records.x"]),
        ("study", "from largebatch.records.lock import x\nimport largebatch.conf.config", []),
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
        ("import largebatch.train.run_spec", "hydra", ["hydra", "omegaconf"]),
        ("import hydra_plugins.largebatch.study_sweeper", "hydra", ["hydra", "omegaconf"]),
        ("import hydra_plugins.largebatch.parsl_launcher", "hydra", ["hydra", "omegaconf"]),
        (REPORT_HELP, "largebatch.study.report", ["numpy"]),
    ],
    ids=[
        "schedules",
        "records",
        "cli",
        "optim",
        "conf",
        "train.run_spec",
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
        timeout=600,
        check=True,
    )
    loaded = done.stdout.splitlines()[-1].split()
    assert loads in loaded
    assert [name for name in HEAVY if name in loaded and name not in allowed] == []


CHOICES = [
    (path.parent.name, path.stem)
    for path in sorted((ROOT / "conf").glob("*/[!_]*.yaml"))
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
            own = {"_target_", "_partial_", "_recursive_", "groups"}  # groups: the loop's
            assert node.keys() - own <= taken.keys()


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
    assert custom == ["model", "scaling", "study", "task"]


def test_every_optimizer_is_in_a_study_and_every_study_names_optimizers_there_are() -> None:
    studied = {
        name
        for path in (ROOT / "conf" / "study").glob("[!_]*.yaml")
        if path.stem != "none"
        for name in OmegaConf.load(path).study.optimizers
    }
    assert studied == {path.stem for path in (ROOT / "conf" / "optim").glob("*.yaml")}
