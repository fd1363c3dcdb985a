"""Replicates are the scores they claim to be, and their intervals cover what they claim to."""

import numpy as np
import pytest
import scipy.stats

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import bootstrap
from ldm_scaling.metrics.frechet import ReferenceStats, frechet_distance, frechet_from_features
from ldm_scaling.metrics.moments import Moments

# The demo's regime in small: fewer images than feature dimensions.
N, D = 32, 48
SCALE_D = np.arange(1, D + 1.0) ** -0.5


def _reference(seed=0, n=600, d=D):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, d)) * np.arange(1, d + 1.0) ** -0.5
    return ReferenceStats(Moments.of(features), "net")


def _with_replacement(n, replicates, seed):
    index_RN = np.random.default_rng(seed).integers(n, size=(replicates, n))
    return np.stack([np.bincount(index_N, minlength=n) for index_N in index_RN])


@pytest.mark.parametrize("n", [4, 5, 33, 128])
def test_counts_are_halves_the_same_for_everyone_and_fair(n):
    counts_RN = bootstrap.resample_counts(n, 300, seed=7)
    assert counts_RN.shape == (300, n)
    assert set(np.unique(counts_RN)) == {0, 1}
    assert (counts_RN.sum(axis=1) == n // 2).all()
    np.testing.assert_array_equal(counts_RN, bootstrap.resample_counts(n, 300, seed=7))
    assert (counts_RN != bootstrap.resample_counts(n, 300, seed=8)).any()
    # Every prompt is drawn equally often: chi-squared over prompts at the 1e-6 level.
    p = (n // 2) / n
    drawn_N = counts_RN.sum(axis=0)
    statistic = ((drawn_N - 300 * p) ** 2).sum() / (300 * p * (1 - p)) * (n - 1) / n
    assert statistic < scipy.stats.chi2.isf(1e-6, n - 1)


@pytest.mark.parametrize("n,d", [(32, 48), (33, 12), (40, 20), (128, 320)])
@pytest.mark.parametrize("repeats", [False, True])
def test_a_replicate_is_the_distance_of_the_images_it_counts(n, d, repeats):
    reference = _reference(d=d)
    rng = np.random.default_rng(1)
    features_ND = rng.normal(size=(n, d)) * np.arange(1, d + 1.0) ** -0.6 + 0.1
    draw = _with_replacement if repeats else bootstrap.resample_counts
    counts_RN = draw(n, 4 if n > 100 else 20, 2)
    fast_R = bootstrap.frechet_replicates(features_ND, reference, counts_RN)
    sets = [np.repeat(features_ND, counts_N, axis=0) for counts_N in counts_RN]
    direct_R = [frechet_distance(Moments.of(x), reference.moments) for x in sets]
    np.testing.assert_allclose(fast_R, direct_R, rtol=1e-6)
    direct_R = [frechet_from_features(x, reference) for x in sets]
    np.testing.assert_allclose(fast_R, direct_R, rtol=1e-7)


def test_far_from_the_reference_nothing_cancels():
    reference = _reference()
    features_ND = 1e3 + 1e-2 * np.random.default_rng(3).normal(size=(N, D))
    counts_RN = bootstrap.resample_counts(N, 5, 0)
    direct_R = [frechet_from_features(features_ND[c > 0], reference) for c in counts_RN]
    fast_R = bootstrap.frechet_replicates(features_ND, reference, counts_RN)
    np.testing.assert_allclose(fast_R, direct_R, rtol=1e-12)


def test_counting_every_image_once_is_the_score_itself():
    reference = _reference()
    features_ND = np.random.default_rng(4).normal(size=(N, D)) * SCALE_D
    value = frechet_from_features(features_ND, reference)
    once = bootstrap.frechet_replicates(features_ND, reference, np.ones((1, N), int))
    assert once[0] == pytest.approx(value, rel=1e-7)
    values_N = features_ND[:, 0]
    assert bootstrap.mean_replicates(values_N, np.ones((1, N), int))[0] == pytest.approx(
        values_N.mean()
    )


def test_halves_of_a_mean_spread_as_its_standard_error():
    values_N = np.random.default_rng(5).gamma(2.0, size=64)
    counts_RN = bootstrap.resample_counts(64, 20_000, 0)
    replicates_R = bootstrap.mean_replicates(values_N, counts_RN)
    assert replicates_R[0] == pytest.approx(values_N[counts_RN[0] > 0].mean())
    error = values_N.std(ddof=1) / np.sqrt(64)
    assert replicates_R.std() == pytest.approx(error, rel=0.02)


def test_stored_replicates_are_centred_and_their_differences_are_the_difference():
    rng = np.random.default_rng(6)
    counts_RN = bootstrap.resample_counts(N, 50, 0)
    a_N, b_N = rng.normal(size=N), rng.normal(size=N)
    stored = [
        bootstrap.centre(v.mean(), bootstrap.mean_replicates(v, counts_RN)) for v in (a_N, b_N)
    ]
    difference = a_N - b_N
    raw_R = bootstrap.mean_replicates(difference, counts_RN)
    np.testing.assert_allclose(
        stored[0] - stored[1], bootstrap.centre(difference.mean(), raw_R), atol=1e-12
    )
    assert stored[0].mean() == pytest.approx(a_N.mean())
    low, high = bootstrap.basic_interval(difference.mean(), raw_R, N - 1)
    assert (low, high) == pytest.approx(bootstrap.interval(stored[0] - stored[1], N - 1))
    assert low < difference.mean() < high
    wide = bootstrap.basic_interval(difference.mean(), raw_R, N - 1, level=0.99)
    assert wide[0] < low and high < wide[1]


def test_halves_within_strata_leave_out_how_the_strata_differ():
    """DreamBench: what subjects and prompts add is the same in every replicate."""
    rng, strata = np.random.default_rng(10), np.repeat(np.arange(40), 4)
    counts_RN = bootstrap.resample_counts(160, 4000, 0, strata.tolist())
    drawn_RS = np.stack([counts_RN[:, strata == s].sum(axis=1) for s in range(40)], axis=1)
    assert (drawn_RS == 2).all() and set(np.unique(counts_RN)) == {0, 1}
    assert counts_RN.mean(axis=0) == pytest.approx(0.5, abs=0.05)
    noise_N = rng.normal(0, 0.04, 160)
    values_N = rng.normal(0, 0.1, 40)[strata] + noise_N
    within = np.mean([noise_N[strata == s].var(ddof=1) for s in range(40)])
    spread = bootstrap.mean_replicates(values_N, counts_RN).std()
    assert spread == pytest.approx(np.sqrt(within / 160), rel=0.05)
    plain = bootstrap.mean_replicates(values_N, bootstrap.resample_counts(160, 500, 0))
    assert plain.std() > 1.8 * spread


TRIALS = 300


@pytest.fixture(scope="module")
def trials():
    """Two models that share prompts, many times over: values (T, 2) and replicates (T, 2, R).

    The second model's mean and spread differ; both react to the prompt in the same way.
    """
    reference = _reference()
    rng = np.random.default_rng(8)
    values, halves, resamples = [], [], []
    for trial in range(TRIALS):
        prompt_ND = rng.normal(size=(N, D))
        pair = []
        for shift, spread in ((0.3, 1.0), (0.25, 0.95)):
            own_ND = 0.8 * prompt_ND + 0.6 * rng.normal(size=(N, D))
            pair.append((shift + spread * own_ND) * SCALE_D)
        values.append([frechet_from_features(x, reference) for x in pair])
        for store, draw in ((halves, bootstrap.resample_counts), (resamples, _with_replacement)):
            counts_RN = draw(N, 100, trial)
            store.append([bootstrap.frechet_replicates(x, reference, counts_RN) for x in pair])
    return np.array(values), np.array(halves), np.array(resamples)


def _coverage(values_T, replicates_TR):
    """Share of 95% intervals that hold the expected value."""
    expected = values_T.mean()
    pairs = zip(values_T, replicates_TR, strict=True)
    intervals = [bootstrap.basic_interval(value, raw_R, N - 1) for value, raw_R in pairs]
    return np.mean([low <= expected <= high for low, high in intervals])


def _binomial_low(p):
    return scipy.stats.binom.ppf(1e-4, TRIALS, p) / TRIALS


def test_intervals_cover_the_expected_score(trials):
    values, halves, _ = trials
    for model in range(2):
        # Nominal .95; 100 replicates estimate its ends from two or three values each: .93.
        assert _coverage(values[:, model], halves[:, model]) >= _binomial_low(0.93)
        # And not by being endless.
        ratio = halves[:, model].std(axis=1).mean() / values[:, model].std()
        assert 0.85 < ratio < 1.5


def test_paired_intervals_cover_the_difference_and_are_narrower(trials):
    values, halves, _ = trials
    difference_T = values[:, 0] - values[:, 1]
    assert _coverage(difference_T, halves[:, 0] - halves[:, 1]) >= _binomial_low(0.93)
    unpaired = np.hypot(*halves.std(axis=2).mean(axis=0))
    assert (halves[:, 0] - halves[:, 1]).std(axis=1).mean() < 0.75 * unpaired


def test_why_not_with_replacement(trials):
    values, halves, resamples = trials
    value_T, replicate_TR = values[:, 0], resamples[:, 0]
    # 2 value - replicate: the value is outside its own interval, always on the same side.
    high_T = np.quantile(2 * value_T[:, None] - replicate_TR, 0.975, axis=1)
    assert (high_T < value_T).mean() > 0.95
    assert replicate_TR.std(axis=1).mean() > 1.1 * halves[:, 0].std(axis=1).mean()


def test_a_null_difference_is_no_difference():
    # Two seeds of one model on the same prompts: 5% of the paired intervals may leave out 0.
    reference = _reference()
    rng = np.random.default_rng(9)
    counts_RN = bootstrap.resample_counts(N, 100, 0)
    outside = 0
    for _ in range(200):
        prompt_ND = rng.normal(size=(N, D))
        value, stored = [], []
        for _ in range(2):
            x_ND = (0.8 * prompt_ND + 0.6 * rng.normal(size=(N, D))) * SCALE_D
            value.append(frechet_from_features(x_ND, reference))
            raw_R = bootstrap.frechet_replicates(x_ND, reference, counts_RN)
            stored.append(bootstrap.centre(value[-1], raw_R))
        low, high = bootstrap.interval(stored[0] - stored[1], N - 1)
        outside += not low <= 0 <= high
    assert outside <= scipy.stats.binom.ppf(1 - 1e-4, 200, 0.07)
    x_ND = prompt_ND * SCALE_D
    same = [bootstrap.frechet_replicates(x_ND, reference, counts_RN) for _ in range(2)]
    np.testing.assert_array_equal(same[0], same[1])


def test_mistakes_say_what_is_wrong():
    reference = _reference()
    features_ND = np.zeros((N, D))
    with pytest.raises(UserError, match="at least 4 images .* got 1"):
        bootstrap.resample_counts(1, 10, 0)
    with pytest.raises(UserError, match="replicate"):
        bootstrap.resample_counts(10, 0, 0)
    with pytest.raises(UserError, match="has 1 image, which says nothing"):
        bootstrap.resample_counts(5, 10, 0, ["a", "a", "b", "b", "c"])
    with pytest.raises(UserError, match="4 strata for 5 images"):
        bootstrap.resample_counts(5, 10, 0, ["a", "a", "b", "b"])
    with pytest.raises(UserError, match="do not fit 32 images"):
        bootstrap.frechet_replicates(features_ND, reference, np.ones((3, N + 1), int))
    with pytest.raises(UserError, match="fewer than 2"):
        bootstrap.frechet_replicates(features_ND, reference, np.eye(N, dtype=int))
    with pytest.raises(UserError, match="do not fit"):
        bootstrap.mean_replicates(np.zeros(N), -np.ones((3, N), int))
    with pytest.raises(UserError, match="not finite"):
        bootstrap.mean_replicates(np.full(N, np.nan), np.ones((3, N), int))
    with pytest.raises(UserError, match="between 0 and 1"):
        bootstrap.basic_interval(0.0, np.zeros(3), N - 1, level=95)
