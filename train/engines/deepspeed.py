"""ZeRO: DeepSpeed shards optimizer state (stage 1), gradients (2) and parameters (3).

DeepSpeed keeps FP32 weights and sums FP32 gradients, as the other engines do; `precision=bf16` is
autocast's, not DeepSpeed's own mode, whose weights and sums are bf16. Its optimizer is ours, bound
so that layer-wise norms are those of whole layers.
"""

import logging
import os
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from largebatch.common.text import one_line
from largebatch.distributed.ranks import Ranks
from largebatch.optim.layerwise.optimizer import LayerwiseOptimizer
from largebatch.optim.zero import bind
from largebatch.train.engines.base import Engine
from largebatch.train.engines.initial_values import InitialValues
from largebatch.train.engines.precision import Precision
from largebatch.train.engines.update import GradientLimits, StepMetrics
from largebatch.train.noise.small_gradients import SmallGradients, squares_of

if TYPE_CHECKING:
    from largebatch.train.checkpoints.tensors import CheckpointTensors


class DeepSpeed(Engine):
    """DeepSpeed's engine as one of ours. It steps whatever the gradient is.

    Args:
        stage: of ZeRO, 0 to 3.
        zero: more of DeepSpeed's `zero_optimization`, by its own names.
        values: of the parameters, where `model` is on the meta device; of stage 3 alone.
    """

    can_skip = False

    def __init__(
        self,
        model: nn.Module,
        ranks: Ranks,
        device: torch.device,
        micro_batch_size: int | None = None,
        precision: Precision | None = None,
        *,
        stage: int = 1,
        zero: Mapping[str, Any] | None = None,
        values: InitialValues | None = None,
    ) -> None:
        if stage not in range(4):
            raise ValueError(f"engine.stage must be 0, 1, 2 or 3, got {stage!r}")
        if zero is not None and "stage" in zero:
            raise ValueError(
                f"engine.stage is the stage, {stage}, and engine.zero.stage={zero['stage']} would "
                "be another: set engine.stage alone"
            )
        if precision is not None and precision.loss_scale is not None:
            raise ValueError(
                "precision=fp16 sums gradients in FP32, which DeepSpeed's FP16 mode does not: use "
                "precision=bf16, or engine=ddp or fsdp"
            )
        model = model if values is not None else model.to(device)
        super().__init__(model, ranks, device, micro_batch_size, precision)
        self._values = values
        if self.precision.dtype != torch.float32:
            # On CUDA DeepSpeed turns off the autocast it is called in: it is turned on within.
            model.forward = torch.autocast(device.type, self.precision.dtype)(model.forward)
        self._zero = {"stage": stage, **(zero or {})}
        self._wrapped: Any = None

    def attach(self, optimizer: Optimizer, clip_norm: float | None) -> Optimizer:
        known = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, LayerwiseOptimizer)
        if self._zero["stage"] and not isinstance(optimizer, known):
            raise ValueError(
                f"{type(optimizer).__name__} needs whole tensors, which ZeRO flattens: use "
                "engine=ddp or fsdp, or one of AdamW, SGD, LARS and LAMB"
            )
        config = {
            "train_micro_batch_size_per_gpu": 1,  # the loop cuts the batch itself
            "gradient_accumulation_steps": 1,
            "gradient_clipping": clip_norm or 0.0,
            "zero_optimization": self._zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1 << 62,
        }
        deepspeed = import_deepspeed(self._ranks, self.device)
        if self._values is not None:
            self._fill(deepspeed, config, self._values)
        try:
            self._wrapped, *_ = deepspeed.initialize(
                model=self.model, optimizer=optimizer, config=config
            )
        except ValueError as error:  # of pydantic's, over many lines
            why = one_line(error)
            raise ValueError(f"DeepSpeed refuses engine.zero={dict(self._zero)}: {why}") from error
        self._replica = self._wrapped
        if isinstance(optimizer, LayerwiseOptimizer):
            return bind(self._wrapped)
        inner: Optimizer = self._wrapped.basic_optimizer
        return inner

    def _fill(self, deepspeed: Any, config: dict[str, Any], values: InitialValues) -> None:
        """Give each parameter its value, and let DeepSpeed keep a shard of it, one by one."""
        sharded: list[Any] = []

        def put(module: nn.Module, name: str, value: Tensor) -> None:
            param = module._parameters[name]
            assert param is not None
            whole = nn.Parameter(value.to(self.device, copy=True), param.requires_grad)
            # The optimizer has the parameter already: the object stays, and takes what it is to be.
            torch.utils.swap_tensors(param, whole)  # type: ignore[no-untyped-call] # not annotated
            if sharded:
                sharded[0].convert_to_zero_parameters([param])
            else:
                holder = nn.ParameterList([param])
                deepspeed.zero.Init(holder, config_dict_or_path=config, dtype=torch.float32)
                sharded.append(param)

        values.play(put, self.device)
        self._values = None

    def _synchronised(self, is_last: bool) -> AbstractContextManager[Any]:
        self._wrapped.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    def _backward(self, loss: Tensor) -> None:
        self._wrapped.backward(loss)

    def update(self, optimizer: Optimizer, limits: GradientLimits) -> StepMetrics:
        assert limits.skip_above is None
        del optimizer  # DeepSpeed has it
        norm = self._norm_of_replicas() if self._zero["stage"] == 0 else None
        self._wrapped.step()
        if norm is None:
            norm = torch.as_tensor(self._wrapped.get_global_grad_norm(), dtype=torch.float32)
        return StepMetrics({}, {"grad_norm": norm.to(self.device)})

    def discard(self, optimizer: Optimizer) -> None:
        del optimizer
        self._wrapped.optimizer.zero_grad(set_to_none=True)

    def _norm_of_replicas(self) -> Tensor:
        """Without ZeRO gradients are where they always are, and DeepSpeed measures none."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.stack([*squares_of(grads)]).sum().sqrt()

    def non_finite(self, steps_ago: int) -> list[str]:
        del steps_ago
        return []  # the gradients are DeepSpeed's, and gone

    def small_gradients(self, kind: str) -> SmallGradients:
        raise ValueError(
            f"noise.small={kind} finds no gradients to measure under engine=deepspeed: use "
            "engine=ddp or fsdp"
        )

    def tensors(self, optimizer: Optimizer) -> "CheckpointTensors":
        del optimizer
        from largebatch.train.checkpoints.tensors import DeepSpeedTensors

        return DeepSpeedTensors(self._wrapped)


def import_deepspeed(ranks: Ranks, device: torch.device) -> Any:
    """DeepSpeed, given what it looks for in the environment."""
    if device.type == "cpu":  # elsewhere it finds the accelerator; on XPU it must not be set
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name, value in (
        ("RANK", ranks.rank),
        ("LOCAL_RANK", ranks.local_rank),
        ("WORLD_SIZE", ranks.size),
    ):
        os.environ.setdefault(name, str(value))
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
            f"engine=deepspeed needs DeepSpeed ({error}): pip install 'largebatch[deepspeed]'"
        ) from error
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # It calls collectives by names that torch 2.13 has others for; each call would warn.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if device.type == "cpu":
        # A kernel for inference, which it would spend minutes to compile.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
