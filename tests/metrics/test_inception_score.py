"""The inception score against peers, closed forms and its own replicates."""

import numpy as np
import pytest
import scipy.stats

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import bootstrap
from ldm_scaling.metrics.inception_score import inception_score, inception_score_replicates
from tests.metrics import peers

NEEDS = "compares with peers: pip install -e '.[parity]'"


def _logits(seed, n, c=1008, scale=3.0):
    return np.random.default_rng(seed).normal(size=(n, c)) * scale


# 10 splits of 203 images: of 20 and 21, at the peer's own boundaries.
@pytest.mark.parametrize("n,splits", [(203, 10), (50, 1), (7, 7)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_equals_torch_fidelity(n, splits, shuffle):
    torch = pytest.importorskip("torch", reason=NEEDS)
    logits = _logits(n, n)
    peer = peers.torch_fidelity("metric_isc.py")
    ours = inception_score(logits, splits=splits, shuffle_seed=2020 if shuffle else None)
    for dtype, rel in ((np.float64, 1e-12), (np.float32, 1e-4)):
        tensor = torch.from_numpy(logits.astype(dtype))
        theirs = peer.isc_features_to_metric(tensor, splits, shuffle)
        assert ours.value == pytest.approx(theirs[peer.KEY_METRIC_ISC_MEAN], rel=rel)
        assert ours.std == pytest.approx(theirs[peer.KEY_METRIC_ISC_STD], rel=rel, abs=1e-9)


def test_closed_forms():
    # Images that say nothing score 1; images sure of classes equally often score their number.
    assert inception_score(np.zeros((40, 12))).value == pytest.approx(1)
    sure = 60.0 * np.eye(12)[np.arange(240) % 12]
    assert inception_score(sure, splits=4).value == pytest.approx(12, rel=1e-9)
    assert inception_score(sure, splits=4).std == pytest.approx(0, abs=1e-9)
    # One class: sure, not varied. A logit beyond exp's range does no harm.
    assert inception_score(np.eye(12)[np.zeros(20, int)] * 5000).value == pytest.approx(1)
    # Logits are only defined up to a constant for each image.
    x = _logits(1, 30, 20)
    moved = x + np.arange(30)[:, None]
    assert inception_score(moved).value == pytest.approx(inception_score(x).value, rel=1e-12)


@pytest.mark.parametrize("seed", [None, 2020])
def test_replicates_are_the_score_of_the_images_they_count(seed):
    x = _logits(2, 64, 30)
    counts_RN = np.random.default_rng(3).multinomial(64, np.full(64, 1 / 64), 5)
    order = np.arange(64) if seed is None else np.random.RandomState(seed).permutation(64)
    direct_R = np.array([
        inception_score(np.repeat(x[order], counts_N[order], axis=0), splits=4).value
        for counts_N in counts_RN
    ])
    drawn_R = inception_score_replicates(x, counts_RN, splits=4, shuffle_seed=seed)
    value = inception_score(x, splits=4, shuffle_seed=seed).value
    np.testing.assert_allclose(drawn_R, value * direct_R / direct_R.mean(), rtol=1e-12)
    # Half of the images are scored in half of the splits.
    half_RN = bootstrap.resample_counts(64, 3, 0)
    direct_R = np.array([
        inception_score(x[order][c[order] > 0], splits=2).value for c in half_RN
    ])
    drawn_R = inception_score_replicates(x, half_RN, splits=4, shuffle_seed=seed)
    np.testing.assert_allclose(drawn_R / drawn_R[0], direct_R / direct_R[0], rtol=1e-12)


@pytest.mark.parametrize("n, classes, splits", [(200, 100, 10), (100, 100, 1)])
def test_intervals_hold_where_there_are_many_classes_and_few_images_a_split(n, classes, splits):
    """The score of fewer images is much smaller then, and so is its spread."""
    rng, trials, values, intervals = np.random.default_rng(7), 80, [], []
    counts_RN = bootstrap.resample_counts(n, 60, 0)
    for _ in range(trials):
        logits_NC = 0.5 * rng.normal(size=(n, classes))
        logits_NC[np.arange(n), rng.integers(classes, size=n)] += rng.gamma(2.0, 6.0, n)
        values.append(inception_score(logits_NC, splits=splits).value)
        drawn_R = inception_score_replicates(logits_NC, counts_RN, splits=splits)
        intervals.append(bootstrap.basic_interval(values[-1], drawn_R, n - 1))
    low_T, high_T = np.transpose(intervals)
    held = np.mean((low_T <= np.mean(values)) & (np.mean(values) <= high_T))
    assert held >= scipy.stats.binom.ppf(1e-2, trials, 0.92) / trials
    assert np.mean(high_T - low_T) < 1.6 * 3.92 * np.std(values)


def test_mistakes_say_what_is_wrong():
    with pytest.raises(UserError, match="10 splits needs at least 10 images, there are 9"):
        inception_score(_logits(4, 9))
    with pytest.raises(UserError, match="needs at least 1 images, there are 0"):
        inception_score(np.zeros((0, 5)), splits=1)
    with pytest.raises(UserError, match="not finite"):
        inception_score(np.full((20, 5), np.inf))
    with pytest.raises(UserError, match="fewer than 1 images"):
        inception_score_replicates(_logits(5, 12), np.zeros((2, 12), int))
    assert inception_score(_logits(6, 1), splits=1).value == pytest.approx(1)
