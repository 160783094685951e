"""Lets the tests, and the processes they spawn, import this folder's modules."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def wanted(request: pytest.FixtureRequest) -> set[str]:
    """The names of runs that tests of this module take here: the others are not made."""
    items = [item for item in request.session.items if item.module is request.module]
    return {value for item in items if (spec := getattr(item, "callspec", None))
            for value in spec.params.values() if isinstance(value, str)}  # fmt: skip
