"""What gloo ranks do with checkpoints of real DeepSpeed engines: save, convert, load elsewhere."""

import io
import logging
import os
import sys
import threading
import traceback
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checkpoint_ranks import OPTIMIZERS, Held, state_after
from gloo_ranks import Outcome
from torch import Tensor, nn

from largebatch.conf.config import CheckpointConfig
from largebatch.distributed.ranks import Ranks
from largebatch.train.checkpoints.checkpoint import Checkpoints
from largebatch.train.checkpoints.deepspeed import convert
from largebatch.train.checkpoints.tensors import DeepSpeedTensors

MOMENTS = {
    "LAMB": ("exp_avg", "exp_avg_sq"),
    "LARS": ("momentum_buffer",),
    "AdamW": ("exp_avg", "exp_avg_sq"),
    "SGD": ("momentum_buffer",),
}


class Network(nn.Module):
    """Odd sizes, so that shards begin and end within tensors; two groups of options."""

    def __init__(self, seed: int, tiny: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(7, 13), nn.Linear(13, 5)
        self.scale = nn.Parameter(torch.ones(1)) if tiny else None

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.last(torch.tanh(self.first(inputs)))
        return (outputs if self.scale is None else outputs * self.scale).square().mean()

    def groups(self) -> list[dict[str, Any]]:
        named = list(self.named_parameters())
        return [
            {"params": [item for item in named if item[0].endswith("weight")]},
            {"params": [p for p in named if p[0].endswith("bias")], "weight_decay": 0.0},
            *([] if self.scale is None else [{"params": [("scale", self.scale)]}]),
        ]


class Trainee:
    """The network in one of the project's DeepSpeed engines."""

    def __init__(self, stage: int, optimizer: str, seed: int, tiny: bool = False) -> None:
        from largebatch.train.engines.deepspeed import DeepSpeed

        self.optimizer_name = optimizer
        self.ranks = Ranks("test", dist.get_rank(), dist.get_world_size())
        model = Network(seed, tiny)
        more = {"sub_group_size": 60, "stage3_param_persistence_threshold": 0}
        self.engine = DeepSpeed(
            model, self.ranks, torch.device("cpu"), stage=stage, zero=more if stage == 3 else None
        )
        make = OPTIMIZERS.get(optimizer) or (
            lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        )
        self.optimizer = self.engine.attach(make(model.groups()), None)
        self.model: Any = self.engine._replica

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        inputs = torch.randn(4, 7, generator=generator)  # the same on all ranks, in any world
        self.model.backward(self.model(inputs))
        self.model.step()

    def tensors(self) -> DeepSpeedTensors:
        return DeepSpeedTensors(self.model)

    def everything(self) -> dict[str, Tensor]:
        """Weights and moments, whole, by name, and the options of the groups."""
        found = {}
        for name, param in self.model.module.named_parameters():
            for key in (None, *MOMENTS[self.optimizer_name]):
                found[name if key is None else f"{name}.{key}"] = self.whole(param, key)
        steps = {float(state["step"]) for state in self.optimizer.state.values() if "step" in state}
        assert len(steps) <= 1
        found["step"] = torch.tensor([*steps])
        found["decays"] = torch.tensor([g["weight_decay"] for g in self.optimizer.param_groups])
        keys = {key for state in self.optimizer.state.values() for key in state}
        assert keys == {*MOMENTS[self.optimizer_name], *(["step"] if steps else [])}
        return found

    def whole(self, param: Any, key: str | None) -> Tensor:
        """A parameter's FP32 weights, or a moment of it, put together from the flat shards."""
        zero, rank = self.model.optimizer, self.ranks.rank
        if hasattr(zero, "grad_position"):  # ZeRO-3: a slice of each tensor a rank, padded
            group, place, length = zero.grad_position[zero.get_param_id(param)]
            flat, numel, start = (
                zero.fp32_partitioned_groups_flat[group],
                param.ds_numel,
                rank * length,
            )
            length = max(0, min(length, numel - start))
        else:
            numbers = [
                i for i, params in enumerate(zero.bit16_groups) if any(p is param for p in params)
            ]
            flat, numel = zero.single_partition_of_fp32_groups[numbers[0]], param.numel()
            start = place = length = 0
            if param._hp_mapping is not None:
                here, there = (
                    param._hp_mapping.lp_fragment_address,
                    param._hp_mapping.hp_fragment_address,
                )
                start, place, length = here.start, there.start, here.numel
        source = flat if key is None else self.optimizer.state[flat][key]
        result = torch.zeros(numel)
        result[start : start + length] = source.detach()[place : place + length]
        dist.all_reduce(result)
        return result


@dataclass(frozen=True)
class ZeroJob:
    """Load a checkpoint, if there is one, take two steps, save after so many samples, convert."""

    folder: str
    stage: int
    optimizer: str
    load: int | None
    save: int | None
    converts: bool = True
    mode: str = "sync"
    tiny: bool = False
    """With a group of one element, of which a second rank has nothing."""
    forged: bool = False
    """What is loaded names code first: see `forge`."""

    def __str__(self) -> str:
        forged = " forged" * self.forged
        return f"ZeRO-{self.stage} {self.optimizer} {self.load} {self.save} {self.mode}{forged}"

    def do(self) -> Outcome:
        seed = 0 if self.load is None else 1
        trainee = Trainee(self.stage, self.optimizer, seed, self.tiny)
        tensors = HeldZero(trainee)
        config = CheckpointConfig(every_samples=64, mode=self.mode, keep=9)
        checkpoints = Checkpoints(Path(self.folder), trainee.ranks, tensors, config)
        found: Outcome = {}
        if self.forged and trainee.ranks.is_first:
            forge(self.path(64))
        if self.forged:
            dist.barrier()
        if self.load is not None:
            try:
                checkpoints.load(self.path(self.load))
            except ValueError as error:
                return {"refusal": str(error)}
            found["loaded"] = trainee.everything()
        for number in range(2):
            trainee.step((self.load or 0) + number)
        found["saved"] = trainee.everything()
        if self.save is not None:
            if self.mode == "sync":
                tensors.go.set()
            checkpoints.save(state_after(self.save))
            trainee.step(5)
            tensors.go.set()
            checkpoints.wait()
            assert checkpoints.failures == []
            if self.converts and trainee.ranks.is_first:
                try:
                    convert(self.path(self.save), workers=1)
                except Exception:  # told after the barrier
                    found["error"] = traceback.format_exc()
            dist.barrier()
        return found

    def path(self, samples: int) -> Path:
        return Path(self.folder) / "checkpoints" / f"samples-{samples:015d}"


class Program:
    """Pickled, a program that makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.mark}'",)


def forge(checkpoint: Path) -> None:
    """Put a program into the file that every rank reads."""
    path = checkpoint / "mp_rank_00_model_states.pt"
    states = torch.load(path, weights_only=True)
    torch.save(states | {"more": Program(checkpoint.parents[1] / "mark")}, path)


class HeldZero(DeepSpeedTensors):
    """Writes nothing before `go` is set."""

    def __init__(self, trainee: Trainee) -> None:
        super().__init__(trainee.model)
        self.go = threading.Event()

    def begin_save(self, draft: Path, staged: bool) -> Any:
        return Held(super().begin_save(draft, staged), self.go)


def work(job: ZeroJob) -> Outcome:
    if not dist.is_initialized():  # for as long as the process lasts: DeepSpeed keeps groups
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    said = io.StringIO()
    try:
        with warnings.catch_warnings(), redirect_stdout(said), redirect_stderr(said):
            warnings.simplefilter("ignore")  # torch's, on how DeepSpeed calls it
            logging.getLogger("DeepSpeed").setLevel(logging.CRITICAL)
            return job.do()
    except BaseException:
        sys.stderr.write(said.getvalue()[-2000:])
        raise
