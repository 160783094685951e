"""Whether `.metadata`, which describes a checkpoint of `torch.distributed.checkpoint`, is such data
as is read when a run is resumed. Imports no torch: empty classes stand in for torch's own.
"""

import io
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Final

from largebatch.common.unpickling import AllowListUnpickler

DESCRIPTION: Final = ".metadata"

DESCRIBING: Final = "torch.distributed.checkpoint.metadata"
"""The module whose data classes and enums a description is made of."""

IMPORTED: Final = {
    ("collections", "OrderedDict"),
    *((module, path) for module in ("pathlib", "pathlib._local") for path in ("Path", "PosixPath")),
}
"""What a description may name of Python's own."""

TORCH_NAMES: Final = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),  # looks a layout up by its name
}
"""What it may name of torch besides dtypes and the classes of `DESCRIBING`."""

_CLASS: Final = re.compile(r"_?[A-Z]\w*")
_DTYPE: Final = re.compile(r"b?float\d\w*|q?u?int\d\w*|complex\d+|bits\d\w*|bool")


def problem_of(data: bytes, files: Collection[str]) -> str | None:
    """What is wrong with a description, the bytes of `.metadata` of a checkpoint that holds `files`
    by their paths within it; None: nothing that can be seen.
    """
    try:
        found = _Unpickler(io.BytesIO(data), _may_name).load()
        if not isinstance(found, _Metadata):
            raise TypeError("it describes no checkpoint")
        places = (found.known.get("storage_data") or {}).values()
        names = {str(info.known["relative_path"]) for info in places}
    except Exception as error:  # unpickling raises whatever the bytes say
        return f"{DESCRIPTION} cannot be read: {error or type(error).__name__}"
    stray = stray_of(names)
    if stray is not None:
        return f"{DESCRIPTION} points out of its folder, to {stray}"
    absent = sorted(names.difference(files))
    return f"{DESCRIPTION} points to {absent[0]}, which is not there" if absent else None


def stray_of(names: Iterable[str]) -> str | None:
    """The first of the names of files that leads out of their folder."""
    return min((name for name in names if Path(name).name != name), default=None)


def _may_name(module: str, name: str) -> bool:
    if module == DESCRIBING:
        return _CLASS.fullmatch(name) is not None
    is_dtype = module == "torch" and _DTYPE.fullmatch(name) is not None
    return is_dtype or (module, name) in TORCH_NAMES | IMPORTED


class _Unpickler(AllowListUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in IMPORTED or not self._allowed(module, name):
            return super().find_class(module, name)
        if module == "torch" and name != "Size":
            return name  # a dtype, which cannot be called
        return _Metadata if (module, name) == (DESCRIBING, "Metadata") else _Described


class _Described:
    """Stands for an object of a class of torch's."""

    def __init__(self, *args: Any) -> None:
        self.known: Any = args

    def __setstate__(self, state: Any) -> None:
        self.known = state


class _Metadata(_Described):
    """Stands for what describes the whole."""
