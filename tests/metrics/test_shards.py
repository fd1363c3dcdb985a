"""Features in shards: any order, any split, any host, and a run that was stopped."""

import numpy as np
import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import kernel, shards
from ldm_scaling.metrics.inception_score import inception_score
from ldm_scaling.metrics.moments import Moments, merge
from tests.metrics.peers import features

N, D = 101, 12
X = features(0, N, D)


def _write(folder, seed, parts):
    rng = np.random.default_rng(seed)
    for part in np.array_split(rng.permutation(N), parts):
        shards.write(folder, part, X[part], "net")


@pytest.mark.parametrize("parts", [1, 4, 40])
def test_any_split_in_any_order_is_the_same_set(tmp_path, parts):
    _write(tmp_path, parts, parts)
    merged = shards.merge(tmp_path, "net", N)
    np.testing.assert_array_equal(merged, X)
    np.testing.assert_array_equal(shards.done(tmp_path, "net"), np.arange(N))
    # So what is made of them is the same, to the last digit.
    y = features(1, 90, D)
    assert kernel.kid(merged, y) == kernel.kid(X, y)
    assert inception_score(merged) == inception_score(X)


@pytest.mark.parametrize("seed", range(3))
def test_moments_of_any_split_merge_to_the_same(seed):
    rng = np.random.default_rng(seed)
    # Far from the origin and of little spread, where raw sums would lose all.
    x = 1e3 + 1e-2 * X
    total = Moments.zero(D)
    for part in np.array_split(rng.permutation(N), rng.integers(2, 30)):
        total = merge(total, Moments.of(x[part])) if rng.random() < 0.5 else merge(
            Moments.of(x[part]), total)
    whole = Moments.of(x)
    assert total.n == N
    np.testing.assert_allclose(total.mean_D, whole.mean_D, rtol=1e-12)
    np.testing.assert_allclose(
        total.M2_DD, whole.M2_DD, rtol=1e-10, atol=1e-10 * np.diag(whole.M2_DD).max()
    )


def test_a_stopped_run_goes_on(tmp_path):
    assert len(shards.done(tmp_path / "none", "net")) == 0
    shards.write(tmp_path, np.arange(40), X[:40], "net")
    # Killed while writing: the temporary file is there, and whatever else; nothing reads it.
    (tmp_path / ".tmp-12345678-features-000000040-abc.npz").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    left = np.setdiff1d(np.arange(N), shards.done(tmp_path, "net"))
    np.testing.assert_array_equal(left, np.arange(40, N))
    with pytest.raises(UserError, match="lacks features of 61 of 101 images, the first is 40"):
        shards.merge(tmp_path, "net", N)
    shards.write(tmp_path, left, X[left].astype(np.float64), "net")
    # A shard that another host did as well does no harm, rounded otherwise or not.
    shards.write(tmp_path, np.arange(30, 50), X[30:50] * (1 + 1e-6), "net")
    np.testing.assert_allclose(shards.merge(tmp_path, "net", N), X, rtol=1e-5)


def test_float32_stays_float32(tmp_path):
    shards.write(tmp_path, np.arange(N), X.astype(np.float32), "net")
    assert shards.merge(tmp_path, "net", N).dtype == np.float32


def test_mistakes_say_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="twice"):
        shards.write(tmp_path, np.array([1, 1]), X[:2], "net")
    with pytest.raises(UserError, match="as many image indices"):
        shards.write(tmp_path, np.arange(3), X[:2], "net")
    with pytest.raises(UserError, match="as many image indices"):
        shards.write(tmp_path, np.array([-1, 0]), X[:2], "net")
    with pytest.raises(UserError, match="not finite"):
        shards.write(tmp_path, np.arange(2), X[:2] * np.nan, "net")
    with pytest.raises(UserError, match="lacks features of 5 of 5"):
        shards.merge(tmp_path, "net", 5)
    path = shards.write(tmp_path, np.arange(10), X[:10], "net")
    with pytest.raises(UserError, match="feature network net, this run uses other"):
        shards.done(tmp_path, "other")
    with pytest.raises(UserError, match="image 9 of 5"):
        shards.merge(tmp_path, "net", 5)
    wrong = shards.write(tmp_path, np.arange(9, 12), X[:3], "net")
    with pytest.raises(UserError, match="different features of the same image"):
        shards.merge(tmp_path, "net", 12)
    wrong.unlink()
    wrong = shards.write(tmp_path, np.arange(10, 12), X[:2, :4], "net")
    with pytest.raises(UserError, match="width 4"):
        shards.merge(tmp_path, "net", 12)
    wrong.unlink()
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="damaged"):
        shards.merge(tmp_path, "net", 10)
