"""What the suite keeps of compositions is what Hydra composes anew."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import composed_once
import pytest
from hydra import compose, initialize_config_module
from hydra._internal import config_loader_impl, config_repository
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from largebatch.conf.user_configs import first


def composed(*words: str) -> Any:
    """The whole configuration, Hydra's own keys too, as files and words have it."""
    with initialize_config_module("largebatch.conf", version_base="1.3"):
        made = compose("train", list(words), return_hydra_config=True)
    found = OmegaConf.to_container(made)
    made.seed, made.optim.lr = -1, -1  # what becomes of one is nothing to the next
    return found


@contextmanager
def as_it_comes() -> Iterator[None]:
    """Hydra without what `composed_once` has set up."""
    loader: Any = config_loader_impl.ConfigLoaderImpl
    repository = config_repository.CachingConfigRepository
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_loader_impl, "create_defaults_list", composed_once._make_list)
        patch.setattr(config_loader_impl, "CachingConfigRepository", repository)
        patch.setattr(loader, "_compose_config_from_defaults_list", composed_once._merge)
        patch.setattr(loader, "_process_config_searchpath", composed_once._search)
        yield


@pytest.fixture
def anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing kept yet."""
    monkeypatch.setattr(composed_once, "_kept", {})
    monkeypatch.setattr(composed_once, "_folders", [tmp_path])


WORDS = (
    ("seed=3", "optim.lr=0.5"), ("optim=lamb", "optim.lr=0.5"), ("study=digits", "seed=1"),
    ("+optim.new=1", "~target.loss", "lr=cosine", "hydra.run.dir=here"),
    ("hydra/launcher=basic", "batch=rampup", "engine={nproc: 3}"),
)  # fmt: skip


def test_kept_compositions_are_those_of_hydra(anew: None) -> None:
    with as_it_comes():
        expected = [composed(*words) for words in WORDS]
    for _ in range(2):  # made, then kept
        assert [composed(*words) for words in WORDS] == expected
    composed_once._kept.clear()  # as in another process
    assert [composed(*words) for words in WORDS] == expected


def test_files_of_a_users_own_are_read_each_time(anew: None, tmp_path: Path) -> None:
    file = tmp_path / "conf" / "optim" / "adamw.yaml"
    file.parent.mkdir(parents=True)
    for lr in (0.25, 0.75):
        file.write_text(f"_target_: torch.optim.AdamW\nlr: {lr}\n")
        with first(str(tmp_path / "conf")):
            assert composed()["optim"]["lr"] == lr
        more = f"hydra.searchpath=[{tmp_path / 'conf'}]"
        assert composed(more)["hydra"]["searchpath"] == [str(tmp_path / "conf")]
    assert composed()["optim"]["_partial_"] is True


def test_mistakes_are_told_each_time(anew: None) -> None:
    for _ in range(2):
        for words, sentence in (
            (("optim=lion",), "optim/lion"),
            (("optims=lamb",), "optims"),
            (("target.los=1",), r"target\.los"),
        ):
            with pytest.raises(ConfigCompositionException, match=sentence):
                composed(*words)
