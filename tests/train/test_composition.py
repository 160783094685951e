"""How often Hydra composes a configuration, and what says that it is of many runs."""

from pathlib import Path
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig

from largebatch.train.hydra_app import is_many, parse_options, run_hydra

pytestmark = pytest.mark.usefixtures("own_variables")


@pytest.fixture
def own_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables of the environment and command line, which `run_hydra` sets, are given back."""
    for name in ("HYDRA_FULL_ERROR", "LARGEBATCH_FULL_ERROR"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("sys.argv", ["largebatch"])


def seeds_of(*words: str) -> list[int]:
    """The seeds of the runs that a command line asks for."""
    found: list[int] = []

    def task(composed: DictConfig) -> None:
        found.append(composed.seed)

    run_hydra(task, "train", words)
    return found


def test_a_run_is_composed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    composed: list[str | None] = []
    compose = ConfigLoaderImpl.load_configuration

    def counted(self: ConfigLoaderImpl, config_name: str | None, *rest: Any, **more: Any) -> Any:
        composed.append(config_name)
        return compose(self, config_name, *rest, **more)

    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", counted)
    assert seeds_of("seed=3", f"hydra.run.dir={tmp_path / 'run'}") == [3]
    assert composed == ["train"]


def test_a_file_of_the_users_may_say_that_there_are_many_runs(tmp_path: Path) -> None:
    own = tmp_path / "conf" / "own"
    own.mkdir(parents=True)
    (own / "many.yaml").write_text("# @package _global_\nhydra:\n  mode: MULTIRUN\n")
    words = ("--config-dir", str(own.parent), "+own=many", "seed=1,2", "hydra/launcher=basic")
    assert seeds_of(*words, f"hydra.sweep.dir={tmp_path / 'sweep'}") == [1, 2]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], False),
        (["optim=lamb", "hydra.run.dir=here", "hydra/launcher=basic"], False),
        (["--run", "hydra.mode=RUN"], False),
        (["--multirun"], True),
        (["hydra.mode=MULTIRUN"], True),
        (["--multirun", "hydra.mode=MULTIRUN"], True),
        (["--multirun", "hydra.mode=RUN"], None),
        (["hydra.mode=MULTIRUN", "hydra.mode=RUN"], None),
        (["++hydra.mode=MULTIRUN"], None),
        (["hydra={mode: MULTIRUN}"], None),
        (["hydra.searchpath=[file://here]"], None),
        (["--config-dir", "here"], None),
        (["--config-name", "mine"], None),
        (["--cfg", "job"], None),
        (["--hydra-help"], None),
    ],
)
def test_what_the_words_say_of_the_number_of_runs(words: list[str], expected: bool | None) -> None:
    assert is_many(parse_options(words)) is expected
