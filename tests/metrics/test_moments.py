"""Moments are a monoid, agree with numpy, survive offsets and files."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import arrays, moments
from ldm_scaling.metrics.moments import Moments, merge


def _assert_same(a: Moments, b: Moments, scale: float = 1.0):
    assert a.n == b.n
    np.testing.assert_allclose(a.mean_D, b.mean_D, rtol=1e-10, atol=1e-10 * scale)
    np.testing.assert_allclose(a.M2_DD, b.M2_DD, rtol=1e-10, atol=1e-10 * scale**2 * max(a.n, 1))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 60),
    d=st.integers(1, 7),
    offset=st.sampled_from([0.0, 1.0, -100.0]),
    data=st.data(),
)
def test_any_split_merged_in_any_order_is_the_whole(seed, n, d, offset, data):
    rng = np.random.default_rng(seed)
    features_ND = rng.normal(size=(n, d)) + offset
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=5)))  # Empty shards too.
    shards = [Moments.of(part) for part in np.split(features_ND, cuts)]
    shards = data.draw(st.permutations(shards))
    while len(shards) > 1:  # A random bracketing, not only a left fold.
        at = data.draw(st.integers(0, len(shards) - 2))
        shards[at : at + 2] = [merge(shards[at], shards[at + 1])]
    _assert_same(shards[0], Moments.of(features_ND), scale=1 + abs(offset))


def test_zero_is_neutral_on_both_sides_to_the_bit():
    m = Moments.of(np.random.default_rng(0).normal(size=(9, 4)))
    for merged in (merge(Moments.zero(4), m), merge(m, Moments.zero(4))):
        assert merged.n == m.n
        np.testing.assert_array_equal(merged.mean_D, m.mean_D)
        np.testing.assert_array_equal(merged.M2_DD, m.M2_DD)
    assert Moments.of(np.zeros((0, 4))).n == 0


def test_covariance_is_numpys():
    features_ND = np.random.default_rng(1).normal(size=(50, 6)) @ np.diag([1, 2, 3, 4, 5, 6.0])
    m = merge(Moments.of(features_ND[:13]), Moments.of(features_ND[13:]))
    np.testing.assert_allclose(m.covariance(), np.cov(features_ND.T), rtol=1e-12, atol=1e-12)


def test_small_variances_far_from_zero_survive():
    # Raw float32 second moments lose these: the variance is 1e-6 of the squared mean.
    rng = np.random.default_rng(2)
    features_ND = (100 + 0.1 * rng.normal(size=(4000, 3))).astype(np.float32)
    m = Moments.zero(3)
    for part in np.split(features_ND, 40):
        m = merge(m, Moments.of(part))
    exact = np.cov(features_ND.astype(np.longdouble).T.astype(np.float64) - 100.0)
    np.testing.assert_allclose(m.covariance(), exact, rtol=1e-9, atol=1e-13)


def test_values_cannot_be_written_to():
    m = Moments.zero(2)
    with pytest.raises(ValueError):
        m.mean_D[0] = 1.0
    with pytest.raises(AttributeError):
        m.n = 3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_features_are_named(bad):
    features_ND = np.zeros((8, 3))
    features_ND[5, 1] = bad
    with pytest.raises(UserError, match="1 of 8 rows, the first is row 5"):
        Moments.of(features_ND)


def test_mistakes_say_what_is_wrong():
    with pytest.raises(UserError, match="at least 2 images, there is 1"):
        Moments.of(np.ones((1, 3))).covariance()
    with pytest.raises(UserError, match="width 3 and 4"):
        merge(Moments.zero(3), Moments.zero(4))
    with pytest.raises(UserError, match=r"\(3,\)"):
        Moments.of(np.ones(3))
    with pytest.raises(UserError, match="scatter"):
        Moments(2, np.zeros(3), np.zeros((2, 2)))
    with pytest.raises(UserError, match="not finite"):
        Moments(2, np.full(2, np.nan), np.zeros((2, 2)))


def test_a_file_gives_back_every_bit(tmp_path):
    m = Moments.of(np.random.default_rng(3).normal(size=(11, 5)))
    moments.save(tmp_path / "a" / "m.npz", m, extractor="abc")
    back = moments.load(tmp_path / "a" / "m.npz", extractor="abc")
    assert back.n == m.n and back.hash == m.hash
    np.testing.assert_array_equal(back.mean_D, m.mean_D)
    np.testing.assert_array_equal(back.M2_DD, m.M2_DD)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["m.npz"]
    assert m.hash != Moments(m.n + 1, m.mean_D, m.M2_DD).hash


def test_another_networks_moments_are_refused(tmp_path):
    moments.save(tmp_path / "m.npz", Moments.zero(2), extractor="abc")
    with pytest.raises(UserError, match="network abc, this run uses def"):
        moments.load(tmp_path / "m.npz", extractor="def")
    with pytest.raises(UserError, match="m2.npz"):
        moments.load(tmp_path / "m2.npz", extractor="def")


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "m.npz"
    moments.save(path, Moments.of(np.random.default_rng(4).normal(size=(7, 4))), extractor="abc")
    whole = path.read_bytes()
    rng = np.random.default_rng(5)
    for case in range(200):
        damaged = bytearray(whole)
        if case < 50:
            damaged = damaged[: rng.integers(len(whole))]
        else:
            damaged[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged))
        with pytest.raises(UserError, match="m.npz .* is damaged"):
            moments.load(path, extractor="abc")


def test_a_file_of_another_kind_is_refused_and_numpy_reads_ours(tmp_path):
    arrays.save(tmp_path / "m.npz", "something else", {"a": np.arange(3)}, {})
    with pytest.raises(UserError, match="holds something else"):
        moments.load(tmp_path / "m.npz", extractor="abc")
    with np.load(tmp_path / "m.npz") as archive:
        np.testing.assert_array_equal(archive["a"], np.arange(3))
