"""The caption-agreement probe finds what is there, and nothing where nothing is."""

import dataclasses

import numpy as np
import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import agreement

D, E, LATENT = 40, 24, 8


def _pairs(seed, n, noise=0.3, concepts=None):
    """Pictures and captions of shared latent causes; the maps do not depend on the seed."""
    maps = np.random.default_rng(0)
    to_features, to_embedding = maps.normal(size=(LATENT, D)), maps.normal(size=(LATENT, E))
    rng = np.random.default_rng(seed)
    groups_N = np.arange(n) if concepts is None else rng.integers(concepts, size=n)
    cause_NL = rng.normal(size=(n if concepts is None else concepts, LATENT))[groups_N]
    features_ND = cause_NL @ to_features + noise * rng.normal(size=(n, D)) + 2.0
    embeddings_NE = cause_NL @ to_embedding + 0.3 * np.arange(E)
    embeddings_NE /= np.linalg.norm(embeddings_NE, axis=1, keepdims=True)
    return features_ND, embeddings_NE, groups_N


def test_finds_a_linear_relation_and_generalises():
    x, e, _ = _pairs(1, 600)
    probe = agreement.fit(x, e)
    test_x, test_e, _ = _pairs(2, 200)
    found = agreement.sanity(probe, test_x, test_e)
    assert found.score > 0.85
    assert found.top1 > 0.5 > 50 * found.chance1
    assert found.top1 <= found.top5
    assert abs(found.mismatched) < 0.03
    # The choice of lambda is judged on pairs outside its fit: it foretells the unseen score.
    assert probe.held_out_score == pytest.approx(found.score, abs=0.05)
    assert found.score == pytest.approx(agreement.score(probe, test_x, test_e).mean())


def test_unrelated_pairs_score_nothing():
    x, e, _ = _pairs(3, 400)
    test_x, test_e, _ = _pairs(4, 300)
    rng = np.random.default_rng(5)
    blind = agreement.fit(x, e[rng.permutation(len(e))])
    score_N = agreement.score(blind, test_x, test_e)
    assert abs(score_N.mean()) < 4 * score_N.std() / np.sqrt(len(score_N)) + 0.02
    seeing = agreement.fit(x, e)
    shuffled_N = agreement.score(seeing, test_x, np.roll(test_e, 1, axis=0))
    assert abs(shuffled_N.mean()) < 4 * shuffled_N.std() / np.sqrt(len(shuffled_N))
    assert agreement.score(seeing, test_x, test_e).mean() > 0.8
    guess = agreement.sanity(seeing, rng.permutation(test_x), test_e)
    assert guess.top1 < 0.02 and abs(guess.mismatched) < 0.03


def test_a_worse_picture_agrees_less():
    x, e, _ = _pairs(6, 600)
    probe = agreement.fit(x, e)
    test_x, test_e, _ = _pairs(7, 200)
    rng = np.random.default_rng(8)
    means = [
        agreement.score(probe, test_x + s * rng.normal(size=test_x.shape), test_e).mean()
        for s in (0.0, 2.0, 6.0, 20.0)
    ]
    assert means == sorted(means, reverse=True) and means[-1] < 0.5 * means[0]


def test_the_fit_is_the_ridge_minimum():
    # At a minimum of |Z W - Y|^2 + lambda n |W|^2 every change of W makes the loss larger.
    x, e, _ = _pairs(9, 120)
    probe = agreement.fit(x, e)
    z, y = (x - x.mean(0)) / x.std(0), e - e.mean(0)

    def loss(w):
        return ((z @ w - y) ** 2).sum() + probe.ridge * len(x) * (w**2).sum()

    rng = np.random.default_rng(10)
    least = loss(probe.weight_DE)
    for size in (1e-1, 1e-3, 1e-4):
        for _ in range(5):
            step = size * rng.normal(size=probe.weight_DE.shape)
            up, down = loss(probe.weight_DE + step) - least, loss(probe.weight_DE - step) - least
            assert up > 0 and down > 0
            assert up == pytest.approx(down, rel=1e-3)  # A stationary point: no slope.


def test_equals_scikit_learns_ridge():
    reason = "scikit-learn is not installed: pip install -e '.[parity]'"
    linear_model = pytest.importorskip("sklearn.linear_model", reason=reason)
    x, e, _ = _pairs(11, 150)
    probe = agreement.fit(x, e)
    peer = linear_model.Ridge(alpha=probe.ridge * len(x), solver="cholesky")
    peer.fit((x - x.mean(0)) / x.std(0), e)
    np.testing.assert_allclose(probe.weight_DE, peer.coef_.T, atol=1e-9)


def test_fewer_pairs_than_features_are_fine():
    x, e, _ = _pairs(12, 30)
    test_x, test_e, _ = _pairs(13, 200)
    assert agreement.sanity(agreement.fit(x, e), test_x, test_e).score > 0.5


def test_scores_do_not_see_the_units_of_a_feature_nor_a_dead_one():
    x, e, _ = _pairs(14, 200)
    test_x, test_e, _ = _pairs(15, 50)
    plain = agreement.score(agreement.fit(x, e), test_x, test_e)

    def other(v):
        changed = 5.0 - v * np.geomspace(1e-3, 1e3, D)
        return np.column_stack([changed, np.full(len(v), 0.1)])

    probe = agreement.fit(other(x), e)
    np.testing.assert_allclose(agreement.score(probe, other(test_x), test_e), plain, atol=1e-9)
    # A feature that was dead in training and moves later has no say.
    moved = other(test_x)
    moved[:, -1] = 7.0
    np.testing.assert_allclose(agreement.score(probe, moved, test_e), plain, atol=1e-9)


def test_scores_do_not_see_the_length_of_a_prediction():
    x, e, _ = _pairs(16, 200)
    probe = agreement.fit(x, e)
    faint = probe.feature_mean_D + 0.1 * (x - probe.feature_mean_D)
    np.testing.assert_allclose(
        agreement.score(probe, faint, e), agreement.score(probe, x, e), atol=1e-12
    )
    assert np.abs(agreement.score(probe, x, e)).max() <= 1 + 1e-12
    nothing = np.tile(probe.feature_mean_D, (3, 1))
    np.testing.assert_array_equal(agreement.score(probe, nothing, e[:3]), np.zeros(3))


def test_groups_keep_lambda_honest():
    # Many pictures of few concepts, each with looks and words of its own besides what is shared:
    # split by picture, the choice rewards learning concepts by heart.
    maps = np.random.default_rng(0)
    to_features, to_embedding = maps.normal(size=(LATENT, D)), maps.normal(size=(LATENT, E))

    def pairs(rng, concepts, each):
        cause_KL = rng.normal(size=(concepts, LATENT))
        looks_KD = cause_KL @ to_features + 4 * rng.normal(size=(concepts, D))
        words_KE = cause_KL @ to_embedding + 3 * rng.normal(size=(concepts, E))
        groups_N = np.repeat(np.arange(concepts), each)
        noise_ND = rng.normal(size=(len(groups_N), D))
        return looks_KD[groups_N] + noise_ND, words_KE[groups_N], groups_N

    for seed in range(3):
        rng = np.random.default_rng(seed)
        x, e, groups_N = pairs(rng, 30, 12)
        test_x, test_e, _ = pairs(rng, 400, 1)
        by_picture, by_concept = agreement.fit(x, e), agreement.fit(x, e, groups_N=groups_N)
        truth = agreement.score(by_concept, test_x, test_e).mean()
        assert by_concept.ridge > by_picture.ridge
        assert truth > agreement.score(by_picture, test_x, test_e).mean()
        assert abs(by_concept.held_out_score - truth) < abs(by_picture.held_out_score - truth) / 2


def test_equal_captions_are_one_answer():
    x, e, _ = _pairs(19, 300)
    probe = agreement.fit(x, e)
    test_x, test_e, _ = _pairs(20, 40)
    once = agreement.sanity(probe, test_x, test_e)
    twice = agreement.sanity(probe, np.tile(test_x, (2, 1)), np.tile(test_e, (2, 1)))
    assert twice.pairs == 80
    same = dataclasses.asdict(dataclasses.replace(twice, pairs=40))
    assert same == pytest.approx(dataclasses.asdict(once))


def test_a_probe_that_tells_nothing_ranks_by_guessing():
    """All captions tie: the own one is among the best by chance."""
    x, e, _ = _pairs(23, 60)
    probe = agreement.fit(x, e)
    blind = dataclasses.replace(probe, weight_DE=np.zeros_like(probe.weight_DE))
    found = agreement.sanity(blind, x[:20], e[:20])
    assert (found.score, found.mismatched) == (0, 0)
    assert (found.top1, found.top5) == pytest.approx((found.chance1, 5 * found.chance1))
    assert found.chance1 == 1 / 20


def test_a_file_gives_back_the_same_scores(tmp_path):
    x, e, _ = _pairs(21, 100)
    probe = agreement.fit(x, e, extractor="net", encoder="text")
    agreement.save(tmp_path / "probe.npz", probe)
    back = agreement.load(tmp_path / "probe.npz")
    assert back.hash == probe.hash
    assert (back.extractor, back.encoder, back.pairs) == ("net", "text", 100)
    np.testing.assert_array_equal(agreement.score(back, x, e), agreement.score(probe, x, e))
    assert dataclasses.replace(probe, encoder="other").hash != probe.hash
    assert agreement.fit(x, e, extractor="net", encoder="text").hash == probe.hash


def test_a_damaged_or_foreign_file_is_refused(tmp_path):
    x, e, _ = _pairs(22, 60)
    path = tmp_path / "probe.npz"
    agreement.save(path, agreement.fit(x, e))
    whole = path.read_bytes()
    flipped = whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:]
    for damaged in (b"", b"{}", whole[: len(whole) // 2], flipped):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="probe.npz"):
            agreement.load(path)
    np.savez(path, a=np.zeros(3))
    with pytest.raises(UserError, match="damaged"):
        agreement.load(path)
    with pytest.raises(UserError, match="none.npz"):
        agreement.load(tmp_path / "none.npz")


def test_mistakes_say_what_is_wrong():
    x, e, _ = _pairs(23, 60)
    probe = agreement.fit(x, e)
    with pytest.raises(UserError, match="60 images, 59 captions"):
        agreement.fit(x, e[1:])
    with pytest.raises(UserError, match="60 images and 59 captions"):
        agreement.score(probe, x, e[1:])
    with pytest.raises(UserError, match="fitted on features of width 40, these have 39"):
        agreement.score(probe, x[:, 1:], e)
    with pytest.raises(UserError, match="fitted on embeddings of width 24, these have 23"):
        agreement.score(probe, x, e[:, 1:])
    with pytest.raises(UserError, match="not finite"):
        agreement.score(probe, np.full_like(x, np.inf), e)
    with pytest.raises(UserError, match="at least 5 groups, there are 1"):
        agreement.fit(x, e, groups_N=np.zeros(60))
    with pytest.raises(UserError, match="2 distinct captions"):
        agreement.sanity(probe, x[:3], np.tile(e[:1], (3, 1)))
