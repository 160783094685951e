"""Lets the tests, and the processes they spawn, import this folder's optimizer_*.py modules."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def wanted(request: pytest.FixtureRequest) -> set[str]:
    """What the tests of this session take as parameters, as strings: cells to be launched together
    are launched where one of them is among these.
    """
    callspecs = [getattr(item, "callspec", None) for item in request.session.items]
    return {str(value) for callspec in callspecs if callspec for value in callspec.params.values()}
