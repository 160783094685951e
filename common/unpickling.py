"""Read a pickle without running code of its choice. Imports no torch.

A pickle may name any function of any module and have it called with arguments of its own, so one
that came from elsewhere is a program. Whoever reads one says which names it may hold.
"""

import pickle
from collections.abc import Callable
from typing import IO, Any


class AllowListUnpickler(pickle.Unpickler):
    """Unpickle what names nothing but what is allowed: without more, numbers, texts and their
    collections, which need no name.

    Args:
        allowed: takes a module and a name in it, before the module is imported.
    """

    def __init__(
        self, file: IO[bytes], allowed: Callable[[str, str], bool] = lambda module, name: False
    ) -> None:
        super().__init__(file)
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if not self._allowed(module, name):
            raise pickle.UnpicklingError(f"it names {module}.{name}, and only data is read")
        return super().find_class(module, name)
