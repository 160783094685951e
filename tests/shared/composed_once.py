"""What groups choose composed once a session, for all of its processes.

Nine tenths of the composition of a command's configuration are reading the files that its groups
name, putting them in order and merging them; the suite composes thousands of times, from a few
hundred choices. Hydra does these two things once for each list of choices; what it came to is kept
as bytes, from which everyone makes objects of their own. The rest, what the words say of single
keys above all, it does each time. With files of a user's own among the sources nothing is kept.
"""

import os
import pickle
from collections.abc import Callable
from copy import copy
from hashlib import sha256
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal import config_loader_impl, config_repository, defaults_list

_load = config_loader_impl.ConfigLoaderImpl
_make_list: Any = config_loader_impl.create_defaults_list
_merge: Any = _load._compose_config_from_defaults_list
_search: Any = _load._process_config_searchpath

_kept: dict[str, bytes] = {}
_folders: list[Path] = []
"""The session's one, in which its processes find what others have kept."""


def set_up(folder: Path) -> None:
    """Keep what is composed in `folder`, and take from there what others have."""
    _folders[:] = [folder]
    config_loader_impl.create_defaults_list = _list_once
    config_loader_impl.CachingConfigRepository = _Repository
    _load._compose_config_from_defaults_list = _merged_once
    _load._process_config_searchpath = _searched_once


def _once(repo: Any, what: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """What `make` makes; where that was asked of the same files before, a copy of it."""
    sources = [(source.scheme(), source.provider, source.path) for source in repo.get_sources()]
    if not all(scheme in ("pkg", "structured") for scheme, _, _ in sources):
        return make()
    key = sha256(repr((sources, version.getbase(), *what)).encode()).hexdigest()
    path = _folders[0] / f"{key}.composed"
    if key not in _kept:
        try:
            _kept[key] = path.read_bytes()
        except FileNotFoundError:
            made = make()
            try:
                _kept[key] = pickle.dumps(made, pickle.HIGHEST_PROTOCOL)
            except pickle.PicklingError:  # Hydra has looked for plugins, and imported them, again
                return made
            new = path.with_suffix(f".of-{os.getpid()}")
            new.write_bytes(_kept[key])
            new.rename(path)  # whole, or not there
            return made
    return pickle.loads(_kept[key])


class _Repository(config_repository.CachingConfigRepository):
    """Shares its sources, which are read only, with the one that it stands before."""

    def __init__(self, delegate: Any) -> None:
        self.delegate = copy(delegate)
        self.cache = {}


def _searched_once(self: Any, config_name: str | None, overrides: Any, repo: Any) -> None:
    """Whether files lead to others is in the first of them; words that do are looked at anew."""
    if any(override.get_key_element() == "hydra.searchpath" for override in overrides):
        return _search(self, config_name, overrides, repo)

    def search() -> bool:
        before = repo.get_sources()
        _search(self, config_name, [], repo)
        return repo.get_sources() is not before

    if _once(repo, ("searched", config_name), search):
        _search(self, config_name, [], repo)
    return None


def _list_once(repo: Any, config_name: str | None, overrides_list: Any, **how: Any) -> Any:
    asked = defaults_list.Overrides(repo, overrides_list)
    words = [override.input_line for override in overrides_list
             if not any(override is value for value in asked.config_overrides)]  # fmt: skip

    def make() -> Any:
        chosen = [override for override in overrides_list if override.input_line in words]
        return _make_list(repo=repo, config_name=config_name, overrides_list=chosen, **how)

    made = _once(repo, ("list", config_name, words, how), make)
    made.config_overrides = made.overrides.config_overrides = asked.config_overrides
    return made


def _merged_once(self: Any, defaults: Any, repo: Any) -> Any:
    return _once(repo, ("merged", defaults), lambda: _merge(self, defaults, repo))
