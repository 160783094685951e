"""`--config-dir`: the user's files, before the package's of the same name. Imports no torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

from yaml import YAMLError

from largebatch.common.errors import ConfigError
from largebatch.common.text import one_line, say

_folders: list[Path] = []
"""Read by the plugin that makes Hydra's search path, for as long as `first` lasts."""


@contextmanager
def first(folder: str | None) -> Iterator[None]:
    """Compose configurations from `folder` before the package's own; None: from these alone."""
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(f"--config-dir must be a folder, got {folder!r}")
    before = _folders[:]
    _folders[:] = [] if folder is None else [Path(folder).absolute()]
    try:
        yield
    finally:
        _folders[:] = before


def folders() -> list[Path]:
    """Return the user's folders, those that come first in front."""
    return list(_folders)


def tell_replaced(folder: str | None) -> None:
    """Say on stderr which of the package's files those of `folder` take the place of."""
    if folder is None:
        return
    package, root = files("largebatch.conf"), Path(folder)
    names = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.yaml")
        if package.joinpath(*path.relative_to(root).parts).is_file()
    )
    if names:
        say(f"from {folder}, not the package: {', '.join(names)}")


def unreadable_file(error: YAMLError | UnicodeDecodeError, folder: str | None) -> str:
    """Say which file of `folder` is no YAML, and where, as the parser found it."""
    if isinstance(error, UnicodeDecodeError):  # does not say which
        for path in sorted(Path(folder or "").rglob("*.yaml")) if folder else ():
            try:
                path.read_text("utf-8")
            except UnicodeDecodeError:
                return f"{path} is not UTF-8 text: convert it"
            except OSError:
                continue
        return f"a file of the configuration is not UTF-8 text: {error}"
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"a file of the configuration is no YAML: {one_line(error)}"
    return f"{mark.name}:{mark.line + 1} is no YAML: {getattr(error, 'problem', None) or error}"
