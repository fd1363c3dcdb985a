"""Studies in the tests' process are of one device where they say nothing of a mesh, and their
pictures are drawn with fonts that take less time."""

import pytest

from tests import commands, shallow


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with commands.one_device():
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_fonts():
    with shallow.quick_fonts():
        yield
