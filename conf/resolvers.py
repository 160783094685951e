"""Resolvers of the configuration's own.

`${unique:}` in names of folders: of runs that begin in the same second, each has its own.
`${nearest:256,SIZES}` and `${among:[64,256],SIZES}` follow a study's
batch sizes: who gives other sizes need not move what stands beside them. `${class_name:PATH}` is
the last part of a class's dotted name.
"""

import math
import secrets
from collections.abc import Sequence

from omegaconf import ListConfig, OmegaConf


def register() -> None:
    """Register them; `${unique:}` is eight letters, the same all through one configuration."""
    OmegaConf.register_new_resolver(
        "unique", lambda: secrets.token_hex(4), use_cache=True, replace=True
    )
    OmegaConf.register_new_resolver("nearest", nearest, replace=True)
    OmegaConf.register_new_resolver("among", among, replace=True)
    OmegaConf.register_new_resolver(
        "class_name", lambda path: str(path).rpartition(".")[2], replace=True
    )


def nearest(wanted: int, sizes: Sequence[int]) -> int:
    """Return the size whose ratio to `wanted` is nearest to 1, the smaller of two; `wanted` where
    there is none, or none that is a number.

    >>> nearest(256, [64, 128, 1024]), nearest(256, [])
    (128, 256)
    """
    numbers = sorted(size for size in sizes if isinstance(size, int) and size > 0)
    return min(numbers, key=lambda size: abs(math.log(size / wanted)), default=wanted)


def among(wanted: Sequence[int], sizes: Sequence[int]) -> ListConfig:
    """Return those of `wanted` that are among the sizes.

    >>> among([64, 256, 4096], [64, 128, 256])
    [64, 256]
    """
    return OmegaConf.create([size for size in wanted if size in sizes])


register()
