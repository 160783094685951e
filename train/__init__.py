"""The loop and what it stands on: engines, ranks and devices, data, models, tasks, run records.

from largebatch.train import fit

result = fit(model, task, optimizer="lamb", batch_size=1024, samples=1e6)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from largebatch.train.api.fit import FitResult, fit

__all__ = ["FitResult", "fit"]


def __getattr__(name: str) -> Any:
    # The command line composes a run before it imports torch: what needs torch comes when asked.
    if name in __all__:
        return getattr(import_module("largebatch.train.api.fit"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
