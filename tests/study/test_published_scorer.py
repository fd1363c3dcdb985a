"""Metrics of published networks in a sweep: the numbers of `ldm-scaling evaluate`."""

import dataclasses
import re

import numpy as np
import pytest
from PIL import Image

from ldm_scaling.config import Cascade, Consistency, FineTune, Sweep, measuring
from ldm_scaling.data import image_folder
from ldm_scaling.errors import UserError
from ldm_scaling.metrics import bootstrap, foretold
from ldm_scaling.study import evaluate, labels, published_scorer, scores, weights
from ldm_scaling.study.features import ImageSet
from ldm_scaling.study.published_scorer import WithPublished
from tests.study import fake_networks

NAMES = ("fid_tf2015", "inception_score", "clip_score_b32", "fid_clean")
COUNT, SEED, REPLICATES = 24, 1, 30


@pytest.fixture(autouse=True)
def networks(tmp_path):
    (tmp_path / "weights").mkdir()
    with fake_networks.instead(tmp_path / "weights"):
        yield


def _pictures(seed, count=COUNT):
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), np.uint8)


def _load(folder, real, names=NAMES):
    return published_scorer.load(names, folder, lambda: np.array_split(real, 3))


def _folder(path, images):
    path.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(path / f"{number:03}.png")
    return ImageSet(image_folder.listing(path))


@dataclasses.dataclass(frozen=True)
class _Own:
    hash: str = "own"
    replicates: int = REPLICATES

    def features(self, images_NHWC):
        return images_NHWC[:, 0, 0].astype(np.float32)

    def score(self, x_ND, embeddings_NE, seed, images=0):
        assert (x_ND.shape[1], embeddings_NE.shape[1]) == (3, 2)
        return {"own": float(x_ND.mean())}, {"own": (0.0, 1.0)}, {"own": [1.0]}


def test_the_numbers_are_those_of_evaluate(tmp_path):
    """Values, intervals and all; the scorer's own stay what they are."""
    drawn, real, captions = _pictures(0), _pictures(1, 40), [f"a {i}" for i in range(COUNT)]
    published = _load(tmp_path / "reference", real)
    scorer = WithPublished(_Own(), published)
    embeddings_NE = np.concatenate(
        [np.zeros((COUNT, 2), np.float32), published.embeddings(captions)], axis=1
    )
    # A part at a time, as pictures come behind a sampler.
    x_NF = np.concatenate([scorer.features(part) for part in np.array_split(drawn, 4)])
    metrics, intervals, replicates = scorer.score(x_NF, embeddings_NE, SEED)
    task = evaluate.Task(
        _folder(tmp_path / "drawn", drawn), _folder(tmp_path / "real", real), tuple(captions)
    )
    options = evaluate.Options(weights.folder(None), tmp_path / "cache", REPLICATES, SEED)
    for score in evaluate.score(scores.rows(NAMES), task, options):
        assert metrics[score.name] == pytest.approx(score.value, rel=1e-5), score.name
        assert intervals[score.name] == pytest.approx(score.interval, rel=1e-4), score.name
        assert len(replicates[score.name]) == REPLICATES
    assert metrics["own"] == pytest.approx(drawn[:, 0, 0].mean())
    assert set(metrics) == {"own", *NAMES}
    assert scorer.score(x_NF, embeddings_NE, None)[1].keys() == {"own"}


def test_statistics_are_kept_and_belong_to_their_network(tmp_path):
    real = _pictures(1, 40)
    first = _load(tmp_path, real)
    again = published_scorer.load(NAMES, tmp_path, lambda: pytest.fail("looked at anew"))
    assert again.hash == first.hash != _load(tmp_path / "other", _pictures(2)).hash
    assert first.hash != _load(tmp_path, real, NAMES[:2]).hash


def test_a_race_s_distances_are_foretold(tmp_path):
    published = _load(tmp_path, _pictures(1, 40), ("fid_tf2015",))
    x_NF, none_NE = published.features(_pictures(0)), np.zeros((COUNT, 0))
    counts_RN = bootstrap.resample_counts(COUNT, REPLICATES, SEED)
    now, *_ = published.score(x_NF, none_NE, counts_RN)
    later, _, drawn = published.score(x_NF, none_NE, counts_RN, 200)
    (reference,) = published.references.values()
    halves = bootstrap.frechet_replicates(x_NF, reference, counts_RN).mean()
    want = foretold.foretold(now["fid_tf2015"], halves, COUNT, 200, reference)
    assert later["fid_tf2015"] == pytest.approx(want) and want < now["fid_tf2015"]
    assert np.mean(drawn["fid_tf2015"]) == pytest.approx(want)


def test_weights_that_are_missing_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv(weights.VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match=rf"clip_score_b32 needs CLIP ViT-B/32.*{tmp_path}"):
        published_scorer.require(("clip_score_b32",))
    monkeypatch.delenv(weights.VARIABLE)
    with pytest.raises(UserError) as caught:
        published_scorer.require(("fid_tf2015", "fid_clean"))
    assert "fid_tf2015, fid_clean need Inception" in str(caught.value)
    assert "--weights" not in str(caught.value) and weights.VARIABLE in str(caught.value)


@pytest.mark.parametrize("keys, parts", [
    ({"metrics": ("fid",)}, ("sweep.metrics", "'fid'", "fid_tf2015")),
    ({"metrics": ("fid_clean",) * 2}, ("sweep.metrics", "twice")),
    ({"choose_by": "fid_clean"}, ("sweep.choose_by", "sweep.metrics")),
    ({"metrics": ("clip_score_l14",), "choose_by": "clip_score_l14", "strategy": "racing"},
     ("sweep.choose_by", "races are decided by a distance")),
])  # fmt: skip
def test_contradictions(keys, parts):
    with pytest.raises(UserError, match=".*".join(map(re.escape, parts))):
        Sweep(**keys)


def test_students_and_cascades_are_judged_as_members_are():
    for part, name in ((Consistency, "consistency"), (Cascade, "cascade")):
        with pytest.raises(UserError, match=rf"{name}.sweep.metrics.*say it in sweep.metrics"):
            part(sweep=Sweep(metrics=("fid_clean",)))
    members = Sweep(metrics=("fid_clean",), choose_by="fid_clean")
    of_students = Sweep(steps=(1, 2)).judged_as(members)
    assert of_students.choose_by == "fid_clean" and of_students.steps == (1, 2)


def test_restored_pictures_have_no_captions():
    sweep = Sweep(metrics=("clip_score_l14",), guidance=(1.0,))
    with pytest.raises(UserError, match="no captions"):
        FineTune(task="inpainting", sweep=sweep)


def test_what_guidance_trades():
    """A distance against how pictures agree with captions, by CLIP where it is there."""
    held = ["fd_effnetlite0", "caption_agreement", "fid_clean", "clip_score_b32", "clip_score_l14"]
    for metric, shown, other in (
        ("fid_clean", held, "clip_score_l14"), ("fid_clean", held[:4], "clip_score_b32"),
        ("fid_clean", held[:3], "caption_agreement"),
        ("fd_effnetlite0", held[:3:2], "fid_clean"),
        ("clip_score_l14", held, "fd_effnetlite0"), ("fid_clean", ["fid_clean"], None),
    ):
        assert labels.traded(metric, shown) == other


def test_what_a_config_may_name_is_what_evaluate_knows():
    for row in scores.rows(measuring.PUBLISHED):
        assert row.definition.better == labels.measure(row.name).better
        distance = row.definition.against == "statistics"
        assert distance == (row.name in measuring.PUBLISHED_FRECHET)
        assert (row.definition.against == "captions") == (row.name in measuring.CAPTION_SCORES)
