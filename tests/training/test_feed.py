"""The feed: batches in order on the devices, with the state of the one in hand."""

from __future__ import annotations

import threading
import time

import jax
import numpy as np
import pytest

from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.training import feed


class Loader:
    """Batch k is full of k; the state is how many were given."""

    def __init__(self, stop_after=None, error=None, delay=0.0):
        self.count, self.stop_after, self.error, self.delay = 0, stop_after, error, delay
        self.closed_by = None

    def __next__(self):
        if self.count == self.stop_after:
            raise self.error
        time.sleep(self.delay)
        self.count += 1
        return {"x": np.full((8, 2), self.count - 1, np.float32)}

    def get_state(self):
        return {"count": self.count}

    def close(self):
        self.closed_by = threading.current_thread()


def _feed(loader, make_batch=lambda batch: batch):
    return feed.Feed(loader, make_batch, mesh_lib.batch_sharding(mesh_lib.make()))


def _feed_threads():
    return [thread for thread in threading.enumerate() if thread.name == "feed"]


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_the_state_is_that_of_the_batch_in_hand(ahead, monkeypatch):
    monkeypatch.setattr(feed, "_AHEAD", ahead)
    loader = Loader()
    with _feed(loader) as batches:
        assert batches.state == {"count": 0}
        for k in range(10):
            np.testing.assert_array_equal(next(batches)["x"], np.full((8, 2), k))
            time.sleep(0.01)  # Time to read ahead.
            assert batches.state == {"count": k + 1}
            assert loader.count <= k + 1 + ahead


def test_batches_lie_over_all_devices_before_they_are_asked_for():
    loader = Loader()
    with _feed(loader) as batches:
        deadline = time.monotonic() + 10
        while loader.count < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        with jax.transfer_guard("disallow"):
            x = next(batches)["x"]
        assert loader.count >= 2
        assert {shard.device for shard in x.addressable_shards} == set(jax.devices())


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, StopIteration])
def test_errors_are_raised_in_their_turn_and_stay(kind):
    with _feed(Loader(3, kind("broken"))) as batches:
        for _ in range(3):
            next(batches)
        for _ in range(2):
            with pytest.raises(kind, match="broken"):
                next(batches)


def test_an_error_of_make_batch_is_raised():
    def broken(batch):
        raise KeyError("mean")

    with _feed(Loader(), broken) as batches, pytest.raises(KeyError, match="mean"):
        next(batches)


def test_closing_ends_the_thread_then_the_loader():
    before = len(_feed_threads())
    loader = Loader(delay=0.01)
    with _feed(loader) as batches:
        next(batches)
        assert len(_feed_threads()) == before + 1
    assert len(_feed_threads()) == before
    assert loader.closed_by is threading.current_thread()
    given = loader.count
    time.sleep(0.05)
    assert loader.count == given


def test_waiting_is_what_the_loader_is_slower_than_its_user():
    def waited(batches):
        started = time.perf_counter()
        next(batches)
        return time.perf_counter() - started

    with _feed(Loader(delay=0.05)) as batches:
        assert 0.2 < sum(waited(batches) for _ in range(6)) < 1.0
    with _feed(Loader()) as batches:
        next(batches)
        seconds = []
        for _ in range(6):
            time.sleep(0.05)
            seconds.append(waited(batches))
        assert sum(seconds) < 0.1
