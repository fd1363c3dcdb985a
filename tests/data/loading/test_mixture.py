"""Mixtures: shares that hold from the first example on, sources with epochs of their own."""

from __future__ import annotations

import math

import grain
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from ldm_scaling import errors
from ldm_scaling.data.loading import loader, mixture, order


class Source:
    """Example i of source s is the number 1000 s + i."""

    def __init__(self, number: int, count: int, sizes=(), bucket_N=None):
        self._number, self._count = number, count
        self.sizes, self.bucket_N = sizes, bucket_N

    def __len__(self):
        return self._count

    def batch(self, indices, keys=None):
        indices = np.asarray(indices)
        bucket = () if self.bucket_N is None else self.bucket_N[indices]
        assert len(set(bucket)) <= 1
        return {
            "x": 1000 * self._number + indices,
            "name": np.asarray([f"{self._number}:{'i' * i}" for i in indices]),
            "image": np.full((len(indices), 2, 2), self._number, np.uint8),
        }


def stream(mixed: mixture.Mixture, size: int, number: int, seed=0, **kwargs) -> np.ndarray:
    with loader.train_loader(mixed, size, seed, **kwargs) as iterator:
        return np.concatenate([next(iterator)["x"] for _ in range(number)])


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
    weights=st.lists(st.integers(1, 10**9), min_size=1, max_size=7),
    start=st.integers(0, 10**12),
)  # fmt: skip
def test_each_takes_its_turns(weights, start):
    """Ranks count up by one, and counts stay as near to their shares as is promised."""
    weights = sorted(weights, reverse=True)
    m, total = len(weights), sum(weights)
    bound = (1 + sum(1 / j for j in range(1, m))) / 2
    for begin in (0, start):
        counts = {}
        for position in range(begin, begin + 200):
            which, rank = order.turn(position, weights)
            assert rank == counts.get(which, rank)
            counts[which] = rank + 1
            assert abs(counts[which] - (position + 1) * weights[which] / total) <= bound + 1e-6
        if begin == 0:
            assert sum(counts.values()) == 200
    if m == 2:
        assert bound == 1


def test_two_sources_are_within_one_of_their_shares_where_grains_mix_is_not():
    weights = (1.0, math.pi)
    theirs = grain.MapDataset.mix(
        [grain.MapDataset.source([i]).repeat() for i in range(2)], weights
    )
    n = 100_000
    share = weights[1] / sum(weights)
    mixed = mixture.Mixture([Source(0, 50), Source(1, 70)], weights)
    ours = np.cumsum(stream(mixed, 1000, n // 1000) >= 1000)
    errors_N = ours - np.arange(1, n + 1) * share
    assert np.abs(errors_N).max() <= 1
    grains = sum(theirs[i] for i in range(0, n))
    assert abs(grains - n * share) > 5


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_each_source_has_epochs_of_its_own_whatever_the_hosts(hosts):
    mixed = mixture.Mixture([Source(0, 50), Source(1, 7), Source(2, 20)], [0.7, 0.1, 0.2])
    parts = [
        stream(mixed, 8, 60, threads=1, process_index=h, process_count=hosts).reshape(60, -1)
        for h in range(hosts)
    ]
    x = np.concatenate(parts, axis=1).ravel()
    assert x.tolist() == stream(mixed, 8, 60).tolist()
    for number, count, share in ((0, 50, 0.7), (1, 7, 0.1), (2, 20, 0.2)):
        own = x[x // 1000 == number] % 1000
        assert abs(len(own) - 480 * share) < 1.5
        for start in range(0, len(own) - count + 1, count):
            assert sorted(own[start : start + count]) == list(range(count))


def test_what_belongs_together_stays_together():
    mixed = mixture.Mixture([Source(0, 5), Source(1, 12)], [1, 2])
    with loader.train_loader(mixed, 6, 0) as iterator:
        for _ in range(10):
            batch = next(iterator)
            for x, name, image in zip(batch["x"], batch["name"], batch["image"]):
                assert name == f"{x // 1000}:{'i' * (x % 1000)}"
                assert (image == x // 1000).all()


def test_buckets_of_mixed_sources_fill_batches_together():
    sizes = ((2, 1), (1, 2))
    rng = np.random.default_rng(0)
    sources = [Source(s, n, sizes, rng.integers(0, 2, n)) for s, n in ((0, 40), (1, 15))]
    with loader.train_loader(mixture.Mixture(sources, [1, 1]), 8, 0) as iterator:
        x = np.concatenate([next(iterator)["x"] for _ in range(150)])
    for s, source in enumerate(sources):
        own = x[x // 1000 == s] % 1000
        assert abs(len(own) - 600) < 10
        for bucket in range(2):
            of = own[source.bucket_N[own] == bucket]
            members = np.flatnonzero(source.bucket_N == bucket).tolist()
            for start in range(0, len(of) - len(members) + 1, len(members)):
                assert sorted(of[start : start + len(members)]) == members


def test_two_sources_of_one_length_have_orders_of_their_own():
    x = stream(mixture.Mixture([Source(0, 60), Source(1, 60)], [1, 1]), 12, 10)
    first, second = (x[x // 1000 == s] % 1000 for s in range(2))
    assert (first == second).mean() < 0.2


@pytest.mark.parametrize(
    ("numbers", "weights", "message"),
    [((1, 2), (1,), "2 sources with 1 weights"), ((), (), "0 sources"),
     ((1, 2), (1, 0), "must be above 0"), ((1,), (-1,), "above 0"),
     ((1,), (math.nan,), "above 0"), ((1,), (math.inf,), "above 0")],
)  # fmt: skip
def test_impossible_weights_are_refused(numbers, weights, message):
    with pytest.raises(errors.UserError, match=message):
        mixture.Mixture([Source(n, 5) for n in numbers], weights)


def test_sources_of_different_arrays_and_empty_ones_are_refused():
    class Other(Source):
        def batch(self, indices, keys=None):
            return {**super().batch(indices, keys), "image": np.zeros((len(indices), 3, 2))}

    with loader.train_loader(mixture.Mixture([Source(0, 5), Other(1, 5)], [1, 1]), 4, 0) as it:
        with pytest.raises(errors.UserError, match="different arrays"):
            next(it)
    with pytest.raises(errors.UserError, match="0 examples"):
        loader.train_loader(mixture.Mixture([Source(0, 5), Source(1, 0)], [1, 1]), 4, 0)
