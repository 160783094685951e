"""What ranks do for the test of a layer that no step has used when the state is saved."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from largebatch.optim import KFAC


class TwoWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        out: Tensor = self.one(x) + (self.other(x) if both else 0)
        return out


def work(job: str) -> dict[str, Any]:
    """Whether a run goes on from the state it has saved as if it had not been saved."""
    torch.manual_seed(0)
    model = TwoWays()
    replica = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = KFAC(model, lr=0.1, process_group=dist.group.WORLD)

    def step(optimizer: KFAC, number: int, both: bool) -> None:
        optimizer.zero_grad()
        torch.manual_seed(number + 10 * dist.get_rank())
        torch.autograd.backward(replica(torch.randn(8, 4), both).square().mean())
        optimizer.step()

    for number in range(2):
        step(optimizer, number, both=False)
    state = copy.deepcopy(optimizer.state_dict())
    before = [p.detach().clone() for p in model.parameters()]
    for number in (2, 3):
        step(optimizer, number, both=number == 3)
    wanted = [p.detach().clone() for p in model.parameters()]
    again = KFAC(model, lr=0.1, process_group=dist.group.WORLD)
    again.load_state_dict(state)
    with torch.no_grad():
        for param, value in zip(model.parameters(), before, strict=True):
            param.copy_(value)
    for number in (2, 3):
        step(again, number, both=number == 3)
    pairs = zip(model.parameters(), wanted, strict=True)
    return {"same": all(torch.equal(param.detach(), value) for param, value in pairs)}
