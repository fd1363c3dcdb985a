"""What the tests of several processes share."""

import pytest

from tests.distributed import driving


@pytest.fixture(scope="module")
def nursery():
    with driving.Nursery() as nursery:
        yield nursery
