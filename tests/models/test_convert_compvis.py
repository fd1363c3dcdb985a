"""Original checkpoints of Stable Diffusion, through diffusers' own converter and its networks."""

import functools
import re

import numpy as np
import pytest
import safetensors.numpy

from ldm_scaling.errors import UserError
from ldm_scaling.models import autoencoder, clip_text, convert, convert_compvis, converted, unet
from tests.models.peers import run, shake

WHY = "compares with diffusers and transformers: pip install -e '.[parity]'"
diffusers = pytest.importorskip("diffusers", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
torch = pytest.importorskip("torch", reason=WHY)
single_file = pytest.importorskip("diffusers.loaders.single_file_utils", reason=WHY)

LAYERS = 1  # blocks a level


@pytest.fixture(autouse=True, scope="module")
def _threads():
    torch.set_num_threads(1)


def arrays(model):
    return {name: t.numpy() for name, t in model.state_dict().items()}


@functools.cache
def unet_of(version):
    """Version 1's projections are convolutions of 8 heads, version 2's linear of width 64."""
    own = {
        1: {"block_out_channels": (32, 64), "attention_head_dim": 8, "cross_attention_dim": 24},
        2: {"block_out_channels": (64, 128), "attention_head_dim": (1, 2),
            "cross_attention_dim": 32, "use_linear_projection": True},
    }[version]
    model = diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=LAYERS,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **own,
    )
    return shake(model, seed=version)


@functools.cache
def autoencoder_of(attention=True):
    model = diffusers.AutoencoderKL(
        block_out_channels=(32, 64), layers_per_block=LAYERS,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        mid_block_add_attention=attention,
    )
    return shake(model)


# --- the original layout, as ldm's openaimodel.py and model.py name it ---------------------------


def original_unet(tensors, levels=2):
    """diffusers' names to those of the original; up the stairs, levels are counted from below."""
    per = LAYERS + 1
    resnet = {
        "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
    }
    whole = {
        "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0", "conv_out": "out.2",
    }
    attention = {f"up_blocks.{name.split('.')[1]}" for name in tensors if "up_blocks" in name
                 and "attentions" in name}
    out = {}
    for name, tensor in tensors.items():
        stem, leaf = name.rsplit(".", 1)
        if stem in whole:
            out[f"{whole[stem]}.{leaf}"] = tensor
            continue
        if match := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
            kind, j, rest = match.groups()
            place, way = f"middle_block.{1 if kind == 'attentions' else 2 * int(j)}", "mid"
        else:
            way, i, kind, j, rest = re.match(
                r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name
            ).groups()
            i, j = int(i), int(j)
            if kind == "downsamplers":
                out[f"input_blocks.{(i + 1) * per}.0.op.{leaf}"] = tensor
                continue
            if kind == "upsamplers":
                after = 2 if f"up_blocks.{i}" in attention else 1
                out[f"output_blocks.{i * per + LAYERS}.{after}.conv.{leaf}"] = tensor
                continue
            n = 1 + i * per + j if way == "down" else i * per + j
            place = f"{'input' if way == 'down' else 'output'}_blocks.{n}"
            place += ".1" if kind == "attentions" else ".0"
        if kind == "resnets":
            layer, leaf = rest.split(".")
            rest = f"{resnet[layer]}.{leaf}"
        out[f"{place}.{rest}"] = tensor
    return out


def original_autoencoder(tensors, levels=2):
    out = {}
    for name, tensor in tensors.items():
        for i in range(levels):
            name = name.replace(f"encoder.down_blocks.{i}.", f"encoder.down.{i}.")
            name = name.replace(f"decoder.up_blocks.{i}.", f"decoder.up.{levels - 1 - i}.")
        for new, old in {
            "resnets": "block", "downsamplers.0": "downsample", "upsamplers.0": "upsample",
            "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out",
            "mid_block.attentions.0": "mid.attn_1", "mid_block.block.0": "mid.block_1",
            "mid_block.block.1": "mid.block_2", "group_norm": "norm", "to_out.0": "proj_out",
            "to_q": "q", "to_k": "k", "to_v": "v",
        }.items():
            name = name.replace(new, old)
        kernel = "attn_1" in name and tensor.ndim == 2
        out[name] = tensor[:, :, None, None] if kernel else tensor
    return out


def prefixed(prefix, tensors):
    return {prefix + name: np.ascontiguousarray(t) for name, t in tensors.items()}


def checkpoint(version, ema=False):
    """A whole file: U-Net, autoencoder, buffers of the training program."""
    inside = original_unet(arrays(unet_of(version)))
    tensors = prefixed("model.diffusion_model.", inside)
    tensors |= prefixed("first_stage_model.", original_autoencoder(arrays(autoencoder_of())))
    tensors |= {"betas": np.ones(3, np.float32), "cond_stage_model.logit_scale": np.ones(())}
    if ema:
        flat = {"diffusion_model." + k: t + 0.01 for k, t in inside.items()}
        tensors |= {"model_ema." + k.replace(".", ""): t for k, t in flat.items()}
        tensors |= {"model_ema.decay": np.ones(()), "model_ema.num_updates": np.ones((), int)}
    return tensors


def through_the_peer(converted, model):
    """The peer's networks with what its converter made of the file."""
    state = {k: torch.as_tensor(t) for k, t in converted.items()}
    assert set(state) == set(model.state_dict())
    copy = type(model).from_config(model.config).eval()
    copy.load_state_dict(state)
    return copy


@pytest.mark.parametrize("version, ema", [(1, True), (2, False)])
def test_unet_equals_diffusers(tmp_path, version, ema):
    tensors, path = checkpoint(version, ema), tmp_path / "sd.safetensors"
    safetensors.numpy.save_file(tensors, path)
    config = dict(unet_of(version).config)
    state = {k: torch.as_tensor(t) for k, t in tensors.items()}
    peer = single_file.convert_ldm_unet_checkpoint(dict(state), config, extract_ema=ema)
    peer = through_the_peer(peer, unet_of(version))
    kind = converted.KINDS["sd_unet"]
    assert kind.load(path)[0].sample_size == 64 and {"ema", "side"} == {*kind.options}
    spec, params, _ = kind.load(path, ema=ema, side=8)
    assert spec == convert.unet_spec(config)
    assert spec.heads == (8 if version == 1 else (1, 2))

    rng = np.random.default_rng(version)
    x_BHWC, t_B = rng.standard_normal((2, 8, 8, 4)), np.array([998.75, 3.25])
    ctx_BLD = rng.standard_normal((2, 5, spec.context_dim))
    x_BHWC, t_B, ctx_BLD = (a.astype(np.float32) for a in (x_BHWC, t_B, ctx_BLD))
    with torch.no_grad():
        want = peer(
            torch.from_numpy(x_BHWC).permute(0, 3, 1, 2), torch.from_numpy(t_B),
            torch.from_numpy(ctx_BLD),
        ).sample.permute(0, 2, 3, 1).numpy()
    got = run(
        lambda p, x, t, ctx: unet.UNet(spec).apply({"params": p}, x, t, ctx),
        params, x_BHWC, t_B, ctx_BLD,
    )
    assert np.std(want) > 0.1 and np.std(want[0] - want[1]) > 0.1
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    if ema:
        plain = convert_compvis.load_unet(path)[1]
        bias = ("conv_out", "bias")
        np.testing.assert_allclose(params[bias[0]][bias[1]], plain[bias[0]][bias[1]] + 0.01)


@pytest.mark.parametrize("attention, alone", [(True, False), (False, True)])
def test_autoencoder_equals_diffusers(tmp_path, attention, alone, caplog):
    """Inside a whole file, and in a file of its own; both read by torch."""
    model, path = autoencoder_of(attention), tmp_path / "sd.ckpt"
    inside = original_autoencoder(arrays(model))
    extra = {"loss.logvar": np.ones(())} if alone else {"model.diffusion_model.x": np.ones(2)}
    tensors = extra | prefixed("" if alone else "first_stage_model.", inside)
    state = {k: torch.as_tensor(t) for k, t in tensors.items()}
    torch.save({"state_dict": state, "global_step": 7}, path)
    # The peer's converter knows an autoencoder by its place in a whole file alone.
    peer = {k: torch.as_tensor(t) for k, t in prefixed("first_stage_model.", inside).items()}
    peer = single_file.convert_ldm_vae_checkpoint(peer, dict(model.config))
    peer = through_the_peer(peer, model)
    spec, params, scale = convert_compvis.load_autoencoder(path)
    assert scale == 0.18215
    assert ("does not tell what its latents are multiplied by: 0.18215" in caplog.text) == alone
    assert spec == autoencoder.AutoencoderSpec(
        32, (1, 2), blocks_per_level=LAYERS, mid_attention=attention
    )
    rng = np.random.default_rng(0)
    x_BHWC = rng.uniform(-1, 1, (1, 8, 12, 3)).astype(np.float32)
    z_BHWC = rng.standard_normal((1, 4, 6, 4)).astype(np.float32)
    with torch.no_grad():
        mean = peer.encode(torch.from_numpy(x_BHWC).permute(0, 3, 1, 2)).latent_dist.mean
        pixels = peer.decode(torch.from_numpy(z_BHWC).permute(0, 3, 1, 2)).sample
    got = run(lambda p, x: autoencoder.encode(spec, p, x).mean, params, x_BHWC)
    np.testing.assert_allclose(got, mean.permute(0, 2, 3, 1), rtol=0, atol=1e-4)
    got = run(lambda p, z: autoencoder.decode(spec, p, z), params, z_BHWC)
    assert np.std(pixels.numpy()) > 0.1
    np.testing.assert_allclose(got, pixels.permute(0, 2, 3, 1), rtol=0, atol=1e-4)


# --- the text tower ------------------------------------------------------------------------------

TEXT = {
    "vocab_size": 40, "max_position_embeddings": 9, "hidden_size": 128, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 2, "eos_token_id": 39, "bos_token_id": 38,
}  # fmt: skip


def open_clip_tensors(tensors, projection_PD):
    """transformers' names to OpenCLIP's: the three products before attention in one tensor."""
    names = {
        "text_model.": "", "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "encoder.layers": "transformer.resblocks", "final_layer_norm": "ln_final",
        "layer_norm1": "ln_1", "layer_norm2": "ln_2", "fc1": "c_fc", "fc2": "c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }  # fmt: skip
    out = {"text_projection": projection_PD.T, "logit_scale": np.ones(())}
    for name, t in tensors.items():
        if re.search(r"[kv]_proj", name):
            continue
        if "q_proj" in name:
            t = np.concatenate([tensors[name.replace("q_proj", f"{k}_proj")] for k in "qkv"])
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        out[name] = t
    return out


@pytest.mark.parametrize("version", [1, 2])
def test_text_tower_equals_transformers(tmp_path, version):
    activation = {1: "quick_gelu", 2: "gelu"}[version]
    model = shake(transformers.CLIPTextModel(
        transformers.CLIPTextConfig(**TEXT, hidden_act=activation)
    ))
    with torch.no_grad():
        for layer in (p for name, p in model.named_parameters() if name.endswith("norm.weight")):
            layer.add_(1.0)
    bare = {k.removeprefix("text_model."): t for k, t in arrays(model).items()}
    if version == 1:
        tensors = prefixed("cond_stage_model.transformer.text_model.", bare)
        state = {k: torch.as_tensor(t) for k, t in tensors.items()}
        peer = single_file.convert_ldm_clip_checkpoint(state)
        index = {"cond_stage_model.transformer.text_model.embeddings.position_ids": np.arange(9)}
    else:
        width = TEXT["hidden_size"]
        projection = np.random.default_rng(0).standard_normal((width, width)).astype(np.float32)
        tensors = prefixed("cond_stage_model.model.", open_clip_tensors(bare, projection))
        state = {k: torch.as_tensor(t) for k, t in tensors.items()}
        peer = single_file.convert_open_clip_checkpoint(model, dict(state))
        index = {"cond_stage_model.model.attn_mask": np.zeros((9, 9), np.float32)}
    # The peer's converter makes of the file what the file was made of.
    peer = {k.removeprefix("text_model."): t.numpy() for k, t in peer.items()}
    assert set(bare) <= set(peer)
    for name, t in bare.items():
        np.testing.assert_array_equal(peer[name], t)
    path = tmp_path / "sd.safetensors"
    safetensors.numpy.save_file(tensors | index | {"model.diffusion_model.x": np.ones(2)}, path)
    spec, params, layer = convert_compvis.load_text(path)
    assert (spec.heads, spec.activation, layer) == (
        2, activation, {1: "last", 2: "penultimate"}[version]
    )
    ids_BL = np.random.default_rng(1).integers(0, 40, (3, 9)).astype(np.int32)
    with torch.no_grad():
        out = model(torch.tensor(ids_BL, dtype=torch.long), output_hidden_states=True)
        tower = getattr(model, "text_model", model)
        want = [out.last_hidden_state, tower.final_layer_norm(out.hidden_states[-2])][version - 1]
    got = run(lambda p, i: clip_text.TextTower(spec).apply({"params": p}, i)[layer], params, ids_BL)
    np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=1e-4)


# --- what is wrong -------------------------------------------------------------------------------


def test_what_is_missing_is_named(tmp_path):
    tensors, path = checkpoint(1), tmp_path / "sd.safetensors"

    def says(load, match, change):
        safetensors.numpy.save_file(change(dict(tensors)), path)
        with pytest.raises(UserError, match=match):
            load(path)

    lost = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    load = convert_compvis.load_unet
    says(load, "1 missing(?s:.*)  missing: down_0_res_0/conv1/kernel",
         lambda t: {k: v for k, v in t.items() if k != lost})
    says(load, r"1 misshapen(?s:.*)  misshapen: input_blocks\.1\.0\.in_layers\.2\.weight",
         lambda t: t | {lost: np.zeros((32, 32, 5, 5), np.float32)})
    says(load, r"1 surplus(?s:.*)  surplus: label_emb\.0\.0\.weight",
         lambda t: t | {"model.diffusion_model.label_emb.0.0.weight": np.zeros((2, 2))})
    says(load, "has no model.diffusion_model.input_blocks.0.0.weight; for weights that diffusers",
         lambda t: {"conv_in.weight": np.zeros((2, 2))})
    says(functools.partial(load, ema=True), "no average of .* without --ema", lambda t: t)
    says(convert_compvis.load_autoencoder, "an autoencoder in it: it has no first_stage_model",
         lambda t: {k: v for k, v in t.items() if not k.startswith("first")})
    towers = {"conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": np.zeros(2)}
    for load in (convert_compvis.load_autoencoder, convert_compvis.load_unet):
        says(load, "laid out as Stable Diffusion XL's.*folder vae", lambda t: t | towers)
    says(convert_compvis.load_text, "a text tower in it: it has no cond_stage_model.transformer",
         lambda t: t)
