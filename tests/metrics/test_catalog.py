"""The table lists what there is, and every row of it can be worked out."""

import collections

import numpy as np
import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import bootstrap, catalog, inception_score, kernel, prdc
from ldm_scaling.metrics.frechet import ReferenceStats
from ldm_scaling.metrics.moments import Moments
from tests.metrics.peers import features

N, D = 40, 8
X, Y = features(0, N, D), features(1, 50, D)
AGAINST = {
    "statistics": ReferenceStats(Moments.of(Y), "net"),
    "features": Y,
    "captions": features(2, N, D),
    "subjects": (Y, np.zeros(N), np.zeros(50)),
    "nothing": None,
}


def _given(names):
    needs = {catalog.METRICS[n].needs: X for n in names}
    return needs, {n: AGAINST[catalog.METRICS[n].against] for n in names}


# FID-infinity alone wants thousands of images; test_infinity.py has it with fewer.
# Of numbers that are there, one of each image.
PAIRED = ("lpips", "psnr", "psnr_y", "ssim", "ssim_y")
NAMES = [name for name in catalog.METRICS if name not in ("fid_infinity", *PAIRED)]


def test_every_metric_has_a_value_an_interval_and_replicates():
    counts_RN = bootstrap.resample_counts(N, 12, 0)
    scores = catalog.evaluate(NAMES, *_given(NAMES), counts_RN)
    assert list(scores) == NAMES
    for name, score in scores.items():
        assert np.isfinite(score.value), name
        assert score.replicates_R.shape == (12,), name
        assert score.interval[0] <= score.interval[1], name
    plain = catalog.evaluate(NAMES, *_given(NAMES))
    for name, score in scores.items():
        # Sums of a kernel under several weights at once round in their own way.
        exact = plain[name].value if name != "cmmd" else pytest.approx(plain[name].value, rel=1e-9)
        assert score.value == exact, name
    assert plain["fid"].interval is None
    values = {name: np.arange(N)[:, None] / N for name in PAIRED}
    for name, score in catalog.evaluate(PAIRED, values, {}, counts_RN).items():
        assert score.value == pytest.approx((N - 1) / 2 / N), name
        assert score.interval[0] < score.value < score.interval[1], name


def test_images_by_class_are_shuffled_before_the_inception_score_splits_them():
    """As torch-fidelity does. In their order each split would hold one class and score 1."""
    logits_NC = 30.0 * np.eye(10)[np.repeat(np.arange(10), 20)]
    counts_RN = bootstrap.resample_counts(200, 12, 0)
    score = catalog.evaluate(
        ["inception_score"], {"inception_logits": logits_NC}, {}, counts_RN)["inception_score"]
    wanted = inception_score.inception_score(logits_NC, shuffle_seed=2020).value
    assert score.value == wanted > 5
    assert score.interval[0] < score.value < score.interval[1]


def test_intervals_end_where_the_metric_does():
    """Of two equal sets: centred replicates go beyond 0 and 1, no expected score does."""
    counts_RN = bootstrap.resample_counts(N, 40, 0)
    x, same = X, ReferenceStats(Moments.of(X), "net")
    against = {"statistics": same, "features": x, "captions": x, "subjects": (x, np.zeros(N),
               np.zeros(N)), "nothing": None}  # fmt: skip
    beyond = 0
    for name in NAMES:
        metric = catalog.metric(name)
        least, most = metric.range
        given = {metric.needs: x}, {name: against[metric.against]}
        score = catalog.evaluate([name], *given, counts_RN)[name]
        low, high = score.interval
        assert least - 1e-9 <= score.value <= most + 1e-9, name
        assert least <= low <= high <= most, name
        free = bootstrap.basic_interval(score.value, score.replicates_R, N - 1)
        assert (low, high) == pytest.approx(np.clip(free, least, most)), name
        beyond += free[0] < least or free[1] > most
    assert beyond >= 3


@pytest.mark.parametrize("name,better", [
    ("fid", -1), ("kid", -1), ("cmmd", -1), ("fd_dinov2", -1), ("precision", 1), ("recall", 1),
    ("density", 1), ("coverage", 1), ("clip_i", 1), ("dino", 1), ("clip_t", 1), ("clip_score", 1),
])
def test_better_says_which_way_is_better(name, better):
    metric = catalog.metric(name)
    assert metric.better == ("higher" if better > 0 else "lower")
    against = AGAINST[metric.against]
    near = AGAINST["captions"] if metric.against == "captions" else Y[:N] + 1e-3
    values = [
        catalog.evaluate([name], {metric.needs: x}, {name: against})[name].value
        for x in (near, features(3, N, D) - 3)
    ]
    assert better * values[0] > better * values[1]


def test_what_metrics_share_is_worked_out_once(monkeypatch):
    calls = collections.Counter()

    def count(module, name):
        function = getattr(module, name)

        def counted(*given, **options):
            calls[name] += 1
            return function(*given, **options)

        monkeypatch.setattr(module, name, counted)

    count(prdc, "_blocks")
    count(kernel, "gaussian")
    count(kernel, "polynomial")
    counts_RN = bootstrap.resample_counts(N, 6, 0)
    alike = ["precision", "recall", "density", "coverage"]
    ones_1N = np.ones((1, N), int)
    apart = {
        name: [prdc.replicates(X, Y, rows_RN, {name: k}) for rows_RN in (ones_1N, counts_RN)]
        for name, k in zip(alike, (3, 3, 5, 5))
    }
    calls.clear()
    names = [*alike, "kid", "cmmd"]
    scores = catalog.evaluate(names, *_given(names), counts_RN)
    # Distances, and kernels, of each side's images from their own and from the other's.
    # KID's replicates are of other weights than its subsets.
    assert calls == {"_blocks": 3, "gaussian": 3, "polynomial": 2 * 3}
    for name, both in apart.items():
        value, drawn_R = (getattr(one, name) for one in both)
        assert scores[name].value == value
        np.testing.assert_array_equal(scores[name].replicates_R, drawn_R)


def test_mistakes_say_what_is_wrong():
    with pytest.raises(UserError, match="no metric 'FID': choose of fid, fid_infinity"):
        catalog.metric("FID")
    with pytest.raises(UserError, match="FID needs inception_pool: 2048 means"):
        catalog.evaluate(["fid"], {}, {})
    with pytest.raises(UserError, match="KID is held against features: name it for 'kid'"):
        catalog.evaluate(["kid"], {"inception_pool": X}, {})
    for name in ("lpips", "clip_score"):
        with pytest.raises(UserError, match="there are no images"):
            needs = catalog.METRICS[name].needs
            catalog.evaluate([name], {needs: np.zeros((0, 1))}, {name: np.zeros((0, 1))})


def test_every_row_is_whole():
    for name, metric in catalog.METRICS.items():
        assert metric.name == name and metric.label and metric.source
        assert metric.needs in catalog.FEATURES
