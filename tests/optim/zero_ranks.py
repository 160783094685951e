"""What two gloo ranks do with LARS and LAMB inside real DeepSpeed engines: a cell, or a refusal."""

import io
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from gloo_ranks import Outcome
from torch import Tensor, nn
from zero_refusals import Refusal
from zero_training import (
    MICRO_BATCH_SIZE,
    NUM_MICRO_BATCHES,
    NUM_PARTS,
    NUM_STEPS,
    ROWS,
    WORLD_SIZE,
    Cell,
    Network,
    batches,
    given_gradients,
    make_optimizer,
    parameter_groups,
    train_alone,
    trainable,
    zero_cells,
)

from largebatch.optim.zero import bind

__all__ = ["Cell", "Report", "measure", "run_zero_cell", "work", "zero_cells"]


@dataclass(frozen=True)
class Report:
    difference: float
    """Of the FP32 weights: the largest ‖w - ŵ‖ / ‖ŵ‖ of all tensors; NaN if any is."""
    num_ulps: int
    """Of the model's own weights, where they are bf16: the largest distance from rounded ŵ."""
    num_collectives: int
    """The most in one call of the optimizer's `step`."""
    layers: tuple[str, ...]
    """Names in the optimizer's `layer_stats()` at the end."""


def work(job: Cell | Refusal) -> Outcome:
    """Of one rank: the figures of a cell, or what the refusal says."""
    if isinstance(job, Cell):
        return asdict(measure(job))
    with quiet():
        cell = replace(job.cell, bound=False)
        run = RedundancyRun(cell) if cell.stage is None else EngineRun(cell)
        try:
            if job.bound:
                assert isinstance(run, EngineRun)
                job.change(run.engine)
                bind(run.engine)
            run.train()
        except (RuntimeError, TypeError, ValueError) as error:
            return {"refusal": f"{type(error).__name__}: {error}"}
    return {"refusal": ""}


def run_zero_cell(cell: Cell) -> float:
    """The relative difference of a cell, on each of two gloo ranks."""
    return measure(cell).difference


def measure(cell: Cell) -> Report:
    """Train a cell on the ranks of the default process group, and compare it with one process."""
    with quiet():
        run = (RedundancyRun if cell.stage is None else EngineRun)(cell)
        run.train()
        masters, weights = run.masters(), run.weights()
    expected = train_alone(cell)
    return Report(
        difference=float(
            torch.stack(
                [
                    (masters[name] - weight).norm() / weight.norm()
                    for name, weight in expected.items()
                ]
            ).max()
        ),
        num_ulps=max(
            0 if weights[name].dtype == torch.float32 else ulps(weights[name], weight.bfloat16())
            for name, weight in expected.items()
        ),
        num_collectives=max(run.num_collectives),
        layers=tuple(map(str, getattr(run.inner, "layer_stats", dict)())),
    )


def ulps(one: Tensor, other: Tensor) -> int:
    """How many bf16 numbers they are apart, at most; a sign change counts through zero."""
    integers = [tensor.view(torch.int16).int() for tensor in (one, other)]
    ordered = [torch.where(bits < 0, -(bits & 0x7FFF), bits) for bits in integers]
    return int((ordered[0] - ordered[1]).abs().max())


class RedundancyRun:
    """DDP and a ZeroRedundancyOptimizer."""

    def __init__(self, cell: Cell) -> None:
        from torch.distributed.optim import ZeroRedundancyOptimizer
        from torch.nn.parallel import DistributedDataParallel

        self.cell = cell
        self.model = Network()
        self.replica = DistributedDataParallel(self.model)
        cls, options = ROWS[cell.row]
        self.optimizer = ZeroRedundancyOptimizer(parameter_groups(self.model, cell), cls, **options)
        if cell.bound:
            bind(self.optimizer)
        self.inner = self.optimizer.optim
        self.num_collectives: list[int] = []
        count_collectives(self.inner, self.num_collectives)

    def train(self) -> None:
        for tokens, targets in batches():
            self.optimizer.zero_grad()
            mine = slice(dist.get_rank(), None, WORLD_SIZE)
            self.replica(tokens[mine].flatten(0, 1), targets[mine].flatten(0, 1)).backward()
            self.optimizer.step()

    def masters(self) -> dict[str, Tensor]:
        return {name: param.detach() for name, param in self.model.named_parameters()}

    weights = masters


class EngineRun:
    """A DeepSpeed engine."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.step = self.part = 0  # of the training, and of the step's batch
        self.num_collectives: list[int] = []
        self.start(seed=0)

    def start(self, seed: int) -> None:
        """Make the engine, from a network of this seed."""
        model = Network(seed)
        shapes = {name: param.shape for name, param in model.named_parameters()}
        self.engine = make_engine(model, make_optimizer(model, self.cell), self.cell)
        if self.cell.stage == 3:
            fill_padding(self.engine, torch.nan if self.cell.bound else 0.0)
        if self.cell.dtype != "fp32":
            for name, param in trainable(self.engine.module):
                param.register_hook(lambda grad, name=name: self.given(grad, name, shapes[name]))
        if self.cell.bound:
            bind(self.engine)
        self.inner = self.engine.basic_optimizer
        count_collectives(self.inner, self.num_collectives)

    def given(self, grad: Tensor, name: str, shape: torch.Size) -> Tensor:
        return given_gradients(name, shape, self.step)[self.part].to(grad)

    def train(self) -> None:
        for self.step, (tokens, targets) in enumerate(batches()):
            if self.cell.resumed and self.step == NUM_STEPS // 2:
                self.resume()
            for self.part in range(dist.get_rank(), NUM_PARTS, WORLD_SIZE):
                self.engine.backward(self.engine(tokens[self.part], targets[self.part]))
                self.engine.step()

    def resume(self) -> None:
        """Go on in a new engine, from a network of other weights, with this one's checkpoint."""
        first = dist.get_rank() == 0
        folder = [tempfile.mkdtemp() if first else None]
        dist.broadcast_object_list(folder)
        self.engine.save_checkpoint(folder[0])
        self.start(seed=1)
        self.engine.load_checkpoint(folder[0])
        bind(self.engine)  # again
        dist.barrier()
        if first:
            shutil.rmtree(str(folder[0]))

    def weights(self) -> dict[str, Tensor]:
        """The model's own, whole."""
        import deepspeed

        whole = {}
        for name, param in self.engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([param], enabled=self.cell.stage == 3):
                whole[name] = param.detach().clone()
        return whole

    def masters(self) -> dict[str, Tensor]:
        """The FP32 weights, whole, as DeepSpeed itself puts them together."""
        from deepspeed.utils import safe_get_full_fp32_param

        if self.cell.dtype == "fp32":
            return self.weights()
        params = trainable(self.engine.module)
        if self.cell.stage == 0:
            zero = self.engine.optimizer
            groups = (
                chain.from_iterable(groups) for groups in (zero.fp16_groups, zero.fp32_groups)
            )
            copies = dict(zip(*groups, strict=True))
            return {name: copies[param].detach() for name, param in params}
        return {name: safe_get_full_fp32_param(param) for name, param in params}


def make_engine(model: nn.Module, optimizer: torch.optim.Optimizer, cell: Cell) -> Any:
    zero: dict[str, Any] = {"stage": cell.stage, **cell.zero}
    if cell.stage == 3:  # several sub-groups for a group, and no tensor that is left whole
        zero |= {"sub_group_size": 150, "stage3_param_persistence_threshold": 0}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH_SIZE,
        "gradient_accumulation_steps": NUM_MICRO_BATCHES,
        "gradient_clipping": cell.clipping,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    if cell.dtype != "fp32":
        config["bf16"] = {"enabled": True}
    if cell.dtype == "bf16/fp32":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return import_deepspeed().initialize(model=model, optimizer=optimizer, config=config)[0]


def import_deepspeed() -> Any:
    """DeepSpeed on the CPU, for a rank that nothing but this process group was set up for."""
    rank = str(dist.get_rank())
    variables = {"DS_ACCELERATOR": "cpu", "RANK": rank, "LOCAL_RANK": rank}
    for variable, value in {**variables, "WORLD_SIZE": str(WORLD_SIZE)}.items():
        os.environ.setdefault(variable, value)
    import deepspeed
    from deepspeed.runtime import bf16_optimizer

    deepspeed.utils.logger.setLevel("ERROR")
    # A kernel for inference, which it would spend minutes to compile.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It collects garbage, a second each time.
    bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None
    return deepspeed


def fill_padding(engine: Any, value: float) -> None:
    """Where ZeRO-3 pads a rank's slice: it leaves there what the memory happened to hold."""
    zero = engine.optimizer
    for _, param in trainable(engine.module):
        sub_group, start, length = zero.grad_position[zero.get_param_id(param)]
        held = max(0, min(length, param.ds_numel - dist.get_rank() * length))
        zero.fp32_partitioned_groups_flat[sub_group].data[start + held : start + length] = value


def count_collectives(optimizer: Any, counts: list[int]) -> None:
    """From now on, append to `counts` how many all-reduces each call of `optimizer.step` makes."""
    step = optimizer.step

    def counting(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
            result = step(*args, **kwargs)
        counts.append(all_reduce.call_count)
        return result

    optimizer.step = counting


@contextmanager
def quiet() -> Iterator[None]:
    """Without DeepSpeed's remarks, and torch's on how DeepSpeed calls it."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
