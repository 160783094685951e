"""Each file of the configuration parsed once a process, and in forks of it not again.

A command parses some twenty of them, always the same, which takes a third of its composition; the
suite composes thousands of times. What is returned is a copy of what the same text was parsed to.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

_parse: Any = yaml.load
_parsed: dict[str, Any] = {}


def _load(stream: Any, Loader: Any) -> Any:
    if Loader.__name__ != "OmegaConfLoader":
        return _parse(stream, Loader)
    text = stream if isinstance(stream, str) else stream.read()
    if text not in _parsed:
        if text is not stream:  # whose name is in what an error says
            stream.seek(0)
        _parsed[text] = _parse(stream, Loader)
    return deepcopy(_parsed[text])


def set_up() -> None:
    yaml.load = _load


def parse_ahead() -> None:
    """Parse all files of the package's configuration and of Hydra's own."""
    import hydra
    from omegaconf import OmegaConf

    package = Path(__file__).parents[2] / "conf"
    for folder in (package, Path(hydra.__file__).parent / "conf"):
        for file in sorted(folder.rglob("*.yaml")):
            OmegaConf.load(file)
