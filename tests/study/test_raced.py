"""A racing sweep: fewer pictures, records that say their round, and a resume by them alone."""

import dataclasses
import json
import re
import shutil
import types

import jax
import numpy as np
import pytest

from ldm_scaling import config as config_lib
from ldm_scaling.config import Data, Study, Sweep
from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.errors import UserError
from ldm_scaling.metrics import bootstrap
from ldm_scaling.metrics.frechet import ReferenceStats, frechet_from_features
from ldm_scaling.metrics.moments import Moments
from ldm_scaling.models import zoo
from ldm_scaling.models.cost import Cost
from ldm_scaling.sampling import packing, solvers
from ldm_scaling.sampling.lanes import Finished
from ldm_scaling.study import curves, raced, records, report, sweep
from ldm_scaling.study import subject as subject_lib
from ldm_scaling.study.scorer import FRECHET
from ldm_scaling.study.statistics import blocks, racing
from ldm_scaling.study.sweep import Bench, Prompts

D, IMAGES = 12, 256
RATES = (1.0, 2.0, 4.0, 8.0)
REAL = ReferenceStats(Moments(10**6, np.zeros(D), np.eye(D) * (10**6 - 1)), "planted")
STUDY = Study(
    members=("c8",), reference="c8", data=Data(validation_pictures=4 * IMAGES),
    sweep=Sweep(samplers=("ddim", "dpmpp_2m"), steps=(2, 8), guidance=RATES, num_images=IMAGES,
                batch_size=32, strategy="racing"),
)
GRID = dataclasses.replace(STUDY, sweep=dataclasses.replace(STUDY.sweep, strategy="grid"))


class _Killed(Exception):
    pass


class _Scorer:
    hash = "planted"

    def __init__(self, most=10**9):
        self.drawn, self.most = 0, most

    def features(self, images_NHWC):
        self.drawn += len(images_NHWC)
        if self.drawn > self.most:
            raise _Killed
        return images_NHWC.reshape(len(images_NHWC), D)

    def score(self, x_ND, embeddings_NE, seed, images=0):
        """As `Scorer.score`, without captions."""
        assert len(x_ND) == len(embeddings_NE)
        if seed is None:
            return {FRECHET: frechet_from_features(x_ND, REAL)}, {}, {}
        found = racing.frechet_score(x_ND, REAL, images or len(x_ND), 30, seed)
        drawn_R = found.replicates_R
        ends = bootstrap.interval(drawn_R, len(x_ND) - 1)
        return {FRECHET: found.loss}, {FRECHET: ends}, {FRECHET: drawn_R.tolist()}


def _picture(index, steps, rate):
    """Features that a picture of this number has: nearest to real ones at rate 4 of 2 steps."""
    shared = np.random.default_rng(index).normal(size=D)
    own = np.random.default_rng([index, steps, int(rate)]).normal(size=D)
    away = np.log2(rate) - (2 if steps == 2 else 1)
    mean = np.full(D, 2 + away**2 / 4) / np.sqrt(D)
    return mean + 0.95 * shared + 0.3 * own


class _Drawer:
    batch_size, program = 32, {}
    mesh = types.SimpleNamespace(devices=np.array(jax.devices()[:1]))

    def plans(self, configurations):
        return [types.SimpleNamespace(lanes=32, rows=1, useful_rows=32)]

    def split(self, configurations):
        return packing.split(configurations)

    def table(self, name, steps, spacing):
        return solvers.make(name, schedule_lib.get("sd"), steps, "v", spacing)

    def seconds(self, *_):
        return 0.1, 0.2

    def draw(self, params, configurations, ctx_PLD, key, condition_PHWC=None):
        for number, c in enumerate(configurations):
            block = _prompts(c.index_N[0] // IMAGES)
            np.testing.assert_array_equal(c.index_N, block.index_N[c.prompt_N])
            for part in np.array_split(np.arange(len(c.index_N)), 3):
                x = np.stack([_picture(c.index_N[j], c.table.calls, c.guidance) for j in part])
                x = x.reshape(len(part), 2, 2, 3).astype(np.float32)
                yield Finished(np.full(len(part), number), part, x, len(part), True)

    def decode(self, latents_JHWC, name, on_broken):
        return latents_JHWC


def _prompts(block):
    index = np.arange(IMAGES) + block * IMAGES
    return Prompts(index, np.zeros((IMAGES, 1, 1)), np.zeros((IMAGES, 1)), ("",) * IMAGES)


def _bench(workdir, most=10**9):
    return Bench(
        spec=zoo.get("c8").spec, drawer=_Drawer(), params=None, cost=Cost(10, 1.0),
        reference_cost=Cost(10, 1.0), scorer=_Scorer(most), prompts=_prompts,
        directory=workdir / "records", strips=workdir / "strips",
    )


def _run(workdir, study=STUDY, most=10**9):
    bench = _bench(workdir, most)
    progress = types.SimpleNamespace(update=lambda *_: None)
    return sweep.run(subject_lib.of_member(study, "c8"), bench, progress), bench.scorer.drawn


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("raced")
    return workdir, *_run(workdir)


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    return _run(tmp_path_factory.mktemp("grid"), GRID)


def _contents(workdir):
    return {p.name: p.read_text() for p in (workdir / "records").iterdir()}


def test_it_draws_a_quarter_and_chooses_as_the_grid_does(unbroken, grid):
    _, found, drawn = unbroken
    full, drawn_full = grid
    cells = 4
    assert drawn_full == cells * (len(RATES) + 1) * IMAGES
    assert drawn - cells * IMAGES <= cells * len(RATES) * IMAGES / 4  # The report block aside.
    raced_rates, grid_rates = (curves.best_guidance(r, FRECHET) for r in (found, full))
    assert raced_rates == grid_rates
    # What is reported is the same pictures, to the last digit.
    a, b = (curves.quality_curves(r, FRECHET) for r in (found, full))
    assert {k: [p.value for p in v] for k, v in a.items()} == {
        k: [p.value for p in v] for k, v in b.items()}


def test_blocks_that_report_are_added_to_a_sweep_that_is_whole(unbroken, tmp_path):
    """Old records stay, each chosen rate is measured on the new blocks, and the mean is reported;
    killed on the way it goes on."""
    more = dataclasses.replace(STUDY, sweep=dataclasses.replace(STUDY.sweep, more_blocks=(3, 2)))
    workdir, found, _ = unbroken
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    old = _contents(tmp_path)
    with pytest.raises(_Killed):
        _run(tmp_path, more, most=5 * IMAGES)
    wider, drawn = _run(tmp_path, more)
    assert drawn == (8 - 5) * IMAGES  # Of 4 cells on 2 blocks.
    assert old.items() < _contents(tmp_path).items()
    subject = subject_lib.of_member(more, "c8")
    assert subject_lib.existing(subject, "planted", tmp_path / "records") == wider
    assert len(wider) == len(subject_lib.planned(subject)) == len(found) + 8
    assert all(r.replicates[FRECHET] and not r.round for r in wider if r.identity.seed_block)
    pooled = curves.quality_curves(blocks.pooled(wider, 0, more.sweep.report_blocks), FRECHET)
    for p in (p for points in pooled.values() for p in points):
        own = [_picture(k, p.steps, p.guidance) for k in range(IMAGES, 4 * IMAGES)]
        parts = np.split(np.array(own, np.float32), 3)
        assert p.value == pytest.approx(np.mean([frechet_from_features(x, REAL) for x in parts]))


def test_records_say_their_round_and_number_and_score_the_first_pictures(unbroken):
    workdir, found, _ = unbroken
    after = raced.rounds(STUDY.sweep)
    for r in records.read_all(workdir / "records"):
        i = r.identity
        if i.seed_block == 0:
            assert i.num_images == after[r.round - 1] and r.replicates[FRECHET]
        else:
            assert (r.round, i.num_images) == (0, IMAGES)
        index = np.arange(i.num_images) + IMAGES * i.seed_block
        x = np.stack([_picture(k, i.steps, i.guidance) for k in index]).astype(np.float32)
        if r.round:  # Foretold for the whole block, from the first pictures.
            want = racing.frechet_score(x, REAL, IMAGES, 30, 0).loss
        else:
            want = frechet_from_features(x, REAL)
        assert r.metrics[FRECHET] == pytest.approx(want, rel=1e-6)
    last = [r for r in found if r.identity.seed_block == 0]
    assert len(last) == 4 * len(RATES)  # Each rate's last round, once.
    assert {r.round for r in last} == {1, 2}
    assert not any((workdir / "features").iterdir())


@pytest.mark.parametrize("lose", [False, True], ids=["features kept", "features lost"])
def test_killed_again_and_again_it_ends_with_the_same_records(unbroken, tmp_path, lose):
    workdir, found, drawn = unbroken
    kills = 0
    while True:
        try:
            again, _ = _run(tmp_path, most=400)
            break
        except _Killed:
            kills += 1
            assert kills < 30
            if lose:
                for path in (tmp_path / "features").glob("*"):
                    path.unlink()
    assert kills >= 3
    assert _contents(tmp_path) == _contents(workdir)
    assert again == found


@pytest.mark.parametrize("change", [{"guidance": (*RATES, 16.0)}, {"strategy": "grid"}],
                         ids=["more rates", "a grid"])
def test_no_features_stay_of_a_race_that_was_changed_on_its_way(tmp_path, change):
    """Those of another network's race do: it may go on."""
    with pytest.raises(_Killed):
        _run(tmp_path, most=400)
    one = next(r for r in records.read_all(tmp_path / "records") if r.round)
    other = dataclasses.replace(one, identity=dataclasses.replace(one.identity, model="c16"))
    records.write(tmp_path / "records", other)
    path = raced.before(tmp_path / "features", other.identity, other.identity.num_images)
    raced.keep(path, np.zeros((2, D)))
    changed = dataclasses.replace(STUDY.sweep, **change)
    _run(tmp_path, dataclasses.replace(STUDY, sweep=changed))
    assert [p.name for p in (tmp_path / "features").iterdir()] == [path.name]


def test_what_is_there_is_what_was_planned_once_the_sweep_is_whole(unbroken, tmp_path):
    workdir, found, drawn = unbroken
    there = subject_lib.existing(subject_lib.of_member(STUDY, "c8"), "planted", workdir / "records")
    planned = subject_lib.planned(subject_lib.of_member(STUDY, "c8"))
    assert len(there) == len(planned) == len(found)
    assert sum(i.num_images for i in planned) >= sum(r.identity.num_images for r in there) == drawn
    assert subject_lib.existing(subject_lib.of_member(STUDY, "c8"), "planted", tmp_path) == []
    _, anew = _run(workdir)
    assert anew == 0


def test_the_report_shows_a_raced_sweep(unbroken, tmp_path):
    workdir, found, _ = unbroken
    told = report.Context()
    text = report.write(tmp_path, found, tmp_path / "none", told).read_text("utf-8")
    whole = report.write(tmp_path, records.read_all(workdir / "records"), tmp_path / "none", told)
    assert "raced" in text and "raced" in whole.read_text("utf-8")
    # Each point of the curves has the pictures that its record drew.
    page = report.write(tmp_path, found, tmp_path / "none", told, [workdir / "strips"])
    images = re.search(r'id="study-images">(.*?)</script>', page.read_text("utf-8"), re.S).group(1)
    points = [p for c in curves.quality_curves(found, FRECHET).values() for p in c]
    assert json.loads(images)["points"].keys() == {
        f"{p.model}\n{p.sampler}\n{p.steps}" for p in points}


def test_a_round_waits_for_the_races_behind(unbroken):
    """A record that is lost takes its race back to that round; the others wait."""
    workdir, found, _ = unbroken
    grid = subject_lib.selection(subject_lib.of_member(STUDY, "c8"), "planted")
    first = next(r for r in records.read_all(workdir / "records") if r.round == 1)
    path = records.path_of(workdir / "records", first.identity.key)
    text = path.read_text()
    path.unlink()
    now = raced.next_round(STUDY.sweep, grid, workdir / "records", FRECHET)
    path.write_text(text)
    assert (now.number, now.start, now.stop) == (1, 0, raced.rounds(STUDY.sweep)[0])
    assert {(i.sampler, i.steps) for i in now.identities} == {
        (first.identity.sampler, first.identity.steps)}
    assert raced.next_round(STUDY.sweep, grid, workdir / "records", FRECHET) is None


@pytest.mark.parametrize("change, said", [
    ({"num_images": 90}, "race of 4 rates that saves 4 times would start with 15 pictures"),
    ({"guidance": (2.0,)}, "a race needs two rates"),
    ({"strategy": "halving"}, "is grid or racing"),
    ({"saving": 0.5}, "at least 1"),
])
def test_a_config_that_cannot_race_is_refused_at_once(change, said):
    sweep_dict = dataclasses.asdict(STUDY.sweep) | change
    tree = dataclasses.asdict(STUDY) | {"sweep": sweep_dict}
    with pytest.raises(UserError, match=said):
        config_lib.parse(tree)
