"""Copies that the suite makes of configurations are those that OmegaConf makes."""

from copy import deepcopy
from typing import Any

import copied_plainly
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from omegaconf.base import Metadata

from largebatch.conf.config import TrainConfig


def whole(node: Any) -> Any:
    """All that a node has, and those below it."""
    kept = vars(node) | {"_parent": None, "_metadata": vars(node._metadata)}
    content = kept.get("_content")
    if isinstance(content, dict | list):
        below = content if isinstance(content, dict) else dict(enumerate(content))
        assert all(each._parent is node for each in below.values())
        kept["_content"] = {key: whole(each) for key, each in below.items()}
    return type(node), type(node._metadata), kept


def configurations() -> list[Any]:
    """Composed, of types, with flags, with what a resolver has been asked for, and empty."""
    with initialize_config_module("largebatch.conf", version_base="1.3"):
        made = compose("train", ["seed=3", "+new={a: [1, null, x]}"], return_hydra_config=True)
    flagged = deepcopy(made)
    OmegaConf.set_readonly(flagged.optim, True)
    OmegaConf.set_struct(flagged, False)
    flagged._metadata.resolver_cache["asked"]["for"] = [1]
    return [made, OmegaConf.structured(TrainConfig), flagged, OmegaConf.create()]


def test_copies_are_those_of_omegaconf() -> None:
    for config in configurations():
        found = whole(deepcopy(config))
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(Metadata, "__deepcopy__")
            for kind, own in copied_plainly.ITS_OWN.items():
                patch.setattr(kind, "__deepcopy__", own)
            expected = whole(deepcopy(config))
        assert found == expected


def test_what_becomes_of_a_copy_is_nothing_to_the_first() -> None:
    first = configurations()[2]
    copied = deepcopy(first)
    OmegaConf.set_readonly(copied, True)
    copied._metadata.resolver_cache["asked"]["for"].append(2)
    assert not OmegaConf.is_readonly(first)
    assert first._metadata.resolver_cache["asked"]["for"] == [1]
