"""KID and CMMD against peers and against the plain formula."""

import numpy as np
import pytest
import scipy.spatial

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import bootstrap, kernel
from tests.metrics import peers
from tests.metrics.peers import features

NEEDS = "compares with peers: pip install -e '.[parity]'"
D = 24


def _plain_mmd2(x, y):
    """Unbiased squared MMD under the polynomial kernel, as one writes it."""
    def k(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, m = len(x), len(y)
    xx, yy = k(x, x), k(y, y)
    own = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return own - 2 * k(x, y).mean()


# All pairs at once where subsets cover the sets many times over, subset by subset otherwise.
@pytest.mark.parametrize(
    "n,m,subsets,size", [(150, 170, 30, 100), (400, 300, 3, 40), (64, 64, 5, 64)]
)
def test_kid_equals_torch_fidelity(n, m, subsets, size):
    torch = pytest.importorskip("torch", reason=NEEDS)
    x, y = features(1, n, D), features(2, m, D, 0.4, 0.1)
    peer = peers.torch_fidelity("metric_kid.py")
    options = {"kid_subsets": subsets, "kid_subset_size": size, "verbose": False}

    def theirs(dtype):
        sets = (torch.from_numpy(v.astype(dtype)) for v in (x, y))
        out = peer.kid_features_to_metric(*sets, **options)
        return out[peer.KEY_METRIC_KID_MEAN], out[peer.KEY_METRIC_KID_STD]

    ours = kernel.kid(x, y, subsets=subsets, subset_size=size)
    assert (ours.value, ours.std) == pytest.approx(theirs(np.float64), rel=1e-9, abs=1e-14)
    # As it runs, on float32 features.
    assert ours.value == pytest.approx(theirs(np.float32)[0], abs=1e-6)
    shifted = kernel.kid(x, y, subsets=subsets, subset_size=size, seed=1)
    options["rng_seed"] = 1
    assert shifted.value == pytest.approx(theirs(np.float64)[0], rel=1e-9)


def test_kid_equals_clean_fid_and_torchmetrics():
    torch = pytest.importorskip("torch", reason=NEEDS)
    x, y = features(3, 90, D), features(4, 80, D, 0.4, 0.1)
    # clean-fid draws from numpy's global state, its second set first; it clamps to all there are.
    np.random.seed(2020)
    theirs = peers.clean_fid().kernel_distance(y, x, num_subsets=20)
    ours = kernel.kid(x, y, subsets=20)
    assert ours.subset_size == 80
    assert ours.value == pytest.approx(theirs, rel=1e-9)
    tensors = [torch.from_numpy(v) for v in (x[:80], y)]
    theirs = float(peers.torchmetrics("image/kid.py").poly_mmd(*tensors))
    whole = kernel.kid(x[:80], y, subsets=1)
    assert whole.value == pytest.approx(theirs, rel=1e-9)
    assert whole.std == 0


def test_kid_replicates_are_the_kid_of_the_images_they_count(monkeypatch):
    monkeypatch.setattr(kernel, "_TILE", 7)
    x, y = features(5, 31, D), features(6, 40, D, 0.4, 0.1)
    counts_RN = np.random.default_rng(0).integers(0, 4, (6, 31))
    # One subset of everything leaves nothing to the drawing, so no noise is added.
    drawn_R = kernel.kid_replicates(x[:, :], y, counts_RN, subsets=1, subset_size=31)
    noise = kernel.kid(x, y, subsets=1, subset_size=31).std
    assert noise == 0
    direct_R = [_plain_mmd2(np.repeat(x, counts_N, axis=0), y) for counts_N in counts_RN]
    np.testing.assert_allclose(drawn_R, direct_R, rtol=1e-10)


def cmmd(x, y):
    return kernel.cmmd_replicates(x, y, np.ones((1, len(x))))[0]


def test_cmmd_equals_the_biased_gaussian_mmd(monkeypatch):
    monkeypatch.setattr(kernel, "_TILE", 16)
    x, y = features(7, 50, D), features(8, 45, D, 0.4, 0.1)
    xu, yu = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))

    def k(a, b):
        return np.exp(-scipy.spatial.distance.cdist(a, b, "sqeuclidean") / 200)

    exact = 1000 * (k(xu, xu).mean() + k(yu, yu).mean() - 2 * k(xu, yu).mean())
    assert cmmd(x, y) == pytest.approx(exact, rel=1e-9)
    assert cmmd(3 * x, y) == pytest.approx(exact, rel=1e-9)
    counts_RN = bootstrap.resample_counts(50, 3, 0)
    direct_R = [cmmd(x[c > 0], y) for c in counts_RN]
    np.testing.assert_allclose(kernel.cmmd_replicates(x, y, counts_RN), direct_R, rtol=1e-9)


def test_cmmd_equals_torch_fidelitys_kernel():
    peer = peers.torch_fidelity("metric_kid.py")
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in
            (features(9, 40, D), features(10, 40, D, 0.4, 0.1)))
    kernels = [peer.kernel_rbf(a, b, kid_kernel_rbf_sigma=10) for a, b in [(x, x), (x, y), (y, y)]]
    theirs = 1000 * peer.mmd2(*kernels, mmd_est="biased")
    assert cmmd(x, y) == pytest.approx(theirs, rel=1e-9)


def test_a_gaussian_cloud_moved_has_its_closed_form():
    # x ~ N(a, s^2 I), y ~ N(b, s^2 I) on the kernel (x.y/d + 1)^3 in d = 1:
    # E k = sum over the binomial of E x^j E y^j, with moments 1, a, a^2 + s^2, a^3 + 3 a s^2.
    a, b, s, n = 0.2, 0.5, 0.3, 20_000
    def moments(mean):
        return np.array([1, mean, mean**2 + s**2, mean**3 + 3 * mean * s**2])

    difference = moments(a) - moments(b)
    exact = (np.array([1, 3, 3, 1]) * difference**2).sum()
    rng = np.random.default_rng(0)
    x, y = (rng.normal(m, s, (n, 1)) for m in (a, b))
    score = kernel.kid(x, y, subsets=20, subset_size=1000)
    assert score.value == pytest.approx(exact, abs=4 * score.std / np.sqrt(20))
    assert score.std / np.sqrt(20) < 0.1 * exact


def test_identical_and_constant_sets():
    x = features(11, 60, D)
    assert cmmd(x, x[::-1]) == pytest.approx(0, abs=1e-12)
    assert abs(kernel.kid(x, x).value) < 0.1  # Unbiased: 0 in expectation only, negative here.
    assert kernel.kid(x, x).value < 0
    still = np.full((60, D), 0.7)
    assert kernel.kid(still, still).value == pytest.approx(0, abs=1e-12)
    assert cmmd(still, still) == pytest.approx(0, abs=1e-12)


def test_mistakes_say_what_is_wrong():
    x = features(12, 30, D)
    with pytest.raises(UserError, match="subsets of 31 .* at most 30"):
        kernel.kid(x, x, subset_size=31)
    with pytest.raises(UserError, match="at least 2 images; there are 1 generated and 30"):
        kernel.kid(x[:1], x)
    with pytest.raises(UserError, match="at least 1 subset"):
        kernel.kid(x, x, subsets=0)
    with pytest.raises(UserError, match="width 24 .* width 3"):
        kernel.kid(x, x[:, :3])
    with pytest.raises(UserError, match="row of zeros, row 2"):
        cmmd(x, np.eye(D)[[0, 1]].repeat(2, 0) * [[1], [1], [0], [1]])
    with pytest.raises(UserError, match="0 generated and 30 real"):
        cmmd(x[:0], x)
    with pytest.raises(UserError, match="not finite"):
        kernel.kid(np.full((4, D), np.nan), x)
