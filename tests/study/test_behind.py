"""What runs behind the sampler: everything is written once, whole, and errors come forward."""

import threading

import numpy as np
import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.sampling.lanes import Finished
from ldm_scaling.study.behind import Behind

N, CONFIGURATIONS = 13, 4


def pieces(seed):
    """Samples of all configurations in a random order, in pieces of random size."""
    rng = np.random.default_rng(seed)
    every = rng.permutation(N * CONFIGURATIONS)
    for some in np.split(every, np.sort(rng.integers(0, len(every), 9))):
        i, n = np.divmod(some, N)
        latents = np.broadcast_to((100 * i + n)[:, None, None, None], (len(some), 2, 2, 3))
        yield Finished(i, n, latents.astype(np.float32), len(some), True)


def decode(latents_JHWC, configuration_J, places_J):
    assert len(latents_JHWC) == len(configuration_J)
    np.testing.assert_array_equal(latents_JHWC[:, 0, 0, 0] // 100, configuration_J)
    return (latents_JHWC % 100).astype(np.uint8)


def features(images, places):
    return np.repeat(images[:, 0, 0, :1].astype(np.float32), 5, axis=1)


@pytest.mark.parametrize("seed", range(3))
def test_every_configuration_is_written_whole_and_once(seed):
    written = {}

    def write(i, images, features_ND):
        assert i not in written and threading.current_thread().name == "behind"
        written[i] = images, features_ND

    with Behind(decode, features, write, N, batch_size=8, keep=3) as behind:
        for some in pieces(seed):
            behind.put(some)
    assert sorted(written) == list(range(CONFIGURATIONS))
    for images, features_ND in written.values():
        np.testing.assert_array_equal(features_ND, np.tile(np.arange(N)[:, None], (1, 5)))
        np.testing.assert_array_equal(images[:, 0, 0, 0], np.arange(3))


def test_an_error_stops_the_sampler():
    def broken(images, places):
        raise UserError("features are broken")

    with pytest.raises(UserError, match="features are broken"):
        with Behind(decode, broken, print, N, batch_size=8, keep=3) as behind:
            while True:  # a sampler without end
                for some in pieces(0):
                    behind.put(some)


def test_an_error_at_the_very_end_is_raised_too():
    def write(*_):
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="the disk is full"):
        with Behind(decode, features, write, N, batch_size=N * CONFIGURATIONS, keep=3) as behind:
            for some in pieces(0):
                behind.put(some)


def test_a_stopped_sampler_writes_no_more():
    written = []
    with pytest.raises(KeyboardInterrupt):
        with Behind(decode, features, lambda i, *_: written.append(i), N, 64, keep=3) as behind:
            for some in pieces(0):
                behind.put(some)
            raise KeyboardInterrupt
    assert not written  # all waited in the pool
    assert "behind" not in {t.name for t in threading.enumerate()}
