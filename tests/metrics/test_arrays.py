"""Decompositions run in one thread, whatever the process has set."""

import numpy as np
import scipy
import threadpoolctl

from ldm_scaling.metrics import arrays


def _threads():
    """Of numpy's and SciPy's libraries: OpenCV, if a test has imported it, has one of its own."""
    return {
        i["num_threads"] for i in threadpoolctl.threadpool_info()
        if i["user_api"] == "blas" and "opencv" not in i["filepath"]
    }


def test_one_blas_thread_holds_inside_and_gives_back_outside():
    assert np.eye(2).sum() == 2  # numpy's library is loaded.
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        before = _threads()
        with arrays.one_blas_thread():
            assert scipy.linalg.det(np.eye(2)) == 1  # SciPy has one of its own.
            assert _threads() == {1}
        assert _threads() == before
