"""Read what torch and DeepSpeed have pickled into a checkpoint, without running code from it.

`torch.distributed.checkpoint` unpickles `.metadata` and the items that are no tensors without
limits, DeepSpeed all of its files. Here a file can name what a checkpoint is described with, and
no more.
"""

import enum
import io
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint import metadata as describing
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from largebatch.common.text import first_line
from largebatch.common.unpickling import AllowListUnpickler
from largebatch.train.checkpoints.description import (
    DESCRIBING,
    DESCRIPTION,
    IMPORTED,
    TORCH_NAMES,
    stray_of,
)


def _describes(module: str, name: str) -> bool:
    """Whether a checkpoint's description may name it."""
    if (module, name) in TORCH_NAMES | IMPORTED:
        return True
    if module == "torch":
        return isinstance(getattr(torch, name, None), torch.dtype)
    if module != DESCRIBING:
        return False
    kind = getattr(describing, name, None)
    if not isinstance(kind, type) or kind.__module__ != module:  # what it imports, for one
        return False
    return is_dataclass(kind) or issubclass(kind, enum.Enum)


class PlainReader(FileSystemReader):
    """A reader of `.metadata` that is data and nothing else."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What describes the whole."""
        return self.describe(self.read_bytes())

    def read_bytes(self) -> bytes:
        """The file as it is."""
        path = Path(self.path) / DESCRIPTION
        try:
            return path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error

    def describe(self, data: bytes) -> Metadata:
        """What the file's bytes describe."""
        path = Path(self.path) / DESCRIPTION
        try:
            found = AllowListUnpickler(io.BytesIO(data), _describes).load()
            if not isinstance(found, Metadata):
                raise TypeError("it describes no checkpoint")
            names = {str(info.relative_path) for info in (found.storage_data or {}).values()}
        except Exception as error:  # unpickling raises whatever the bytes say
            raise ValueError(f"{path} cannot be read: {error or type(error).__name__}") from error
        stray = stray_of(names)
        if stray is not None:
            raise ValueError(f"{path} points out of its folder, to {stray}")
        return found


_FORCED: Final = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_FORBIDDEN: Final = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def weights_only(folder: Path, *classes: type) -> Iterator[None]:
    """Within it every `torch.load`, a library's too, makes tensors, numbers, texts, their
    collections, and objects of `classes`; child processes that are forked do the same.

    Args:
        folder: that is read, for the refusal.

    Raises:
        ValueError: a file names something else.
    """
    before = {name: os.environ.pop(name, None) for name in (_FORCED, _FORBIDDEN)}
    os.environ[_FORCED] = "1"
    try:
        with torch.serialization.safe_globals(list(classes)):
            yield
    except pickle.UnpicklingError as error:
        raise ValueError(f"{folder} is not read: {refusal(error)}") from error
    finally:
        del os.environ[_FORCED]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def refusal(error: BaseException) -> str:
    """What torch says of a file that holds more than data, in a sentence with the way out."""
    named = re.search(r"GLOBAL (\S+)|add_safe_globals\(\[(?:`|')?([\w.]+)", str(error))
    name = (named[1] or named[2]) if named else None
    if name is None:
        return first_line(error)
    return (
        f"it names {name}, which may be code to run; if it is a value class of your own, call "
        f"torch.serialization.add_safe_globals([{name.rpartition('.')[2]}]) where you define it"
    )


def deepspeed_classes() -> list[type]:
    """What DeepSpeed's own files hold besides tensors, numbers and texts: records of a few fields.

    Named one by one, as each is built from a file.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
