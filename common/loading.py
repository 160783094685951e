"""Imports of many modules, such as torch's."""

import gc
import importlib
import sys
from types import ModuleType
from typing import Any


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


def load_matplotlib() -> None:
    """Import what matplotlib's artists stand on, so that they come without a help text each.

    matplotlib writes a signature and a docstring for the method `set` of every class, and lists the
    properties of some, two fifths of what its import takes. For commands: in a process of the
    user's somebody may read them.
    """
    artist: Any = load("matplotlib.artist")
    artist.kwdoc = lambda kind: ""
    written = "_update_set_signature_and_docstring"
    if hasattr(artist.Artist, written):  # else this matplotlib does it in another way, or not
        setattr(artist.Artist, written, classmethod(lambda kind: None))
