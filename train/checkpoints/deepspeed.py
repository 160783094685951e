"""DeepSpeed's checkpoints: saved without its own file writing, and carried to a world of another
size.

Its shards fit one number of ranks. Its converter makes a universal checkpoint of them, a folder a
parameter, that any number reads. The converter knows Adam's two moments and no others, so those of
another optimizer travel under their names, and have their own again when they are loaded:
`optimizer.pt` beside them notes which, and the options of each group (ZeRO-3 would load
those of the first into all).
"""

import io
import os
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from largebatch.train.checkpoints.files import UNIVERSAL, File, crc32_of, publish, read_state
from largebatch.train.checkpoints.reading import deepspeed_classes, weights_only

_NOTES: Final = "optimizer.pt"
_SLOTS: Final = ("exp_avg", "exp_avg_sq")


@contextmanager
def kept_in_memory(engine: Any) -> Iterator[dict[str, memoryview]]:
    """Within it DeepSpeed saves into the dictionary, by file name, and touches no disk."""
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

    files: dict[str, memoryview] = {}

    class InMemory(CheckpointEngine):  # type: ignore[misc] # published without types
        def create(self, info: Any) -> None:
            pass

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            pass

        def save(self, state_dict: Any, path: str) -> None:
            file = io.BytesIO()
            torch.save(state_dict, file)
            files[Path(path).name] = file.getbuffer()

        def load(self, path: str, map_location: Any = None) -> Any:
            raise NotImplementedError

        def commit(self, info: Any) -> bool:
            return True

    before = engine.checkpoint_engine
    engine.checkpoint_engine = InMemory()
    engine._copy_recovery_script = lambda save_path: None  # rank 0 alone would see the disk full
    try:
        yield files
    finally:
        engine.checkpoint_engine = before
        del engine._copy_recovery_script


def check_loadable(checkpoint: Path, saved: dict[str, Any], engine: dict[str, Any]) -> Path | None:
    """The universal checkpoint to load, None where DeepSpeed's own fits.

    Args:
        saved, engine: how it was saved, and what is there now: `world` and `zero_stage`.

    Raises:
        ValueError: neither fits; the sentence has the command to run.
    """
    before, now = saved["zero_stage"], engine["zero_stage"]
    if min(before, 1) != min(now, 1) or (before == 3) != (now == 3):
        raise ValueError(
            f"{checkpoint} was saved with engine.stage={before}, which engine.stage={now} does not "
            f"read: go on with engine.stage={before}"
        )
    if before == 0 or saved["world"] == engine["world"]:
        return None
    universal = checkpoint / UNIVERSAL
    if not universal.exists():
        raise ValueError(
            f"{checkpoint} was saved by ZeRO-{before} on {saved['world']} rank(s) and there are "
            f"{engine['world']} now: convert it with `largebatch checkpoint universal {checkpoint}`"
        )
    return universal


def load_own(engine: Any, folder: Path) -> None:
    """Have DeepSpeed load what is in `folder`; every rank calls it."""
    reading = weights_only(folder, *deepspeed_classes())
    # It takes a path for a pattern, where brackets mean something else.
    with reading, chdir(folder.parent):
        path, _ = engine.load_checkpoint(".", tag=folder.name)
    if path is None:
        raise ValueError(f"DeepSpeed found nothing to load in {folder}")


def load_universal(engine: Any, universal: Path) -> None:
    """Load a converted checkpoint into a DeepSpeed engine of any size; every rank calls it."""
    _check_groups(engine.optimizer)
    config = engine._config
    before, config.load_universal_checkpoint = config.load_universal_checkpoint, True
    try:
        load_own(engine, universal)
    finally:
        config.load_universal_checkpoint = before
    with weights_only(universal):
        notes = torch.load(universal / _NOTES)
    optimizer = engine.basic_optimizer
    for flat, state in optimizer.state.items():
        optimizer.state[flat] = _own_names(state, notes["names"])
    for group, options in zip(optimizer.param_groups, notes["groups"], strict=True):
        group.update(options)


def _check_groups(zero: Any) -> None:
    """DeepSpeed (0.19.6) fails on a rank whose part of a group is padding, and the others wait."""
    if not hasattr(zero, "single_partition_of_fp32_groups"):
        return
    groups = zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)
    for params, flat in groups:
        numel, size = sum(param.numel() for param in params), dist.get_world_size()
        if (size - 1) * flat.numel() >= numel:
            raise ValueError(
                f"a group of {numel} parameter element(s) leaves one of {size} ranks without any, "
                "and DeepSpeed loads no universal checkpoint then: join it with another group, or "
                "start fewer ranks"
            )


def _own_names(state: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The state of one flat tensor, its moments under the optimizer's own names."""
    own = {names[slot]: state[slot] for slot in _SLOTS if slot in names and slot in state}
    if "step" in names and "step" in state:
        # ZeRO-3 gives all its sub-groups one tensor, which each would count up.
        step = state["step"]
        own["step"] = step.clone() if isinstance(step, Tensor) else step
    return own


# Conversion --------------------------------------------------------------------------------------


def convert(checkpoint: Path, workers: int) -> Path:
    """Make a universal checkpoint of one that DeepSpeed has saved; returns its folder.

    It is complete or it is not there. On the way the disk holds it twice, and the optimizer's
    shards once more where its moments are not Adam's.

    Args:
        workers: processes that read shards; half as many merge them.

    Raises:
        ValueError: there is nothing to convert, or an optimizer whose state does not fit.
    """
    saved = read_state(checkpoint).get("saved_by", {})
    if saved.get("kind") != "deepspeed" or not saved["zero_stage"]:
        raise ValueError(
            f"{checkpoint} is no checkpoint of DeepSpeed ZeRO-1, 2 or 3: a world of any size reads "
            "it as it is"
        )
    if (checkpoint / UNIVERSAL).exists():
        raise ValueError(f"{checkpoint / UNIVERSAL} is there already")
    from deepspeed.checkpoint import ds_to_universal

    draft = checkpoint.with_name(f".universal-{checkpoint.name}")
    if draft.exists():  # of a conversion that was killed
        shutil.rmtree(draft)
    draft.mkdir()
    try:
        names, groups = read_optimizer(checkpoint)
        adams = {name: name for name in (*_SLOTS, "step")}
        if names == adams:
            os.symlink(checkpoint.resolve(), draft / "source")
        else:
            rename(checkpoint, draft / "source", names)
        options = Namespace(
            input_folder="source",
            output_folder=UNIVERSAL,
            num_extract_workers=workers,
            num_merge_workers=max(1, workers // 2),
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        with weights_only(checkpoint, *deepspeed_classes()), chdir(draft):  # as in `load_own`
            ds_to_universal.main(options)
        torch.save({"names": names, "groups": groups}, draft / UNIVERSAL / _NOTES)
        files = {
            str(path.relative_to(draft / UNIVERSAL)): File(path.stat().st_size, crc32_of(path))
            for path in sorted((draft / UNIVERSAL).rglob("*"))
            if path.is_file()
        }
        publish(draft / UNIVERSAL, checkpoint / UNIVERSAL, files, {})
    finally:
        shutil.rmtree(draft)
    return checkpoint / UNIVERSAL


def _shards(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.glob("*_optim_states.pt"))


def _inner(shard: dict[str, Any]) -> dict[str, Any]:
    """The state of the optimizer within ZeRO's: `state` by flat tensor, and `param_groups`."""
    zero = shard["optimizer_state_dict"]
    key = "base_optimizer_state" if "base_optimizer_state" in zero else "optimizer_state_dict"
    inner: dict[str, Any] = zero[key]
    return inner


def read_optimizer(checkpoint: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """The optimizer's own name of each of the converter's, and the options of its groups."""
    with weights_only(checkpoint, *deepspeed_classes()):
        shard = torch.load(_shards(checkpoint)[0], map_location="cpu")
    inner = _inner(shard)
    items = [item for state in inner["state"].values() for item in state.items()]
    moments = {name for name, value in items if isinstance(value, Tensor) and value.dim() == 1}
    others = {name for name, value in items if value is not None} - moments - {"step"}
    if others or len(moments) > len(_SLOTS):
        raise ValueError(
            f"the optimizer in {checkpoint} keeps {', '.join(sorted(others | moments))}, and "
            f"DeepSpeed's converter carries {len(_SLOTS)} tensors a parameter, and a step"
        )
    names = dict(zip(_SLOTS, sorted(moments), strict=False))
    if any(name == "step" for name, _ in items):
        names["step"] = "step"
    groups = [
        {name: value for name, value in group.items() if name != "params"}
        for group in inner["param_groups"]
    ]
    return names, groups


def _lengths(shard: dict[str, Any]) -> list[int]:
    """Elements of each flat tensor's moments: of ZeRO-1 and 2 with the padding at its end, which
    their FP32 weights are saved without.
    """
    zero = shard["optimizer_state_dict"]
    if "fp32_flat_groups" in zero:
        return [flat.numel() for flat in zero["fp32_flat_groups"]]
    flats = zip(zero["single_partition_of_fp32_groups"], zero["group_paddings"], strict=True)
    return [flat.numel() + padding for flat, padding in flats]


def rename(checkpoint: Path, to: Path, names: dict[str, str]) -> None:
    """Make a copy of a checkpoint whose moments bear the names that the converter knows; the files
    that it only copies are linked. A moment that the optimizer has not is zero.
    """
    to.mkdir()
    for path in checkpoint.glob("*_model_states.pt"):
        os.symlink(path.resolve(), to / path.name)
    for path in _shards(checkpoint):
        with weights_only(checkpoint, *deepspeed_classes()):
            shard = torch.load(path, map_location="cpu")
        inner, states = _inner(shard), {}
        for number, length in enumerate(_lengths(shard)):
            before = inner["state"].get(number, {})
            states[number] = {
                slot: before.get(names.get(slot), torch.zeros(length)) for slot in _SLOTS
            }
            states[number]["step"] = before.get("step", torch.zeros(()))
        inner["state"] = states
        torch.save(shard, to / path.name)
