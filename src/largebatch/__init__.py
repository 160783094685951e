"""Training with very large batches: optimizers, schedules, a loop and the study of them.

In a checkout the code folders stand at the repository's top; in a wheel they lie beside this file.
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2]
if (_checkout / "pyproject.toml").exists():
    __path__.append(str(_checkout))


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from largebatch.cli import version  # read where it is asked for: every import passes here

    return version()
