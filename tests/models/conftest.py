"""What comparisons with networks of torch share."""

import pytest

PARITY = "the peer is missing: pip install -e '.[parity]'"


@pytest.fixture(scope="module")
def torch():
    """torch in one thread."""
    torch = pytest.importorskip("torch", reason=PARITY)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(threads)
