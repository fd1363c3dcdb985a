"""The tests' own linear algebra in one thread, for the reason that the package's is."""

import pytest

from ldm_scaling.metrics import arrays


@pytest.fixture(autouse=True, scope="session")
def _one_blas_thread():
    with arrays.one_blas_thread():
        yield
