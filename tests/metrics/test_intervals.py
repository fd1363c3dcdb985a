"""Intervals and p-values keep what they promise: simulated many times over.

A model's images are drawn anew in each trial; the truth is the mean score over all trials. The
reference stays, as in use. A share of T trials is judged by the binomial at the 1e-4 level.
"""

import numpy as np
import pytest
import scipy.stats

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import bootstrap, catalog, compare, kernel
from ldm_scaling.metrics.frechet import ReferenceStats
from ldm_scaling.metrics.moments import Moments

T, R, N, M, D = 150, 100, 60, 120, 6
SCALE_D = np.arange(1, D + 1.0) ** -0.5


def _truths():
    rng = np.random.default_rng(0)
    real_MD = rng.normal(size=(M, D)) * SCALE_D
    reference = ReferenceStats(Moments.of(real_MD), "net")
    captions_ND = rng.normal(size=(N, D)) + 1
    return {"fid": reference, "kid": real_MD, "cmmd": real_MD, "precision": real_MD,
            "recall": real_MD, "density": real_MD, "coverage": real_MD, "clip_score": captions_ND}


AGAINST = _truths()
NAMES = (*AGAINST, "inception_score")


def _evaluate(x_ND, counts_RN):
    # Features are made up; each network's place is taken by the same ones.
    needs = {catalog.METRICS[name].needs: x_ND for name in NAMES}
    return catalog.evaluate(NAMES, needs, AGAINST, counts_RN)


@pytest.fixture(scope="module")
def trials():
    """Scores of two models on common prompts: {name: (T, 2) of `catalog.Score`}."""
    rng = np.random.default_rng(1)
    out = {name: [] for name in NAMES}
    for trial in range(T):
        prompts_ND = rng.normal(size=(N, D))
        counts_RN = bootstrap.resample_counts(N, R, trial)
        pair = []
        for shift, spread in ((0.4, 1.1), (0.35, 1.05)):
            own_ND = 0.8 * prompts_ND + 0.6 * rng.normal(size=(N, D))
            pair.append(_evaluate((shift + spread * own_ND) * SCALE_D, counts_RN))
        for name in NAMES:
            out[name].append([scores[name] for scores in pair])
    return out


def _low(p):
    return scipy.stats.binom.ppf(1e-4, T, p) / T


@pytest.mark.parametrize("name", NAMES)
def test_intervals_cover_the_expected_score(trials, name):
    # Nominal .95; 100 replicates estimate the ends from two or three values each: .93. Nearest
    # neighbours are not smooth in the images, and their scores are only held to .90.
    nominal = 0.90 if name in ("precision", "recall", "density", "coverage") else 0.93
    for model in range(2):
        scores = [pair[model] for pair in trials[name]]
        values_T = np.array([s.value for s in scores])
        covered = [s.interval[0] <= values_T.mean() <= s.interval[1] for s in scores]
        assert np.mean(covered) >= _low(nominal), (name, np.mean(covered))
        # And not by being endless.
        spread = np.mean([s.replicates_R.std() for s in scores])
        assert spread < 2.2 * values_T.std(), name


@pytest.mark.parametrize("name", NAMES)
def test_paired_intervals_cover_the_difference(trials, name):
    nominal = 0.90 if name in ("precision", "recall", "density", "coverage") else 0.93
    expected = np.mean([a.value - b.value for a, b in trials[name]])
    found = [
        compare.distributions(a.value, b.value, a.replicates_R, b.replicates_R, freedom=N - 1)
        for a, b in trials[name]
    ]
    assert np.mean([c.low <= expected <= c.high for c in found]) >= _low(nominal)
    for c in found[:20]:
        assert c.difference == pytest.approx((c.low + c.high) / 2, abs=c.high - c.low)
        # The interval leaves out 0 where the p-value is small, and the other way round: to what
        # 100 replicates tell of their ends.
        if c.p_value > 0.15:
            assert c.low <= 0 <= c.high
        if c.p_value < 0.01:
            assert not c.low <= 0 <= c.high


def test_equal_models_are_seldom_called_different():
    rng = np.random.default_rng(2)
    counts_RN = bootstrap.resample_counts(N, 200, 0)
    small, trials = 0, 100
    real_MD = rng.normal(size=(M, D)) * SCALE_D
    for _ in range(trials):
        prompts_ND = rng.normal(size=(N, D))
        a, b = (0.8 * prompts_ND + 0.6 * rng.normal(size=(N, D)) + 0.4 for _ in range(2))
        wholes = [kernel.kid(x, real_MD) for x in (a, b)]
        drawn = [kernel.kid_replicates(x, real_MD, counts_RN, whole=k)
                 for x, k in zip((a, b), wholes)]
        found = compare.distributions(*(k.value for k in wholes), *drawn, freedom=N - 1)
        small += found.p_value < 0.05
    assert small <= scipy.stats.binom.ppf(1 - 1e-4, trials, 0.07)


@pytest.mark.parametrize("n, strata", [(4, 1), (8, 1), (12, 1), (20, 1), (40, 1), (16, 4)])
def test_few_images_are_not_taken_for_many(n, strata):
    """Replicates, however many, know the spread no better than the images do."""
    rng, trials, covered, small_3 = np.random.default_rng(6), 2000, 0, np.zeros(3)
    counts_RN = bootstrap.resample_counts(n, 200, 0, (np.arange(n) % strata).tolist())
    kept_N = rng.normal(size=strata)[np.arange(n) % strata]
    for values_N in rng.normal(size=(trials, n)):
        drawn_R = bootstrap.mean_replicates(values_N + kept_N, counts_RN)
        found = compare.distributions(
            values_N.mean(), 0.0, drawn_R, np.zeros(200), freedom=n - strata)
        covered += found.low <= 0 <= found.high
        small_3 += found.p_value < np.array([0.05, 0.01, 0.001])
        assert (found.p_value < 0.05) == (not found.low <= 0 <= found.high)
    # 200 replicates' own error makes 0.05 up to 0.055.
    assert covered >= scipy.stats.binom.ppf(1e-4, trials, 0.945)
    assert (small_3 <= scipy.stats.binom.ppf(1 - 1e-4, trials, [0.055, 0.012, 0.0015])).all()


def test_a_clear_difference_has_a_p_value_that_survives_corrections():
    rng = np.random.default_rng(4)
    raw_R = rng.normal(size=99)
    found = compare.distributions(50.0, 10.0, raw_R, rng.normal(size=99), freedom=59)
    assert found.p_value < 1e-6
    assert found.low > 0
    # One as far as the interval's half width has 5% of Student's t.
    drawn_R = rng.normal(size=2000)
    near = compare.distributions(
        1.96 * drawn_R.std(), 0.0, drawn_R, np.zeros(2000), freedom=9999)
    assert near.p_value == pytest.approx(0.05, abs=0.001)
    same = compare.distributions(1.0, 1.0, raw_R, raw_R, freedom=59)
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)


def test_seed_blocks():
    rng = np.random.default_rng(5)
    values_TK = rng.gamma(20.0, size=(2000, 4))
    intervals = np.array([bootstrap.block_interval(v) for v in values_TK])
    covered = ((intervals[:, 0] <= 20) & (20 <= intervals[:, 1])).mean()
    assert covered == pytest.approx(0.95, abs=0.02)
    theirs = scipy.stats.ttest_1samp(values_TK[0], 0).confidence_interval(0.9)
    assert bootstrap.block_interval(values_TK[0], 0.9) == pytest.approx(
        (theirs.low, theirs.high)
    )


def test_mistakes_say_what_is_wrong():
    with pytest.raises(UserError, match="3 and 4 replicates"):
        compare.distributions(0.0, 0.0, np.zeros(3), np.zeros(4), freedom=59)
    with pytest.raises(UserError, match="scores nan and 1.0"):
        compare.distributions(np.nan, 1.0, np.arange(5.0), np.arange(5.0), freedom=59)
    with pytest.raises(UserError, match="at least 2 replicates, there are 1"):
        compare.p_of(1.0, np.ones(1), 59)
    for function in (compare.p_of, bootstrap.basic_interval):
        with pytest.raises(UserError, match="replicates are not finite in 1 of 2"):
            function(1.0, np.array([1.0, np.nan]), 59)
    for interval in (bootstrap.interval, lambda R, n: bootstrap.basic_interval(1.0, R, n)):
        with pytest.raises(UserError, match="there are no bootstrap replicates"):
            interval(np.zeros(0), 59)
    with pytest.raises(UserError, match="at least 2 of them, there is 1"):
        bootstrap.block_interval(np.zeros(1))
    with pytest.raises(UserError, match="between 0 and 1"):
        bootstrap.block_interval(np.zeros(3), 95)
