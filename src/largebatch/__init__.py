"""Training with very large batches: optimizers, schedules, a loop and the study of them.

In a checkout the code folders stand at the repository's top; in a wheel they lie beside this file.
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2]
if (_checkout / "pyproject.toml").exists():
    __path__.append(str(_checkout))
