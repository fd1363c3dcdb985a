"""Studies in the tests' process are of one device where they say nothing of a mesh."""

import pytest

from tests import commands


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with commands.one_device():
        yield
