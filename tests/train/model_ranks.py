"""What the ranks of tests/train/test_models_transformer.py do: it must be importable by them."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from largebatch.train.models import Transformer

SHAPE = {"vocabulary": 30, "dim": 32, "depth": 2, "heads": 4, "kv_heads": 2, "max_length": 16}


def tokens() -> torch.Tensor:
    return torch.randint(0, 30, (4, 13), generator=torch.Generator().manual_seed(5))


def model(tied: bool) -> Transformer:
    torch.manual_seed(0)
    return Transformer(**SHAPE, tie_embeddings=tied)  # type: ignore[arg-type]


def gradients_of(module: torch.nn.Module, sequences: torch.Tensor) -> dict[str, Any]:
    logits = module(sequences[:, :-1])
    cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
    found = {}
    for name, param in module.named_parameters():
        assert param.grad is not None
        grad = param.grad
        found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return {"logits": logits.detach(), **found}


def shard_from_meta(tied: bool) -> dict[str, Any]:
    """Each block sharded on the meta device, given memory and values, and one gradient made."""
    whole = model(tied)
    with torch.device("meta"):
        sharded = Transformer(**SHAPE, tie_embeddings=tied)  # type: ignore[arg-type]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    sharded.to_empty(device="cpu")
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(sharded, whole.state_dict(), options=options)
    for block in sharded.blocks:
        forward = block.forward
        block.forward = lambda x, f=forward: checkpoint(f, x, use_reentrant=False)
    part = tokens().chunk(dist.get_world_size())[dist.get_rank()]
    return gradients_of(sharded, part)
