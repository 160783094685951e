"""The configuration of a sweep's job, composed anew or from one composed before.

Composing costs more than many a job of a study, whose jobs differ in a few values. What groups
choose is composed once in a process; values are set in a copy of it, in their order, as Hydra does.
"""

import io
import pickle
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, Final

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException


class _MouldWriter(pickle.Pickler):
    """Writes the place of a class among `kinds`, in place of its name."""

    kinds: list[type]

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, type):
            return None
        if obj not in self.kinds:
            self.kinds.append(obj)
        return self.kinds.index(obj)


class _MouldReader(pickle.Unpickler):
    kinds: list[type]

    def persistent_load(self, pid: int) -> type:
        return self.kinds[pid]


class _Mould:
    """Makes copies of a configuration from what is written of it, a sixth of what `deepcopy` takes.

    Classes are kept as they are: Hydra imports its plugins again, after which their names stand for
    others.
    """

    def __init__(self, config: DictConfig) -> None:
        written = io.BytesIO()
        writer = _MouldWriter(written, pickle.HIGHEST_PROTOCOL)
        self._kinds = writer.kinds = []
        writer.dump(config)
        self._written = written.getvalue()

    def copy(self) -> DictConfig:
        reader = _MouldReader(io.BytesIO(self._written))
        reader.kinds = self._kinds
        found: DictConfig = reader.load()
        return found


_composed: Final[dict[tuple[int, tuple[str, ...]], tuple[DictConfig, _Mould]]] = {}
"""By the sweep's configuration, which is kept beside, and the words that choose groups."""


def composed(context: HydraContext, config: DictConfig, words: Sequence[str]) -> DictConfig:
    """Compose the configuration of the job that `words` make of the sweep's `config`."""
    overrides = [_parsed(word) for word in words]
    # Without a folder's name in so many words it follows from all the words, as Hydra joins them.
    if any(override.key_or_group == "hydra.sweep.subdir" for override in overrides):
        choices = [o.input_line or "" for o in overrides if not _is_value(o)]
        try:
            return _with_values(_cached(context, config, choices), config, overrides)
        except OmegaConfBaseException:  # to be said in Hydra's words
            pass
    return context.config_loader.load_sweep_config(config, list(words))


@lru_cache(4096)  # most words of a job are those of all of its sweep
def _parsed(word: str) -> Override:
    (override,) = _parser().parse_overrides([word])
    return override


_parser = cache(OverridesParser.create)


def _cached(context: HydraContext, config: DictConfig, choices: Sequence[str]) -> DictConfig:
    key = id(config), tuple(choices)
    if key not in _composed:
        loaded = context.config_loader.load_sweep_config(config, list(choices))
        _composed[key] = config, _Mould(loaded)
    return _composed[key][1].copy()


def _with_values(job: DictConfig, config: DictConfig, overrides: Sequence[Override]) -> DictConfig:
    for override in filter(_is_value, overrides):
        OmegaConf.update(job, override.key_or_group, override.value(), merge=True)
    lines = [(override.is_hydra_override(), override.input_line) for override in overrides]
    with open_dict(job):
        shared = list(config.hydra.overrides.hydra)
        job.hydra.overrides.hydra = [*shared, *(line for is_hydra, line in lines if is_hydra)]
        job.hydra.overrides.task = [line for is_hydra, line in lines if not is_hydra]
    OmegaConf.copy_cache(from_config=config, to_config=job)
    return job


def _is_value(override: Override) -> bool:
    """Whether it sets one value that is there, and chooses nothing."""
    key = override.key_or_group
    plain = override.type == OverrideType.CHANGE and not override.is_sweep_override()
    return plain and override.package is None and ("." in key or key == "seed")
