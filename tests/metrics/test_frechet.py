"""The Fréchet distance against closed forms, named peers and its own invariances."""

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from ldm_scaling.errors import UserError
from ldm_scaling.metrics.frechet import (
    ReferenceStats,
    frechet_distance,
    frechet_from_features,
    frechet_from_moments,
)
from ldm_scaling.metrics.moments import Moments
from tests.metrics import peers
from tests.metrics.peers import features as _features


def _of_covariance(mean_D, covariance_DD, n=1000):
    return Moments(n, mean_D, covariance_DD * (n - 1))


def test_commuting_gaussians_have_the_closed_form():
    rng = np.random.default_rng(0)
    q = scipy.stats.ortho_group.rvs(12, random_state=rng)
    s1, s2 = rng.uniform(0.1, 3, 12), rng.uniform(0.1, 3, 12)
    m1, m2 = rng.normal(size=12), rng.normal(size=12)
    a, b = _of_covariance(m1, (q * s1**2) @ q.T), _of_covariance(m2, (q * s2**2) @ q.T)
    exact = np.sum((m1 - m2) ** 2) + np.sum((s1 - s2) ** 2)
    assert frechet_distance(a, b) == pytest.approx(exact, rel=1e-12)


def test_two_dimensions_have_the_closed_form():
    # tr (C1 C2)^{1/2} = sqrt(tr C1 C2 + 2 sqrt(det C1 C2)) for 2 x 2, commuting or not.
    c1, c2 = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[0.5, -0.3], [-0.3, 1.5]])
    root = np.sqrt(np.trace(c1 @ c2) + 2 * np.sqrt(np.linalg.det(c1 @ c2)))
    value = frechet_distance(_of_covariance(np.zeros(2), c1), _of_covariance(np.zeros(2), c2))
    assert value == pytest.approx(np.trace(c1) + np.trace(c2) - 2 * root, rel=1e-12)


@pytest.mark.parametrize("d", [1, 5, 64])
def test_equals_scipys_sqrtm_form_where_that_is_well_conditioned(d):
    x, y = _features(1, 10 * d + 10, d), _features(2, 12 * d + 10, d, 0.4, 0.1)
    c1, c2 = np.atleast_2d(np.cov(x.T)), np.atleast_2d(np.cov(y.T))
    root = scipy.linalg.sqrtm(c1 @ c2)
    peer = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(c1 + c2 - 2 * root.real)
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(peer, rel=1e-9)


@pytest.mark.parametrize("n", [400, 60])
def test_equals_the_peers(n):
    # Needs pip install -e '.[parity]'; see peers.py.
    x, y = _features(3, n, 96), _features(4, 500, 96, 0.4, 0.1)
    (m1, c1), (m2, c2) = ((v.mean(axis=0), np.cov(v, rowvar=False)) for v in (x, y))
    fidelity = peers.torch_fidelity("metric_fid.py")
    theirs = fidelity.fid_statistics_to_metric(
        {"mu": m1, "sigma": c1}, {"mu": m2, "sigma": c2}, False
    )[fidelity.KEY_METRIC_FID]
    ours = frechet_distance(Moments.of(x), Moments.of(y))
    # With n < d the product is singular, and the square roots of its near-null eigenvalues, which
    # the peers take, are off by some 1e-8 each.
    close = pytest.approx(ours, rel=1e-9 if n > 96 else 1e-5)
    assert theirs == close
    assert peers.clean_fid().frechet_distance(m1, c1, m2, c2) == close
    torch = pytest.importorskip("torch")
    compute = peers.torchmetrics("image/fid.py")._compute_fid
    assert float(compute(*map(torch.from_numpy, (m1, c1, m2, c2)))) == close


def test_more_digits_than_the_peers_where_the_truth_is_known():
    # Commuting covariances over eight orders of magnitude: tr (C1 C2)^{1/2} = sum of roots, which
    # in float64 is the truth up to the rounding of the covariances themselves.
    d = 256
    q = scipy.stats.ortho_group.rvs(d, random_state=np.random.default_rng(20))
    s1, s2 = np.logspace(0, -8, d), np.logspace(0, -7, d)
    c1, c2 = (q * s1) @ q.T, (q * s2) @ q.T
    exact = np.sum((np.sqrt(s1) - np.sqrt(s2)) ** 2)
    a, b = (_of_covariance(np.zeros(d), (c + c.T) / 2) for c in (c1, c2))
    ours = abs(frechet_distance(a, b) - exact)
    peer = np.sqrt(np.linalg.eigvals(c1 @ c2).astype(complex)).real.sum()
    assert ours < 1e-12 * np.sum(s1 + s2)
    assert ours <= abs(np.sum(s1 + s2) - 2 * peer - exact)


def test_statistics_stored_in_float32_still_have_a_root():
    # Rounded to float32 a covariance has negative eigenvalues, which Cholesky cannot bear.
    x, y = _features(21, 4000, 64, 2.5), _features(22, 4000, 64, 2.0)
    a, b = Moments.of(x), Moments.of(y)
    rough = _of_covariance(a.mean_D, a.covariance().astype(np.float32).astype(np.float64))
    assert np.linalg.eigvalsh(rough.covariance())[0] < -1e-9
    value = frechet_distance(a, b)
    assert frechet_distance(rough, b) == pytest.approx(value, rel=1e-4)
    assert frechet_distance(b, rough) == pytest.approx(value, rel=1e-4)


def _by_nuclear_norm(x, y):
    """The distance, and the trace of both covariances: ||C1^{1/2} C2^{1/2}||_* is
    ||X1 X2^T||_* / sqrt((n1 - 1)(n2 - 1)), for which no root is taken at all."""
    (xc, m), (yc, n) = ((of - of.mean(0), len(of) - 1) for of in (x, y))
    nuclear = scipy.linalg.svdvals(xc @ yc.T).sum() / np.sqrt(m * n)
    trace = (xc**2).sum() / m + (yc**2).sum() / n
    return np.sum((x.mean(0) - y.mean(0)) ** 2) + trace - 2 * nuclear, trace


def test_sets_of_few_directions_in_common():
    # Supports that hardly overlap: the product is singular in more directions than either side.
    rng = np.random.default_rng(23)
    x, y = np.zeros((400, 60)), np.zeros((500, 60))
    x[:, :35], y[:, 25:] = rng.normal(size=(400, 35)), rng.normal(size=(500, 35))
    exact, _ = _by_nuclear_norm(x, y)
    m = Moments.of(y)
    assert frechet_distance(Moments.of(x), m) == pytest.approx(exact, rel=1e-11)
    reference = ReferenceStats(m, "net")
    assert frechet_from_features(x, reference) == pytest.approx(exact, rel=1e-11)
    assert frechet_from_moments(Moments.of(x), reference) == pytest.approx(exact, rel=1e-11)


@pytest.mark.parametrize("n1,n2,d", [(150, 150, 256), (40, 1000, 128), (3, 5, 64), (2, 2, 3)])
def test_rank_deficient_sets_against_the_nuclear_norm_of_the_features(n1, n2, d):
    x, y = _features(5, n1, d), _features(6, n2, d, 0.3, 0.2)
    exact, trace = _by_nuclear_norm(x, y)
    reference = ReferenceStats(Moments.of(y), "net")
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(exact, abs=1e-10 * trace)
    assert frechet_from_features(x, reference) == pytest.approx(exact, abs=1e-10 * trace)


@pytest.mark.parametrize("n,d", [(128, 320), (500, 96), (97, 96), (2, 30), (50, 1)])
def test_the_fast_path_is_the_same_distance(n, d):
    x, y = _features(7, n, d), _features(8, 700, d, 0.4, 0.2)
    reference = ReferenceStats(Moments.of(y), "net")
    exact, _ = _by_nuclear_norm(x, y)
    assert frechet_from_features(x, reference) == pytest.approx(exact, rel=1e-10)
    assert frechet_from_moments(Moments.of(x), reference) == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize("few", [2, 40, 150])
def test_a_reference_of_few_images_against_many_features(few):
    # The product is the reference's rank wide, which is the smaller side of it here.
    x, y = _features(24, 180, 200), _features(25, few, 200, 0.4, 0.2)
    exact, trace = _by_nuclear_norm(x, y)
    reference = ReferenceStats(Moments.of(y), "net")
    assert frechet_from_features(x, reference) == pytest.approx(exact, abs=1e-10 * trace)
    assert frechet_from_moments(Moments.of(x), reference) == pytest.approx(exact, abs=1e-10 * trace)


@pytest.mark.parametrize("n,d", [(400, 64), (40, 64), (2, 64)])
def test_identical_sets_are_at_zero(n, d):
    x = _features(9, n, d)
    m = Moments.of(x)
    scale = np.trace(m.covariance())
    assert 0 <= frechet_distance(m, m) <= 1e-12 * scale
    assert 0 <= frechet_from_moments(m, ReferenceStats(m, "net")) <= 1e-12 * scale
    assert 0 <= frechet_from_features(x, ReferenceStats(m, "net")) <= 1e-12 * scale
    assert 0 <= frechet_from_features(x[::-1], ReferenceStats(m, "net")) <= 1e-12 * scale


def test_identical_images_are_a_point():
    # A collapsed model: no covariance, the distance is to the reference's mean and spread.
    y = _features(10, 200, 20)
    m = Moments.of(y)
    x = np.full((16, 20), 0.7)
    exact = np.sum((0.7 - m.mean_D) ** 2) + np.trace(m.covariance())
    assert frechet_from_features(x, ReferenceStats(m, "net")) == pytest.approx(exact, rel=1e-9)
    assert frechet_distance(Moments.of(x), m) == pytest.approx(exact, rel=1e-9)


def test_invariances():
    x, y = _features(11, 90, 40), _features(12, 110, 40, 0.3, 0.0)
    value = frechet_distance(Moments.of(x), Moments.of(y))
    assert value > 0.1
    assert frechet_distance(Moments.of(y), Moments.of(x)) == pytest.approx(value, rel=1e-9)
    q = scipy.stats.ortho_group.rvs(40, random_state=np.random.default_rng(13))
    moved = frechet_distance(Moments.of(x @ q + 3), Moments.of(y @ q + 3))
    assert moved == pytest.approx(value, rel=1e-9)
    scaled = frechet_distance(Moments.of(3 * x), Moments.of(3 * y))
    assert scaled == pytest.approx(9 * value, rel=1e-9)
    shift = np.linspace(-1, 1, 40)
    translated = frechet_distance(Moments.of(x), Moments.of(x + shift))
    assert translated == pytest.approx(shift @ shift, rel=1e-9)


def test_the_square_root_of_the_distance_obeys_the_triangle_inequality():
    a, b, c = (np.sqrt(frechet_distance(Moments.of(x), Moments.of(y))) for x, y in [
        (_features(14, 90, 20), _features(15, 90, 20, 0.2, 0.0)),
        (_features(15, 90, 20, 0.2, 0.0), _features(16, 90, 20, 1.0, -0.2)),
        (_features(14, 90, 20), _features(16, 90, 20, 1.0, -0.2)),
    ])
    assert c <= a + b and a <= b + c and b <= a + c


def test_mistakes_say_what_is_wrong():
    reference = ReferenceStats(Moments.of(_features(17, 30, 5)), "net")
    one = np.zeros((1, 5))
    with pytest.raises(UserError, match="at least 2 images, there is 1"):
        frechet_from_features(one, reference)
    with pytest.raises(UserError, match="at least 2 images, there is 1"):
        frechet_distance(Moments.of(one), reference.moments)
    with pytest.raises(UserError, match="at least 2 images, there is 1"):
        ReferenceStats(Moments.of(one), "net")
    with pytest.raises(UserError, match="width 4"):
        frechet_from_features(np.zeros((9, 4)), reference)
    with pytest.raises(UserError, match="width 4"):
        frechet_distance(Moments.zero(4), reference.moments)
    with pytest.raises(UserError, match="not finite"):
        frechet_from_features(np.full((9, 5), np.nan), reference)
    features_ND = np.zeros((9, 5))
    for sides in ((features_ND, reference.moments), (reference.moments, features_ND)):
        with pytest.raises(UserError, match=r"a Moments, not a ndarray: moments.Moments.of\("):
            frechet_distance(*sides)
    with pytest.raises(UserError, match="a Moments, not a ndarray"):
        frechet_from_moments(features_ND, reference)
    with pytest.raises(UserError, match="a ReferenceStats, not a Moments"):
        frechet_from_moments(reference.moments, reference.moments)
    for moments in (features_ND, reference.moments):
        with pytest.raises(UserError, match=r"a ReferenceStats, not .*ReferenceStats\(moments, "):
            frechet_from_features(features_ND, moments)


def test_the_references_hash_tells_networks_and_values_apart():
    m = Moments.of(_features(18, 30, 5))
    assert ReferenceStats(m, "net").hash == ReferenceStats(m, "net").hash
    other = Moments.of(_features(19, 30, 5))
    hashes = {ReferenceStats(*args).hash for args in [(m, "net"), (m, "other"), (other, "net")]}
    assert len(hashes) == 3
