"""Frozen encoders from the files that their own libraries write, at random weights."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from ldm_scaling.config import Autoencoder, Study, Train
from ldm_scaling.errors import UserError
from ldm_scaling.models import autoencoder, converted, pretrained
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.study import encoders
from tests import published as mini

WHY = "makes the models with their own libraries: pip install -e '.[parity]'"
diffusers = pytest.importorskip("diffusers", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
torch = pytest.importorskip("torch", reason=WHY)

TEXTS = ["a red apple", "", "re re re two trees", "x" * 40]


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    """A Stable Diffusion and its folder."""
    folder = tmp_path_factory.mktemp("published")
    return mini.pipeline(folder), folder / "sd"


def pictures(n=3, height=mini.SIDE, width=24):
    x = np.random.default_rng(0).integers(0, 256, (n, height, width, 3))
    return (x / 127.5 - 1).astype(np.float32)


# --- pictures ------------------------------------------------------------------------------------


def test_latents_equal_diffusers(sd):
    pipeline, folder = sd
    encoder = encoders.latent_encoder_from(folder / "vae", "float32")
    assert encoder.scale == pipeline.vae.config.scaling_factor == 0.5
    assert encoder.latent_shape(16, 24) == (8, 12, 4)
    x_BHWC = pictures()
    ours = jax.jit(encoder.encode)(encoder.params, x_BHWC)
    with torch.no_grad():
        theirs = pipeline.vae.encode(torch.from_numpy(x_BHWC).permute(0, 3, 1, 2)).latent_dist
    for name in ("mean", "logvar"):
        wanted = getattr(theirs, name).permute(0, 2, 3, 1).numpy()
        assert wanted.shape == (3, 8, 12, 4)
        np.testing.assert_allclose(getattr(ours, name), wanted, rtol=1e-4, atol=1e-4)


def test_every_place_of_the_same_weights_gives_the_same(sd, tmp_path):
    _, folder = sd
    wanted = encoders.latent_encoder_from(folder / "vae").hash
    converted.write("sd_autoencoder", folder / "vae", tmp_path / "ours")
    places = [folder, folder / "vae" / pretrained.DIFFUSERS[0], tmp_path / "ours"]
    for place in places:
        found = encoders.latent_encoder_from(place)
        assert found.hash == wanted and found.scale == 0.5


def test_the_hash_is_of_what_decides_latents(sd):
    _, folder = sd
    one = encoders.latent_encoder_from(folder, "float32")
    assert encoders.latent_encoder_from(folder, "bfloat16").hash != one.hash
    shifted = jax.tree.map(lambda x: x, one.params)
    shifted["decoder"]["conv_in"]["bias"] = shifted["decoder"]["conv_in"]["bias"] + 1
    assert encoders.latent_encoder(one.spec, shifted, None, "float32").hash == one.hash
    shifted["encoder"]["conv_in"]["bias"] = shifted["encoder"]["conv_in"]["bias"] + 1
    assert encoders.latent_encoder(one.spec, shifted, None, "float32").hash != one.hash


def test_an_autoencoder_in_memory(monkeypatch):
    spec = autoencoder.AutoencoderSpec(8, (1, 2), 1, 3, 4)
    shapes = jax.eval_shape(lambda: autoencoder.init(spec, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    encoder = encoders.latent_encoder(spec, params)
    assert encoder.scale is None
    # Float32 wherever it runs, in every product: latents are made but once.
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    elsewhere = encoders.latent_encoder(spec, params)
    assert elsewhere.hash == encoder.hash and elsewhere.dtype == np.float32
    half = encoders.latent_encoder(spec, params, compute_dtype="bfloat16")
    assert half.hash != encoder.hash
    x = np.zeros((2, 8, 6, 3), np.float32)
    for one, highest in ((elsewhere, True), (half, False)):
        jaxpr = str(jax.make_jaxpr(one.encode)(params, x))
        assert jaxpr.count("HIGHEST") == (2 * jaxpr.count("precision=") if highest else 0)
    x = jax.ShapeDtypeStruct((2, 8, 6, 3), np.float32)
    posterior = jax.eval_shape(encoder.encode, params, x)
    assert posterior.mean.shape == posterior.logvar.shape == (2, *encoder.latent_shape(8, 6))
    with pytest.raises(UserError, match="9x8 are not whole multiples .* 2"):
        encoder.latent_shape(9, 8)


def test_a_workdir_is_bound_to_what_latents_are_computed_in():
    """Of a published autoencoder as of one that is trained there."""
    def study(dtype):
        run = Train(keep_metric="l1", compute_dtype=dtype)
        return Study(autoencoder=Autoencoder(weights="vae", weights_hash="abc", train=run))

    spec = autoencoder.AutoencoderSpec(8, (1, 1), 1, 4, 4, mid_attention=False)
    params = autoencoder.init(spec, jax.random.key(0))
    hashes = {
        dtype: (encoders.latent_encoder(spec, params, compute_dtype=dtype).hash,
                str(study(dtype).identity()), study(dtype).training_hash("866m"))
        for dtype in ("auto", "float32", "bfloat16")
    }
    assert hashes["auto"] == hashes["float32"]
    assert all(a != b for a, b in zip(hashes["auto"], hashes["bfloat16"]))
    assert study("auto").identity()["autoencoder"] == {"weights_hash": "abc"}


def test_what_encodes_nothing_is_refused(sd, tmp_path):
    _, folder = sd
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    )
    tiny.save_pretrained(tmp_path / "tiny")
    converted.write("tiny_decoder", tmp_path / "tiny", tmp_path / "converted")
    for name in ("tiny", "converted"):
        with pytest.raises(UserError, match="tiny autoencoder.*give the AutoencoderKL"):
            encoders.latent_encoder_from(tmp_path / name)
    with pytest.raises(UserError, match="no autoencoder at .*nowhere.*sd-vae-ft-mse"):
        encoders.latent_encoder_from(tmp_path / "nowhere")
    converted.write("sd_unet", folder / "unet", tmp_path / "unet")
    with pytest.raises(UserError, match="holds a sd_unet, not a sd_autoencoder"):
        encoders.latent_encoder_from(tmp_path / "unet")
    with pytest.raises(UserError, match="unet"):
        encoders.latent_encoder_from(folder / "unet")


# --- captions ------------------------------------------------------------------------------------


def test_clips_states_equal_transformers(sd):
    pipeline, folder = sd
    encoder = encoders.text_encoder_from(folder, 12)
    assert (encoder.length, encoder.width, encoder.zero_padding) == (12, 24, False)
    inputs = pipeline.tokenizer(
        TEXTS, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        theirs = pipeline.text_encoder(inputs.input_ids).last_hidden_state.numpy()
    np.testing.assert_allclose(encoder.states(TEXTS), theirs, rtol=1e-4, atol=1e-5)


def test_shorter_captions_have_the_same_states(sd):
    _, folder = sd
    short, long = (encoders.text_encoder_from(folder, length) for length in (8, 12))
    texts = ["re", "", "x"]  # that fit
    states = short.states(texts)
    assert states.shape == (3, 8, 24) and short.hash != long.hash
    np.testing.assert_allclose(states, long.states(texts)[:, :8], rtol=1e-5, atol=1e-6)


def test_clips_of_any_of_their_files(sd, tmp_path):
    """Alone with its vocabulary, as the whole model, converted."""
    _, folder = sd
    wanted = encoders.text_encoder_from(folder, 12).hash
    alone = shutil.copytree(folder / "text_encoder", tmp_path / "alone")
    for file in (folder / "tokenizer").iterdir():
        shutil.copy(file, alone)
    assert encoders.text_encoder_from(alone, 12).hash == wanted
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    for kind in ("sd_text", "clip_text"):
        converted.write(kind, folder / "text_encoder", tmp_path / kind)
        assert encoders.text_encoder_from(tmp_path / kind, 12).hash == wanted


def test_open_clips_folder_is_read_as_open_clip_does(sd, tmp_path):
    """The same tensors under OpenCLIP's config: rows end in zeros, not in CLIP's own padding."""
    _, folder = sd
    place = tmp_path / "open"
    place.mkdir()
    ours = safetensors.numpy.load_file(folder / "text_encoder" / "model.safetensors")
    names = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    layers = {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "layer_norm1": "ln_1",
              "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
    prefix = "text_model." if any(k.startswith("text_model.") for k in ours) else ""
    tensors = {there: ours[here.removeprefix("text_model.")] if not prefix else ours[here]
               for here, there in names.items()}  # fmt: skip
    for i in range(2):
        stem, block = f"{prefix}encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for here, there in layers.items():
            for leaf in ("weight", "bias"):
                tensors[f"{block}{there}.{leaf}"] = ours[f"{stem}{here}.{leaf}"]
        for leaf in ("weight", "bias"):
            parts = [ours[f"{stem}self_attn.{p}_proj.{leaf}"] for p in "qkv"]
            tensors[f"{block}attn.in_proj_{leaf}"] = np.concatenate(parts)
    safetensors.numpy.save_file(tensors, place / "open_clip_model.safetensors")
    config = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": {}, "text_cfg": {
        "context_length": 12, "vocab_size": mini.VOCABULARY, "width": 24, "heads": 3, "layers": 2,
        "mlp_ratio": 2.0,
    }}  # fmt: skip
    (place / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    for file in (folder / "tokenizer").iterdir():
        if file.name != "config.json":
            shutil.copy(file, place)
    open_clip = encoders.text_encoder_from(place, 12)
    transformers_ = encoders.text_encoder_from(folder, 12)
    texts = ["re", "a tree"]
    a, b = open_clip.states(texts), transformers_.states(texts)
    # Equal up to the end of the text, for attention is causal; then the padding differs.
    np.testing.assert_allclose(a[0, :3], b[0, :3], rtol=1e-5, atol=1e-6)
    assert np.abs(a[0, 3:] - b[0, 3:]).max() > 0.01


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    """A T5 encoder and a word-level tokenizer of its kind, `tokenizer` beside `text_encoder`."""
    import tokenizers

    folder = tmp_path_factory.mktemp("t5")
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=3,
        feed_forward_proj="gated-gelu",
    )
    model = mini.shake(transformers.T5EncoderModel(config))
    model.save_pretrained(folder / "text_encoder")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 2, byte_fallback=False))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>"])
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    return model, tokenizer, folder


def test_t5s_states_equal_transformers(t5_folder, tmp_path):
    model, tokenizer, folder = t5_folder
    encoder = encoders.text_encoder_from(folder, 9)
    assert (encoder.length, encoder.width, encoder.zero_padding) == (9, 16, True)
    texts = ["a tree", "", "x" * 40]
    ours = encoder.states(texts)
    for text, states in zip(texts, ours):
        ids = tokenizer.encode(text).ids
        ids = ids if len(ids) <= 9 else [*ids[:8], 1]
        with torch.no_grad():
            theirs = model(torch.tensor([ids])).last_hidden_state[0].numpy()
        np.testing.assert_allclose(states[: len(ids)], theirs, rtol=1e-4, atol=1e-5)
        assert not states[len(ids) :].any()
    assert encoder.lengths(texts) == [len(tokenizer.encode(text).ids) for text in texts]
    inside = shutil.copytree(folder / "text_encoder", tmp_path / "inside")
    shutil.copy(folder / "tokenizer" / "tokenizer.json", inside)
    assert encoders.text_encoder_from(inside, 9).hash == encoder.hash
    with pytest.raises(UserError, match="no sentence embeddings"):
        encoder.states_and_embeddings(["a"])
    converted.write("t5", folder / "text_encoder", tmp_path / "converted")
    with pytest.raises(UserError, match="holds a converted t5: give the folder of transformers"):
        encoders.text_encoder_from(tmp_path / "converted", 9)


def test_minilm_is_there_without_a_path():
    encoder = encoders.text_encoder_from("", 10)
    assert (encoder.length, encoder.width, encoder.zero_padding) == (10, 384, True)
    ctx_BLD, e_BE = encoder.states_and_embeddings(TEXTS[:2])
    np.testing.assert_array_equal(ctx_BLD, encoder.states(TEXTS[:2]))
    np.testing.assert_allclose(np.linalg.norm(e_BE, axis=1), 1, rtol=1e-5)
    texts = ["", "a cat " * 4, "a cat " * 5, "a [SEP] " * 60]
    whole = encoders.text_encoder_from("", 200)._encoder.tokenize(texts)[1].sum(1)
    assert encoder.lengths(texts) == whole.tolist() == [2, 10, 12, 122]


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("which", ["clip", "t5"])
def test_a_mesh_gives_the_same_states(sd, t5_folder, which, tensor):
    folder = sd[1] if which == "clip" else t5_folder[2]
    encoder = encoders.text_encoder_from(folder, 9)
    texts = [*TEXTS, *TEXTS[:3]] * 2
    spread = encoder.on(mesh_lib.make(jax.device_count() // tensor, tensor=tensor), 3)
    batches = spread._encoder.spread if which == "clip" else spread._encoder
    assert spread.hash == encoder.hash and batches.batch == jax.device_count()
    assert encoder.longest == (12 if which == "clip" else None)
    np.testing.assert_allclose(spread.states(texts), encoder.states(texts), rtol=1e-4, atol=1e-5)
    if which == "clip":
        for a, b in zip(spread.states_and_embeddings(texts), encoder.states_and_embeddings(texts)):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_text_encoders_that_do_not_fit_are_refused(sd, tmp_path):
    _, folder = sd
    for length in (1, 13):
        with pytest.raises(UserError, match=f"takes 2 to 12 tokens.*not {length}"):
            encoders.text_encoder_from(folder, length)
    with pytest.raises(UserError, match="no text encoder at .*nowhere"):
        encoders.text_encoder_from(tmp_path / "nowhere", 8)
    converted.write("sd_unet", folder / "unet", tmp_path / "unet")
    with pytest.raises(UserError, match="holds a converted sd_unet: give the CLIP or a T5"):
        encoders.text_encoder_from(tmp_path / "unet", 8)
    bare = shutil.copytree(folder / "text_encoder", tmp_path / "bare")
    with pytest.raises(UserError, match=str(bare)):
        encoders.text_encoder_from(bare, 8)
