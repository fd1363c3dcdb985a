"""A Stable Diffusion folder and what `convert` makes of its parts; made and saved by diffusers."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import safetensors.numpy

from ldm_scaling import __version__, cli
from ldm_scaling.errors import UserError
from ldm_scaling.models import convert, converted, pretrained, sd_folder
from tests import published as mini

WHY = "makes the model with its own libraries: pip install -e '.[parity]'"
diffusers = pytest.importorskip("diffusers", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
torch = pytest.importorskip("torch", reason=WHY)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    mini.pipeline(folder, version=2)
    return folder / "sd"


@pytest.fixture
def sd(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "sd")


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- the folder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lost, says", [
    (["unet/config.json"], "lacks unet/config.json"),
    (["vae/diffusion_pytorch_model.safetensors"], "lacks vae/diffusion_pytorch_model.safetensors"),
    (["text_encoder"], "lacks text_encoder/config.json, text_encoder/model.safetensors"),
    (["tokenizer", "scheduler"],
     "lacks tokenizer/vocab.json, tokenizer/merges.txt, scheduler/scheduler_config.json"),
    (["."], "is not there"),
])
def test_what_is_missing_is_named_with_where_to_get_it(sd, lost, says):
    for name in lost:
        place = sd / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    with pytest.raises(UserError) as e:
        sd_folder.read(sd)
    for part in (says, f"https://huggingface.co/{sd_folder.REPOSITORY}", f"into {sd}", "convert"):
        assert part in str(e.value)


def test_a_folder_at_home(sd, monkeypatch):
    monkeypatch.setenv("HOME", str(sd.parent))
    assert sd_folder.read(f"~/{sd.name}").folder == sd


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("file, values, says", [
    ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "describes a Stable.*XL"),
    ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "beta_schedule='linear' is n"),
    ("scheduler/scheduler_config.json", {"beta_end": 0.02}, "beta_end=0.02 .* beta_end=0.012"),
    ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "'flow' is not supported"),
    ("unet/config.json", {"in_channels": 9}, "takes 9 channels and gives 4.*inpainting"),
    ("unet/config.json", {"cross_attention_dim": 32}, "width 32, but the text tower's are 24 wide"),
    ("vae/config.json", {"latents_mean": [0.0] * 4}, "latents_mean"),
    ("vae/config.json", {"block_out_channels": 16}, "block_out_channels=16 must be"),
    ("vae/config.json", {"down_block_types": None}, "down_block_types=None is not supported"),
    ("text_encoder/config.json", {"model_type": "t5"}, "no CLIP text tower: model_type='t5'"),
])
def test_what_is_not_supported_is_named(sd, file, values, says):
    sd_folder.read(sd)
    change(sd / file, **values)
    with pytest.raises(UserError, match=says):
        sd_folder.read(sd)


def test_a_latent_scale_is_a_number_above_0_or_the_usual_one(sd):
    for value in (0, -1.0, "x"):
        change(sd / "vae/config.json", scaling_factor=value)
        with pytest.raises(UserError, match=f"scaling_factor={value!r} is not supported: a num"):
            convert.load_autoencoder(sd / "vae")
    change(sd / "vae/config.json", scaling_factor=None)
    assert convert.load_autoencoder(sd / "vae")[2] == convert.SCALE


def test_weights_of_any_of_their_files(whole, sd):
    """Halves are found, torch's files, and parts; all are among the files that are hashed."""
    names = sd / "vae" / pretrained.DIFFUSERS[0], sd / "unet" / pretrained.DIFFUSERS[0]
    vae, unet = (safetensors.numpy.load_file(name) for name in names)
    halves = {k: t.astype(np.float16) for k, t in vae.items()}
    safetensors.numpy.save_file(halves, names[0].with_name(pretrained.DIFFUSERS[1]))
    cut = len(unet) // 2
    parts = {f"part-{i}.safetensors": dict(list(unet.items())[i * cut : (i + 1) * cut + i])
             for i in (0, 1)}
    for name, some in parts.items():
        safetensors.numpy.save_file(some, sd / "unet" / name)
    index = {key: name for name, some in parts.items() for key in some}
    (sd / "unet" / f"{names[1].name}.index.json").write_text(json.dumps({"weight_map": index}))
    text = sd / "text_encoder" / "model.safetensors"
    tensors = {k: torch.tensor(t) for k, t in safetensors.numpy.load_file(text).items()}
    torch.save(tensors, text.with_name("pytorch_model.bin"))
    for name in (*names, text):
        name.unlink()
    found, before = sd_folder.read(sd), sd_folder.read(whole)
    same(found.unet_params(), before.unet_params())
    assert found.text_encoder().hash == before.text_encoder().hash
    halved = jax.tree.map(
        lambda t: t.astype(np.float16).astype(np.float32), before.decoder()[0]
    )
    same(found.decoder()[0], halved)
    (sd / "tokenizer/added_tokens.json").write_text("{}")
    hashed = {file.relative_to(sd).as_posix() for file in sd_folder.files(sd)}
    assert {"unet/part-0.safetensors", "unet/part-1.safetensors", "text_encoder/pytorch_model.bin",
            "vae/diffusion_pytorch_model.fp16.safetensors", "unet/config.json",
            "tokenizer/tokenizer.json", "tokenizer/added_tokens.json",
            "scheduler/scheduler_config.json"} <= hashed


@pytest.mark.parametrize("size", ["1KB", "5GB"])
@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_halves_are_found_as_their_libraries_save_them(tmp_path, part, size):
    """Of an index in parts the variant stands elsewhere than of a whole file."""
    if part == "vae":
        names = pretrained.DIFFUSERS
        model = diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8,), decoder_block_out_channels=(8,),
            num_encoder_blocks=(1,), num_decoder_blocks=(1,),
        )
    else:
        names = pretrained.TRANSFORMERS
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig(
            vocab_size=9, max_position_embeddings=3, hidden_size=8, intermediate_size=16,
            num_hidden_layers=1, num_attention_heads=2, bos_token_id=7, eos_token_id=8,
        ))
    tensors = {name: t.numpy() for name, t in model.half().state_dict().items()}
    # transformers no longer saves torch's own files.
    for safe in (True, False)[: 2 if part == "vae" else 1]:
        folder = tmp_path / str(safe)
        model.save_pretrained(folder, variant="fp16", max_shard_size=size, safe_serialization=safe)
        saved = {file for file in folder.iterdir() if "fp16" in file.name}
        assert (len(saved) > 2) == (size == "1KB")
        same(pretrained.read_weights(folder, names=names), tensors)
        assert {*pretrained.weights_files(folder, names)} == saved


# --- convert -------------------------------------------------------------------------------------


def test_converted_parts_stand_in_the_folder(whole, sd, tmp_path):
    """The same model, of the same numbers, from Orbax checkpoints that tell where they are from."""
    before = sd_folder.read(whole)
    kinds = {"unet": "sd_unet", "vae": "sd_autoencoder", "text_encoder": "sd_text"}
    for part, kind in kinds.items():
        shutil.rmtree(sd / part)
        assert converted.write(kind, whole / part, sd / part) == sd / part
    found = sd_folder.read(sd)
    assert found == dataclasses.replace(before, folder=sd)
    same(found.unet_params(), before.unet_params())
    same(found.decoder()[0], before.decoder()[0])
    assert found.decoder()[1] == before.decoder()[1] == 0.5
    assert found.text_encoder().hash == before.text_encoder().hash

    manifest = json.loads((sd / "unet" / "manifest.json").read_text())
    assert manifest["kind"] == "sd_unet" and manifest["version"] == __version__
    assert manifest["source"] == str(whole / "unet")
    for name, digest in manifest["sha256"].items():
        assert digest == hashlib.sha256((whole / name).read_bytes()).hexdigest()
    assert set(manifest["sha256"]) == {"unet/config.json", f"unet/{convert.WEIGHTS}"}
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): [str(leaf.dtype), *leaf.shape]
        for path, leaf in jax.tree_util.tree_leaves_with_path(before.unet_params())
    }
    assert manifest["tensors"] == shapes and manifest["spec"]["heads"] == [2, 4]
    files = {file.relative_to(sd).as_posix() for file in sd_folder.files(sd)}
    assert {f"{part}/manifest.json" for part in kinds} <= files
    with pytest.raises(UserError, match="holds a sd_unet, not a sd_autoencoder"):
        converted.load(sd / "unet", "sd_autoencoder")
    shutil.rmtree(sd / "vae")
    shutil.move(sd / "unet", sd / "vae")
    converted.write("sd_unet", whole / "unet", sd / "unet")
    with pytest.raises(UserError, match="holds a sd_unet, not a sd_autoencoder or a tiny_decoder"):
        sd_folder.read(sd)


TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2}


def whole_clip():
    return transformers.CLIPModel(transformers.CLIPConfig(
        text_config={**TOWER, "vocab_size": 30, "max_position_embeddings": 7},
        vision_config={**TOWER, "image_size": 16, "patch_size": 8}, projection_dim=6,
    ))


def t5():
    return transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=30, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu",
    ))


def dinov2():
    return transformers.Dinov2Model(transformers.Dinov2Config(
        **{k: v for k, v in TOWER.items() if k != "intermediate_size"}, image_size=16, patch_size=8,
    ))


@pytest.mark.parametrize("kind, model, names", [
    ("clip_text", whole_clip, "text_"), ("clip_image", whole_clip, "vis"), ("t5", t5, ""),
    ("dino", dinov2, "(?!.*mask_token)"),
])
def test_other_kinds(tmp_path, kind, model, names):
    """Every stored number of the network arrives, and none else."""
    model = mini.shake(model())
    model.save_pretrained(tmp_path / "theirs")
    converted.write(kind, tmp_path / "theirs", tmp_path / "ours")
    found = converted.load(tmp_path / "ours", kind)
    assert isinstance(found.spec, converted.KINDS[kind].spec)
    # Whatever their layout: the sums of every tensor's numbers.
    theirs = [t for name, t in model.named_parameters() if re.match(names, name)]
    ours = jax.tree.leaves(found.params)
    assert sum(leaf.size for leaf in ours) == sum(t.numel() for t in theirs)
    sums = [sorted(float(x.astype(np.float64).sum()) for x in tensors)
            for tensors in (ours, [t.detach().numpy() for t in theirs])]
    np.testing.assert_allclose(*sums, rtol=1e-9, atol=1e-12)


def test_kinds_options_and_places(whole, tmp_path):
    def refused(match, *arguments, **options):
        with pytest.raises(UserError, match=match):
            converted.write(*arguments, **options)
        assert not list(tmp_path.glob("**/params"))

    unet, target = whole / "unet", tmp_path / "out"
    refused(r"'sd_unett': did you mean sd_unet\? there are sd_unet, sd_autoencoder", "sd_unett",
            unet, target)
    refused("tiny_decoder takes no --ema", "tiny_decoder", unet, target, ema=True)
    refused("folder of diffusers.*leave out --ema", "sd_unet", unet, target, ema=True)
    refused("nothing at .*nowhere: sd_unet is made from this: U-Net", "sd_unet", whole / "nowhere",
            target)
    refused("vae: config.json of AutoencoderKL lacks attention_head_dim.*asked for", "sd_unet",
            whole / "vae", target)
    refused("DINO is called 'dino'", "dino", unet, target, model="dino")
    refused("no original checkpoint", "sd_unet", unet / convert.WEIGHTS, target)
    target.mkdir()
    refused("out is there already: remove it", "sd_unet", unet, target)
    with pytest.raises(UserError, match="holds no converted weights.*ldm-scaling convert"):
        converted.load(unet)


def test_tensors_that_do_not_fit_leave_nothing(sd, tmp_path):
    file = sd / "unet" / convert.WEIGHTS
    tensors = safetensors.numpy.load_file(file)
    name, extra = "conv_in.weight", np.zeros((3, 3), np.float32)
    for wrong, says in (
        ({k: t for k, t in tensors.items() if k != name}, "missing: conv_in/kernel"),
        (tensors | {"surplus.weight": extra}, r"surplus: surplus.weight \(3, 3\)"),
        (tensors | {name: extra[None, None]}, "misshapen: conv_in.weight"),
    ):
        safetensors.numpy.save_file(wrong, file)
        with pytest.raises(UserError, match=rf"do not fit: .*(?s:.*){says}"):
            converted.write("sd_unet", sd / "unet", tmp_path / "out")
        assert not list(tmp_path.glob("*out*"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damage_is_told(whole, tmp_path):
    place = converted.write("sd_autoencoder", whole / "vae", tmp_path / "out")
    file = place / "manifest.json"
    text = file.read_text()
    for broken, says in (
        (text.replace('"hash": "', '"hash": "0'), "damaged: its values have the hash"),
        (text[:-20], "holds no converted weights"),
        (text.replace('"format": 1', '"format": 2'), "of format 2"),
        (text.replace('"encoder/conv_in/bias"', '"encoder/conv_in/b"'), "is damaged"),
    ):
        assert broken != text
        file.write_text(broken)
        with pytest.raises(UserError, match=says):
            converted.load(place)
    file.write_text(text)
    for file in (place / "params" / "ocdbt.process_0" / "d").iterdir():
        if file.stat().st_size > 4096:
            file.unlink()
    with pytest.raises(UserError, match="is damaged"):
        converted.load(place)
    shutil.rmtree(place / "params")
    with pytest.raises(UserError, match="is damaged"):
        converted.load(place)


def test_a_killed_convert_leaves_nothing_that_loads(whole, tmp_path):
    """Killed while its files are there but not yet in place; the next one cleans up."""
    code = (
        "import sys, time; from ldm_scaling.models import converted, pretrained;"
        "pretrained.hash_of = lambda params: time.sleep(600);"
        "converted.write('sd_unet', sys.argv[1], sys.argv[2])"
    )
    target = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(whole / "unet"), str(target)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    deadline = time.time() + 120
    while not list(tmp_path.glob(".tmp-out/params/manifest.ocdbt")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists()
    with pytest.raises(UserError, match="holds no converted weights"):
        converted.load(tmp_path / ".tmp-out")
    converted.write("sd_unet", whole / "unet", target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    same(converted.load(target).params, sd_folder.read(whole).unet_params())


def test_the_command_line(whole, tmp_path, capsys):
    target = tmp_path / "out"
    flags = [f"--from={whole / 'unet'}", f"--to={target}"]
    assert cli.main(["convert", "--kind=sd_unet", *flags]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    assert converted.load(target).kind == "sd_unet"
    assert cli.main(["convert", "--kind=sd", *flags]) == 2
    assert "there are sd_unet, sd_auto" in capsys.readouterr().err
    assert cli.main(["convert", "--kind=sd_unet", flags[0], f"--to={target}2", "--side=96"]) == 2
    assert "config.json tells the side of latents: leave out --side" in capsys.readouterr().err
    assert cli.main(["convert", "--kind=sd_unet", *flags, "--side=0"]) == 2
    assert "side" in capsys.readouterr().err
    assert cli.main(["convert", "--kind=sd_unet", flags[0]]) == 2
    assert "convert needs --to; see" in capsys.readouterr().err
    assert cli.FLAGS["kind"][2].split(", ") == list(converted.KINDS)
