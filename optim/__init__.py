"""Layer-wise and second-order optimizers for very large batches, as plain `torch.optim.Optimizer`
subclasses.
"""

from largebatch.optim.factory import create, names
from largebatch.optim.groups import param_groups
from largebatch.optim.kfac import KFAC
from largebatch.optim.lamb import LAMB
from largebatch.optim.lars import LARS
from largebatch.optim.mano import Mano
from largebatch.optim.muon import Muon
from largebatch.optim.shampoo import Shampoo
from largebatch.optim.soap import SOAP
from largebatch.optim.soap_muon import SOAPMuon

__all__ = [
    "KFAC",
    "LAMB",
    "LARS",
    "SOAP",
    "Mano",
    "Muon",
    "SOAPMuon",
    "Shampoo",
    "create",
    "names",
    "param_groups",
]


def __dir__() -> list[str]:
    # The modules beside these are how they are made; `zero.bind` is imported where ZeRO is used.
    return sorted(__all__)
