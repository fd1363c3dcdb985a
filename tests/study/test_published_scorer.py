"""Metrics of published networks in a sweep: the numbers of `ldm-scaling evaluate`."""

import dataclasses
import re
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from ldm_scaling.config import Cascade, Consistency, Sweep
from ldm_scaling.config.measuring import RESTORED
from ldm_scaling.data import image_folder
from ldm_scaling.errors import UserError
from ldm_scaling.metrics import bootstrap, fidelity, foretold, prdc
from ldm_scaling.study import evaluate, labels, published_scorer, scores, sweep_checks, weights
from ldm_scaling.study.features import ImageSet
from ldm_scaling.study.published_scorer import WithPublished
from tests.study import fake_networks

NAMES = ("fid_tf2015", "inception_score", "clip_score_b32", "fid_clean")
PRDC = scores.GROUPS["prdc"]
# Those that are held against features of real pictures.
FEATURES = ("kid_tf2015", *PRDC, "cmmd")
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
    published = _load(tmp_path / "reference", real, (*NAMES, *FEATURES))
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
    for score in evaluate.score(scores.rows((*NAMES, *FEATURES)), task, options):
        assert metrics[score.name] == pytest.approx(score.value, rel=1e-5), score.name
        assert intervals[score.name] == pytest.approx(score.interval, rel=1e-4), score.name
        assert len(replicates[score.name]) == REPLICATES
        if score.name in FEATURES:
            assert (metrics[score.name], intervals[score.name]) == (score.value, score.interval)
    assert metrics["own"] == pytest.approx(drawn[:, 0, 0].mean())
    assert set(metrics) == {"own", *NAMES, *FEATURES}
    assert scorer.score(x_NF, embeddings_NE, None)[1].keys() == {"own"}


def test_statistics_are_kept_and_belong_to_their_network(tmp_path):
    real = _pictures(1, 40)
    first = _load(tmp_path, real)
    again = published_scorer.load(NAMES, tmp_path, lambda: pytest.fail("looked at anew"))
    assert again.hash == first.hash != _load(tmp_path / "other", _pictures(2)).hash
    assert first.hash != _load(tmp_path, real, NAMES[:2]).hash


def test_features_of_some_real_pictures_are_kept(tmp_path, monkeypatch):
    """Of any, not of the first; which ones is the same again; one pass makes all that lacks."""
    real = _pictures(1, 40)
    names, passes = ("fid_tf2015", *FEATURES), []
    whole = _load(tmp_path, real, names)
    assert whole.hash == published_scorer.load(
        names, tmp_path, lambda: pytest.fail("looked at anew")).hash
    monkeypatch.setattr(published_scorer, "MOST_REAL", 10)
    some = published_scorer.load(
        names, tmp_path, lambda: passes.append(1) or np.array_split(real, 3))
    again = published_scorer.load(
        names, tmp_path / "other", lambda: passes.append(1) or np.array_split(real, 5))
    assert len(passes) == 2 and some.hash != whole.hash
    for key, x_MD in some.real.items():
        assert len(x_MD) == 10 and x_MD.dtype == np.float32
        np.testing.assert_array_equal(x_MD, again.real[key])
        places = [int((whole.real[key] == row).all(axis=1).argmax()) for row in x_MD]
        assert len(set(places)) == 10 and max(places) > 20
        np.testing.assert_array_equal(x_MD, whole.real[key][places])
    (path,) = tmp_path.glob("inception_tf2015_*_10.npz")
    assert published_scorer.kept(names, tmp_path) and published_scorer.kept((), tmp_path / "none")
    assert not published_scorer.kept(names, tmp_path / "none")
    path.rename(tmp_path / "aside")
    assert not published_scorer.kept(names, tmp_path)
    assert published_scorer.kept(["fid_tf2015"], tmp_path)
    (tmp_path / "aside").rename(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=rf"{path}.*damaged"):
        _load(tmp_path, real, names)


def test_scores_of_one_pass_share_it(tmp_path):
    published = _load(tmp_path, _pictures(1, 40), FEATURES)
    x_NF, none_NE = published.features(_pictures(0)), np.zeros((COUNT, 0))
    with mock.patch.object(prdc, "replicates", wraps=prdc.replicates) as calls:
        published.score(x_NF, none_NE, bootstrap.resample_counts(COUNT, REPLICATES, SEED))
    assert calls.call_count == 1


def test_what_a_race_cannot_foretell_is_left_out(tmp_path):
    """A share of the real pictures rises with the number of those drawn; KID does not."""
    names = ("inception_score", *FEATURES)
    published = _load(tmp_path, _pictures(1, 40), names)
    x_NF, none_NE = published.features(_pictures(0)), np.zeros((COUNT, 0))
    counts_RN = bootstrap.resample_counts(COUNT, REPLICATES, SEED)
    now, *_ = published.score(x_NF, none_NE, counts_RN, COUNT)
    later, intervals, drawn = published.score(x_NF, none_NE, counts_RN, 200)
    free = ("kid_tf2015", "precision", "density")
    assert set(now) == set(names)
    assert set(later) == set(intervals) == set(drawn) == {"cmmd", *free}
    assert {name: later[name] for name in free} == {name: now[name] for name in free}
    assert later["cmmd"] < now["cmmd"]


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
    ({"metrics": ("fid",)}, ("sweep.metrics", "'fid'", "group", "fid_tf2015")),
    ({"metrics": ("fids",)}, ("sweep.metrics='fids'", "choose of", "kd_effnetlite0")),
    ({"metrics": ("fd_effnetlite0",)}, ("sweep.metrics", "own Fréchet distance")),
    ({"metrics": ("lpips_vgg",)}, ("sweep.metrics", "no real picture of its own")),
    ({"metrics": ("dino",)}, ("sweep.metrics", "DreamBooth's subjects")),
    ({"metrics": ("clip_t",)}, ("sweep.metrics", "clip_score_b32")),
    ({"metrics": ("fid_infinity_clean",)}, ("sweep.metrics", "an hour or more")),
    ({"metrics": ("coverage",), "num_images": 11}, ("sweep.num_images=11", "at least 12")),
    ({"metrics": ("inception_score",), "num_images": 9}, ("sweep.num_images=9", "at least 10")),
    ({"metrics": ("recall",), "choose_by": "recall", "strategy": "racing"},
     ("sweep.choose_by", "races are decided by a distance")),
    ({"metrics": ("fid_clean",) * 2}, ("sweep.metrics", "twice")),
    ({"choose_by": "fid_clean"}, ("sweep.choose_by", "sweep.metrics")),
    ({"metrics": ("clip_score_l14",), "choose_by": "clip_score_l14", "strategy": "racing"},
     ("sweep.choose_by", "races are decided by a distance")),
])  # fmt: skip
def test_contradictions(keys, parts):
    with pytest.raises(UserError, match=".*".join(map(re.escape, parts))):
        sweep_checks.check("sweep", Sweep(**keys))


@pytest.mark.parametrize("name", ["kid_clean", "cmmd", "kd_effnetlite0", "fd_dinov2"])
def test_distances_decide_races(name):
    sweep_checks.check("sweep", Sweep(metrics=(name,), choose_by=name, strategy="racing"))


def test_students_and_cascades_are_judged_as_members_are():
    for part, name in ((Consistency, "consistency"), (Cascade, "cascade")):
        with pytest.raises(UserError, match=rf"{name}.sweep.metrics.*say it in sweep.metrics"):
            part(sweep=Sweep(metrics=("fid_clean",)))
    members = Sweep(metrics=("fid_clean",), choose_by="fid_clean")
    of_students = Sweep(steps=(1, 2)).judged_as(members)
    assert of_students.choose_by == "fid_clean" and of_students.steps == (1, 2)


def test_restored_pictures_have_no_captions():
    sweep = Sweep(metrics=("clip_score_l14",), guidance=(1.0,))
    with pytest.raises(UserError, match="finetune.sweep.metrics.*no captions"):
        sweep_checks.check("finetune.sweep", sweep, restored=True)


@pytest.mark.parametrize("name", RESTORED)
def test_guidance_of_fine_tuned_members_is_chosen_by_what_their_records_hold(name):
    sweep_checks.check("finetune.sweep", Sweep(choose_by=name), restored=True)
    with pytest.raises(UserError, match=r"sweep\.choose_by.*it is of restored pictures"):
        sweep_checks.check("sweep", Sweep(choose_by=name))


@pytest.mark.parametrize("name, why", [
    ("psnr_rgb", "by the name psnr"), ("clip_score_b32", "no captions"),
])
def test_what_is_not_measured_of_restored_pictures_is_not_offered(name, why):
    with pytest.raises(UserError, match=rf"metrics.*{why}"):
        sweep_checks.check("finetune.sweep", Sweep(metrics=(name,)), restored=True)
    with pytest.raises(UserError, match="psnr_y") as caught:
        sweep_checks.check("finetune.sweep", Sweep(metrics=("none",)), restored=True)
    assert f" {name}" not in str(caught.value)


@pytest.mark.parametrize("name", RESTORED)
def test_what_every_record_of_restored_pictures_has_is_told(name):
    with pytest.raises(UserError, match=rf"choose_by.*psnr_y.*of fine-tuning also .*{name}"):
        Sweep(choose_by="psnr_y")
    sweep = Sweep(metrics=(name,))
    with pytest.raises(UserError, match=r"every record of restored.*finetune.sweep.choose_by may"):
        sweep_checks.check("finetune.sweep", sweep, restored=True)
    with pytest.raises(UserError, match=rf"choose of .*psnr_y, ssim_y; every record has .*{name}"):
        sweep_checks.check("finetune.sweep", Sweep(metrics=("none",)), restored=True)


def test_scores_of_pairs_are_those_of_evaluate(tmp_path):
    """Each restored picture beside its own real one, beside scores of images alone."""
    rng = np.random.default_rng(0)
    real = rng.integers(0, 256, (4, 64, 64, 3), np.uint8)
    drawn = np.clip(real + rng.normal(0, 9, real.shape), 0, 255).astype(np.uint8)
    found = published_scorer.load(
        ("psnr_y", "ssim_y", "kd_effnetlite0"), tmp_path, lambda: iter([real]))
    x_NF = found.features(drawn, real)
    values, *_ = found.score(x_NF, np.zeros((4, 0), np.float32), None)
    pairs = [(a[None], b[None]) for a, b in zip(drawn, real)]
    for name, measure in (("psnr_y", fidelity.psnr), ("ssim_y", fidelity.ssim)):
        wanted = np.mean([measure(a, b, luma=True) for a, b in pairs])
        assert values[name] == pytest.approx(wanted, rel=1e-6)
    assert set(values) == {"psnr_y", "ssim_y", "kd_effnetlite0"}


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
    """And has words of its own for readers."""
    for restored in (False, True):
        known = [row for row in scores.SCORES.values() if not scores.unswept(row, restored)]
        pairs = {"psnr_y", "ssim_y", "lpips_alex", "lpips_vgg", "stlpips_vgg"}
        names = {row.name for row in known}
        assert names & pairs == (pairs if restored else set())
        assert names >= {*FEATURES, "kd_effnetlite0"} | (set() if restored else {*NAMES})
        for row in known:
            sweep_checks.check("sweep", Sweep(metrics=(row.name,)), restored)
            assert row.definition.better == labels.MEASURES[row.name].better
