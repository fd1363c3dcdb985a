"""Precision, recall, density and coverage against peers, plain loops and known cases."""

import numpy as np
import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import bootstrap, prdc
from tests.metrics import peers
from tests.metrics.peers import features

NEEDS = "compares with peers: pip install -e '.[parity]'"
NAMES = ("precision", "recall", "density", "coverage")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(prdc, "_ENTRIES", 1000)


def replicates(x, y, counts_RN, k=5):
    return prdc.replicates(x, y, counts_RN, dict.fromkeys(NAMES, k))


def scores(x, y, k=5):
    found = replicates(x, y, np.ones((1, len(x)), int), k)
    return prdc.Prdc(**{name: float(value[0]) for name, value in vars(found).items()})


@pytest.mark.parametrize("n,m,k", [(120, 150, 3), (200, 90, 5), (60, 60, 1)])
def test_equals_torch_fidelity_and_prdc(n, m, k, capsys):
    torch = pytest.importorskip("torch", reason=NEEDS)
    package = pytest.importorskip("prdc", reason=NEEDS + " && pip install --no-deps prdc==0.2")
    x, y = features(1, n, 8, 0.5, 0.4), features(2, m, 8, 0.4, 0.1)
    ours = scores(x, y, k=k)
    peer = peers.torch_fidelity("metric_prc.py")
    theirs = peer.prc_features_to_metric(
        torch.from_numpy(x), torch.from_numpy(y), prc_neighborhood=k, verbose=False
    )
    assert 0.05 < ours.precision < 0.99
    assert ours.precision == pytest.approx(theirs[peer.KEY_METRIC_PRECISION], abs=1e-7)
    assert ours.recall == pytest.approx(theirs[peer.KEY_METRIC_RECALL], abs=1e-7)
    theirs = package.compute_prdc(y, x, k)  # Real first.
    for name in NAMES:
        assert getattr(ours, name) == pytest.approx(theirs[name], abs=1e-12), name


@pytest.mark.parametrize("repeats", [False, True])
def test_replicates_are_the_scores_of_the_images_they_count(repeats):
    x, y = features(3, 80, 6, 0.5, 0.4), features(4, 70, 6, 0.4, 0.1)
    counts_RN = bootstrap.resample_counts(80, 6, 0)
    if repeats:
        counts_RN = np.random.default_rng(5).integers(0, 4, (6, 80))
    drawn = replicates(x, y, counts_RN, k=3)
    for r, counts_N in enumerate(counts_RN):
        direct = scores(np.repeat(x, counts_N, axis=0), y, k=3)
        for name in NAMES:
            assert getattr(drawn, name)[r] == pytest.approx(getattr(direct, name)), name


def test_identical_disjoint_and_constant_sets():
    x = features(6, 90, 10)
    # Of k neighbours the k-th lies on the edge, which density leaves out, and the image is inside.
    for drawn in (x, x[::-1]):
        assert scores(drawn, x, k=5) == prdc.Prdc(1.0, 1.0, 1.0, 1.0)
    assert scores(x + 100, x, k=5) == prdc.Prdc(0.0, 0.0, 0.0, 0.0)
    # One picture over and over: balls without extent, which hold only what is the same.
    still = np.tile(x[:1], (20, 1))
    assert scores(still, x, k=5).recall == pytest.approx(1 / 90)
    assert scores(still, still, k=5) == prdc.Prdc(1.0, 1.0, 0.0, 0.0)
    # Far from the origin nothing is lost.
    other = features(9, 40, 10)
    assert scores(other + 1e4, x + 1e4, k=5) == scores(other, x, k=5)


@pytest.mark.parametrize("of", [1, 255])
def test_images_at_the_same_distance_are_on_the_edge(of):
    """Features of four values: many an image lies as far as the k-th neighbour. Held against sums
    of whole numbers, which round nothing."""
    rng, k = np.random.default_rng(3), 3
    x, y = rng.integers(0, 4, (2, 300, 8))
    (xy, xx, yy) = (((a[:, None] - b) ** 2).sum(axis=2) for a, b in ((x, y), (x, x), (y, y)))
    radius_N, radius_M = (np.sort(own, axis=1)[:, k] for own in (xx, yy))
    assert (xy == radius_M).sum() > 300
    found = scores(x / of, y / of, k=k)
    assert found.precision == (xy <= radius_M).any(axis=1).mean()
    assert found.recall == (xy <= radius_N[:, None]).any(axis=0).mean()
    assert found.density == pytest.approx((xy < radius_M).sum(axis=1).mean() / k, abs=1e-12)
    assert found.coverage == (xy < radius_M).any(axis=0).mean()


def test_a_collapsed_and_a_spread_model():
    # Half the modes: precise, and recalling half of the real images.
    rng = np.random.default_rng(7)
    y = rng.normal(size=(400, 4)) * 0.1
    y[200:, 0] += 50
    x = rng.normal(size=(300, 4)) * 0.1
    score = scores(x, y, k=5)
    assert score.precision > 0.95
    assert 0.45 < score.recall <= 0.5
    assert 0.45 < score.coverage <= 0.5
    assert score.density == pytest.approx(1, abs=0.15)


def test_mistakes_say_what_is_wrong():
    x = features(8, 30, 5)
    with pytest.raises(UserError, match="5 nearest neighbours need at least 6 images .* are 5 gen"):
        scores(x[:5], x)
    with pytest.raises(UserError, match="0 nearest"):
        scores(x, x, k=0)
    with pytest.raises(UserError, match="width 5 .* width 4"):
        scores(x, x[:, :4])
    with pytest.raises(UserError, match="fewer than 6 images"):
        replicates(x, x, np.eye(30, dtype=int))
