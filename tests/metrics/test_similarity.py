"""Cosines against plain formulas and torchmetrics' arithmetic."""

import numpy as np
import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import catalog, similarity


def _pair(seed, n=12, e=16, near=1.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, e))
    return x, near * x + rng.normal(size=(n, e))


def test_pair_cosines_are_what_torchmetrics_takes_the_mean_of():
    torch = pytest.importorskip("torch", reason="compares with peers: pip install -e '.[parity]'")
    functional = pytest.importorskip("torch.nn.functional")
    for near in (1.0, -1.0):  # Captions that fit, and captions that say the opposite.
        x, y = _pair(0, near=near)
        cosine_N = functional.cosine_similarity(torch.from_numpy(x), torch.from_numpy(y))
        np.testing.assert_allclose(similarity.pair_cosines(x, y), cosine_N.numpy(), rtol=1e-12)


def test_subject_cosines_are_the_mean_over_pairs_of_the_subject():
    (x, _), (y, _) = _pair(1, 20, 8), _pair(2, 15, 8)
    mine, real = np.arange(20) % 3, np.arange(15) % 3

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    exact = [np.mean([cosine(a, b) for b in y[real == s]]) for a, s in zip(x, mine)]
    names = np.array(["dog", "backpack", "teapot"])
    found = similarity.subject_cosines(x, y, names[mine], names[real])
    np.testing.assert_allclose(found, exact, rtol=1e-10)
    alone = similarity.subject_cosines(x[mine == 1], y[real == 1])
    np.testing.assert_allclose(found[mine == 1], alone)


def test_mistakes_say_what_is_wrong():
    x, y = _pair(3)
    with pytest.raises(UserError, match="12 images and 11 captions"):
        similarity.pair_cosines(x, y[:11])
    with pytest.raises(UserError, match="width 16 .* width 9"):
        similarity.pair_cosines(x, y[:, :9])
    with pytest.raises(UserError, match="row of zeros, row 3"):
        similarity.pair_cosines(x * (np.arange(12) != 3)[:, None], y)
    with pytest.raises(UserError, match="a mean over them needs 1"):
        catalog.METRICS["clip_score"].function(x[:0], y[:0], None, ())
    with pytest.raises(UserError, match="subject 1 has generated images and no real one"):
        similarity.subject_cosines(x, y, np.arange(12) % 2, np.zeros(12))
    with pytest.raises(UserError, match="on one side only"):
        similarity.subject_cosines(x, y, np.zeros(12))
    with pytest.raises(UserError, match="12 and 3 subjects"):
        similarity.subject_cosines(x, y, np.zeros(12), np.zeros(3))
