"""A checkpoint's weights as one safetensors file, for whoever does not train with this project."""

import json
import os
import sys
from contextlib import chdir, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from largebatch.train.checkpoints.files import flush_to_disk, read_state
from largebatch.train.checkpoints.reading import PlainReader, deepspeed_classes, weights_only
from largebatch.train.checkpoints.torch_format import quiet

_MODEL = "model."
_AVERAGE = "average.weights."
"""Of a run with an average of the weights, which is what it was evaluated with."""


def export(checkpoint: Path, file: Path) -> int:
    """Write the weights, by their names in the model; returns how many bytes. In one process,
    which holds all of them in memory; the file appears whole or not at all.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ValueError(
            f"export needs safetensors ({error}): pip install 'largebatch[train]'"
        ) from error
    if file.exists():
        raise ValueError(f"{file} is there already: choose another name, or move it away")
    if not file.parent.is_dir():
        raise ValueError(f"{file.parent} is no folder: make it first")
    state = read_state(checkpoint)
    tensors = weights(checkpoint, state.get("saved_by", {}))
    metadata = {
        "format": "pt",  # what others look for
        "largebatch": json.dumps({"checkpoint": checkpoint.name, **state["progress"]}),
    }
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file(tensors, draft, metadata)
        flush_to_disk(draft)
        if file.exists():  # by now
            raise ValueError(f"{file} is there already: choose another name, or move it away")
        draft.rename(file)
    finally:
        draft.unlink(missing_ok=True)
    return file.stat().st_size


def weights(checkpoint: Path, saved: dict[str, Any]) -> dict[str, Tensor]:
    """The model's tensors by name, each with memory of its own."""
    if saved.get("kind") == "deepspeed":
        tensors = _of_deepspeed(checkpoint, saved["zero_stage"])
    else:
        tensors = _of_torch(checkpoint)
    seen: set[int] = set()
    for name, tensor in tensors.items():
        shared = tensor.untyped_storage().data_ptr() in seen
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor.clone() if shared else tensor.contiguous()
    return tensors


def _of_torch(checkpoint: Path) -> dict[str, Tensor]:
    reader = PlainReader(checkpoint)
    known = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {
        name: torch.empty(meta.size, dtype=meta.properties.dtype)
        for name, meta in known.items()
        if name.startswith(_MODEL) and isinstance(meta, TensorStorageMetadata)
    }
    averages: dict[str, Any] = {
        name: torch.empty(meta.size, dtype=meta.properties.dtype)
        for name, meta in known.items()
        if name.startswith(_AVERAGE) and isinstance(meta, TensorStorageMetadata)
    }
    with quiet(), weights_only(checkpoint):
        state_dict_loader.load(tensors | averages, storage_reader=reader, no_dist=True)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own = name.removeprefix(_MODEL)
        average = averages.get(f"{_AVERAGE}{own}")
        found[own] = tensor if average is None else average.to(tensor.dtype)
    return found


def _of_deepspeed(checkpoint: Path, zero_stage: int) -> dict[str, Tensor]:
    if zero_stage == 0:
        path = checkpoint / "mp_rank_00_model_states.pt"
        with weights_only(checkpoint, *deepspeed_classes()):
            module: dict[str, Any] = torch.load(path, map_location="cpu")["module"]
        return {name: value for name, value in module.items() if isinstance(value, Tensor)}
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    reading = weights_only(checkpoint, *deepspeed_classes())
    with reading, chdir(checkpoint.parent), redirect_stdout(sys.stderr):
        found: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(".", checkpoint.name)
    return dict(found)
