"""The type of `engine`: how a step's gradient comes about. Imports no torch."""

from dataclasses import dataclass
from typing import Any, Final

from largebatch.conf.specs import count, real

_MOVED: Final = {
    "largebatch.train.engines.DDP": "largebatch.train.engines.ddp.DDP",
    "largebatch.train.engine_fsdp.FSDP": "largebatch.train.engines.fsdp.FSDP",
    "largebatch.train.engine_deepspeed.DeepSpeed": "largebatch.train.engines.deepspeed.DeepSpeed",
}
"""Targets as configurations may have saved them, and what they are called now."""


def engine_target(name: str) -> str:
    """Return what the engine is called now that a configuration, perhaps an older one, names."""
    return _MOVED.get(name, name)


@dataclass
class EngineConfig:
    """Keys of all engines, and below them those of one; a YAML has only its own."""

    _target_: str = "largebatch.train.engines.ddp.DDP"
    micro_batch_size: int | str | None = count(None, least=1, word="auto")
    nproc: int = count(1, least=1)
    device: str | None = None
    ipex: bool = False
    activation_checkpointing: bool | None = None
    compile: bool = False
    bucket_mb: float | None = real(None, above=0.0)
    shard_nodes: int | None = count(None, least=1)
    replicas: int | None = count(None, least=1)
    reshard_after_forward: bool | None = None
    accumulate: str | None = None
    stage: int | None = count(None)
    zero: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self._target_ = engine_target(self._target_)

    @property
    def known_micro_batch_size(self) -> int | None:
        """None: the whole local batch, or one that is found on the device."""
        return self.micro_batch_size if isinstance(self.micro_batch_size, int) else None

    @property
    def target(self) -> dict[str, Any]:
        """What builds it, with the keys of its own."""
        own = ("bucket_mb", "shard_nodes", "replicas", "reshard_after_forward", "accumulate",
               "stage", "zero")  # fmt: skip
        given = {name: getattr(self, name) for name in own}
        return {"_target_": self._target_} | {k: v for k, v in given.items() if v is not None}

    @property
    def shards_weights(self) -> bool:
        """Whether it can fill a model shard by shard, as FSDP2 and ZeRO-3 do."""
        if self._target_ == "largebatch.train.engines.deepspeed.DeepSpeed":
            return self.stage == 3
        return self._target_ == "largebatch.train.engines.fsdp.FSDP"

    @property
    def needs_group(self) -> bool:
        """Whether it needs a process group in a world of one too."""
        return self._target_ != "largebatch.train.engines.ddp.DDP"
