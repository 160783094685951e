"""Imports of many modules, such as torch's."""

import gc
import importlib
import sys
from types import ModuleType


def load(name: str) -> ModuleType:
    """Import a module, and what it stands on, without looking for garbage.

    What an import makes stays to the end of the process. Looking through it again and again takes a
    tenth of the time of `import torch`, and once more at the end a quarter: it is left alone for
    good.
    """
    if name in sys.modules:
        return sys.modules[name]
    enabled = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
