"""DINO and DINOv2 equal transformers' classes and torch's operators, from both layouts on disk."""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.models import dino, dino_vit, pretrained
from ldm_scaling.models.dino_vit import VitSpec

WHY = "compares with transformers: pip install -e '.[parity]'"
transformers = pytest.importorskip("transformers", reason=WHY)
torch = pytest.importorskip("torch", reason=WHY)

KINDS = ("dino", "dinov2", "dinov2_gated")


@pytest.fixture(autouse=True, scope="module")
def _threads():
    torch.set_num_threads(1)


def peer_of(kind, spec):
    """transformers' model of a spec, on whatever device is set."""
    sizes = {
        "hidden_size": spec.width, "num_hidden_layers": spec.layers, "patch_size": spec.patch,
        "num_attention_heads": spec.heads, "image_size": spec.side, "layer_norm_eps": spec.eps,
    }  # fmt: skip
    if kind == "dino":
        config = transformers.ViTConfig(**sizes, intermediate_size=spec.hidden)
        return transformers.ViTModel(config, add_pooling_layer=False)
    config = transformers.Dinov2Config(**sizes, mlp_ratio=4, use_swiglu_ffn=spec.gated)
    return transformers.Dinov2Model(config)


def tiny(kind, layers=2, side=None):
    """Of width 24 with 3 heads, its positions for 4 x 4 patches."""
    patch = 16 if kind == "dino" else 14
    hidden = 64 if kind == "dinov2_gated" else 96
    return VitSpec(
        patch, 24, layers, 3, hidden, side or 4 * patch, layer_scale=kind != "dino",
        gated=kind == "dinov2_gated", eps=1e-12 if kind == "dino" else 1e-6,
    )  # fmt: skip


def shake(model):
    """Nothing is left at 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            size = 0.3 if p.ndim == 1 or p.shape[0] == 1 else 1.5 * p[0].numel() ** -0.5
            p.copy_(p + size * torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    """Kind, spec, transformers' model, its folder, and its parameters here."""
    folder, spec = tmp_path_factory.mktemp(request.param), tiny(request.param)
    model = shake(peer_of(request.param, spec))
    model.save_pretrained(folder)
    params = dino_vit.params_of(spec, pretrained.read_weights(folder), folder)
    return request.param, spec, model, folder, params


def states(model, x_BHWC, **kw):
    with torch.no_grad():
        x_BCHW = torch.tensor(x_BHWC).permute(0, 3, 1, 2)
        return model(pixel_values=x_BCHW, **kw).last_hidden_state.numpy()


def our_states(spec, params, x_BHWC, offset=0.1):
    network = dino_vit.Vit(spec, offset)
    out = jax.jit(lambda p, x: network.apply({"params": p}, x))(params, x_BHWC)
    return np.concatenate([out["class"][:, None], out["patches"]], axis=1)


def originals(kind, model):
    """The state dict under the names of the authors' code, products packed as they are there."""
    old = {}
    names = {
        "embeddings.cls_token": "cls_token", "embeddings.position_embeddings": "pos_embed",
        "embeddings.mask_token": "mask_token", "layernorm.": "norm.",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "encoder.layer.": "blocks.", "layers.": "blocks.", "attention.o_proj": "attn.proj",
        "attention.": "attn.", "layernorm_before": "norm1", "layernorm_after": "norm2",
        "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma",
        "down_proj": "w3",
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        for new, before in names.items():
            name = name.replace(new, before)
        old[name] = tensor
    for i in range(2):
        for leaf in ("weight", "bias"):
            block = f"blocks.{i}."
            qkv = [old.pop(f"{block}attn.{part}_proj.{leaf}") for part in "qkv"]
            old[f"{block}attn.qkv.{leaf}"] = torch.cat(qkv)
            if kind == "dinov2_gated":
                pair = [old.pop(f"{block}mlp.{part}_proj.{leaf}") for part in ("gate", "up")]
                old[f"{block}mlp.w12.{leaf}"] = torch.cat(pair)
    assert not any("_proj" in name or "layer" in name for name in old)
    return old


# --- the network ------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", [(4, 4), (6, 3), (2, 9)])
def test_states_equal_transformers(saved, sides):
    """At the learned side and at others, where transformers resamples to a given size."""
    kind, spec, model, _, params = saved
    rows, cols = (n * spec.patch for n in sides)
    x_BHWC = np.random.default_rng(0).normal(size=(2, rows, cols, 3)).astype(np.float32)
    kw = {"interpolate_pos_encoding": True} if kind == "dino" else {}
    theirs = states(model, x_BHWC, **kw)
    assert theirs.std() > 0.5 and np.abs(theirs[0] - theirs[1]).max() > 0.1
    ours = our_states(spec, params, x_BHWC, offset=0)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def authors_positions(grid_NND, out, offset):
    """torch's operator as the authors call it: by a factor, not by a size."""
    n = grid_NND.shape[0]
    by = {"scale_factor": tuple((o + offset) / n for o in out)} if offset else {"size": out}
    grid_1DNN = torch.tensor(grid_NND).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(grid_1DNN, mode="bicubic", **by)[0].permute(1, 2, 0)


@pytest.mark.parametrize("offset", [0.1, 0.0])
@pytest.mark.parametrize(
    ("n", "out"), [(37, (16, 16)), (14, (20, 9)), (28, (28, 60)), (5, (1, 2)), (1, (3, 3))]
)
def test_resampling_equals_torch(n, out, offset):
    grid_NND = np.random.default_rng(0).normal(size=(n, n, 3)).astype(np.float32)
    theirs = authors_positions(grid_NND, out, offset).numpy()
    rows, cols = (dino_vit.resampling(n, o, offset) for o in out)
    assert theirs.shape == (*out, 3)
    np.testing.assert_allclose(np.einsum("hn,wm,nmd->hwd", rows, cols, grid_NND), theirs, atol=1e-5)


def test_states_at_another_side_as_the_authors_resample(saved):
    kind, spec, model, _, params = saved
    grid_NND = model.embeddings.position_embeddings.detach()[0, 1:].reshape(4, 4, -1)
    moved = authors_positions(grid_NND.numpy(), (3, 5), 0.1).reshape(1, 15, -1)
    x_BHWC = np.random.default_rng(1).normal(size=(1, 3 * spec.patch, 5 * spec.patch, 3))
    x_BHWC = x_BHWC.astype(np.float32)
    ours = our_states(spec, params, x_BHWC)
    kept = model.embeddings.position_embeddings
    try:
        first = kept.detach()[:, :1]
        model.embeddings.position_embeddings = torch.nn.Parameter(torch.cat([first, moved], 1))
        model.embeddings.interpolate_pos_encoding = lambda *a: model.embeddings.position_embeddings
        theirs = states(
            model, x_BHWC, **({"interpolate_pos_encoding": True} if kind == "dino" else {})
        )
    finally:
        del model.embeddings.interpolate_pos_encoding
        model.embeddings.position_embeddings = kept
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert np.abs(ours - our_states(spec, params, x_BHWC, offset=0)).max() > 1e-3


@pytest.mark.parametrize("name", dino.PRESETS)
def test_parameters_of_the_published_sizes(name):
    spec = dino.PRESETS[name]
    with torch.device("meta"):
        peer = peer_of(name.split("_")[0], spec)
    want = sum(p.numel() for k, p in peer.named_parameters() if "mask_token" not in k)
    assert dino_vit.spec_of(peer.config.to_dict()) == spec
    picture = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    tree = jax.eval_shape(dino_vit.Vit(spec).init, jax.random.key(0), picture)
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == want


# --- files ------------------------------------------------------------------------------------


def test_the_authors_files_give_the_same(saved, tmp_path):
    kind, spec, model, folder, params = saved
    old = originals(kind, model)
    torch.save(old, tmp_path / "hub.pth")
    whole = {f"module.backbone.{k}": v for k, v in old.items()} | {
        "module.head.last_layer.weight_v": torch.ones(2, 2)
    }
    args = argparse.Namespace(arch="vit_small", lr=0.1)
    torch.save({"student": whole, "teacher": whole, "args": args, "epoch": 3}, tmp_path / "all.pth")
    for file in ("hub.pth", "all.pth"):
        again = dino_vit.params_of(spec, pretrained.read_weights(tmp_path / file), file)
        jax.tree.map(np.testing.assert_array_equal, again, params)
    ours = [dino.load(path, spec).layer_hash() for path in (folder, tmp_path / "hub.pth")]
    assert ours[0] == ours[1]


def test_a_pooler_is_left_out(tmp_path):
    spec = tiny("dino", layers=1)
    transformers.ViTModel(peer_of("dino", spec).config).save_pretrained(tmp_path)
    assert any("pooler" in name for name in pretrained.read_weights(tmp_path))
    assert dino.load(tmp_path, spec).spec == spec


def test_weights_that_do_not_fit_are_refused(saved):
    kind, spec, model, folder, _ = saved
    tensors = pretrained.read_weights(folder)
    name = "encoder.layer.1.attention.attention.key.weight"
    registers = {"embeddings.register_tokens": np.zeros((1, 4, 24), np.float32)}
    for wrong, says in (
        ({k: v for k, v in tensors.items() if k != name}, "1 missing.*\n.*block_1/key/kernel"),
        (tensors | registers, "1 surplus.*\n.*register_tokens"),
        (tensors | {name: np.zeros((24, 25), np.float32)}, "1 misshapen"),
        (tensors | {"embeddings.cls_token": np.zeros((2, 1, 24), np.float32)}, "1 misshapen"),
    ):
        with pytest.raises(UserError, match=says):
            dino_vit.params_of(spec, wrong, "here")


# --- pictures ---------------------------------------------------------------------------------


def photos():
    """Pictures of several shapes, with edges and noise."""
    rng = np.random.default_rng(0)
    shapes = [(256, 256), (300, 400), (90, 61), (641, 480), (224, 224), (32, 32), (500, 40)]
    pictures = []
    for shape in shapes:
        noise = rng.integers(0, 256, (*shape, 3))
        noise[shape[0] // 3 :, shape[1] // 2 :] = [250, 3, 120]
        pictures.append(noise.astype(np.uint8))
    return pictures


def peer_pixels(preprocessing, picture_HWC):
    kw = {
        "crop": {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
        "squeeze": {"size": {"height": 224, "width": 224}, "do_center_crop": False},
    }[preprocessing]
    processor = transformers.models.bit.image_processing_pil_bit.BitImageProcessorPil(
        resample=3, image_mean=dino.MEAN, image_std=dino.STD, **kw
    )
    return processor(picture_HWC, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)


@pytest.mark.parametrize("preprocessing", dino.PREPROCESSING)
@pytest.mark.parametrize("kind", ["dino", "dinov2"])
def test_features_of_pictures_equal_transformers(tmp_path, kind, preprocessing):
    """DINO at its own side; DINOv2's positions are resampled to 224 from fewer."""
    spec = tiny(kind, layers=1, side=224 if kind == "dino" else 70)
    model = shake(peer_of(kind, spec))
    model.save_pretrained(tmp_path)
    x_BHWC = np.concatenate([peer_pixels(preprocessing, p) for p in photos()])
    theirs_ND = states(model, x_BHWC)[:, 0]
    network = dino.load(tmp_path, spec, preprocessing, offset=0, batch=3, devices=jax.devices()[:3])
    ours_ND = network.features(iter(photos()))["class"]
    assert np.abs(theirs_ND[0] - theirs_ND[1]).max() > 0.1 and network._apply._cache_size() == 1
    np.testing.assert_allclose(ours_ND, theirs_ND, rtol=1e-4, atol=1e-4 * np.abs(theirs_ND).max())
    stacked = np.stack([photos()[0]] * 2)
    np.testing.assert_allclose(network.features(stacked)["class"], ours_ND[[0, 0]], rtol=1e-5)
    assert network.features([])["class"].shape == (0, 24)


def test_what_is_between_pixels_is_cut_as_torchvision_cuts():
    """Half a pixel is rounded to the even side (torchvision's center_crop: int(round(...)))."""
    for long, left in ((257, 16), (259, 18)):
        picture = np.zeros((256, long, 3), np.uint8)
        picture[:, left], picture[:, left + 223] = 1, 2
        for turned in (picture, picture.swapaxes(0, 1)):
            out = dino.crop(turned)
            out = out if turned is picture else out.swapaxes(0, 1)
            assert out.shape == (224, 224, 3)
            assert (out[:, 0] == 1).all() and (out[:, -1] == 2).all()


# --- names, hashes, mistakes ------------------------------------------------------------------


def test_hash_names_what_decides_the_features(tmp_path):
    spec = tiny("dinov2", layers=1)
    peer_of("dinov2", spec).save_pretrained(tmp_path)
    first, again = dino.load(tmp_path, spec), dino.load(tmp_path, spec, batch=8)
    tensors = {name: torch.tensor(t) for name, t in pretrained.read_weights(tmp_path).items()}
    tensors["layernorm.bias"] += 1e-3
    torch.save(tensors, tmp_path / "changed.pth")
    others = [
        dino.load(tmp_path, spec, "squeeze"),
        dino.load(tmp_path, spec, offset=0),
        dino.load(tmp_path / "changed.pth", spec),
    ]
    assert again.layer_hash() == first.layer_hash()
    assert len({network.layer_hash() for network in (first, *others)}) == 4
    assert "24 features" in first.describe() and "crop" in first.describe()


def test_mistakes(saved, tmp_path):
    _, spec, _, folder, _ = saved
    with pytest.raises(UserError, match="no DINO is called 'dino_vitl16'.*dinov2_vitl14"):
        dino.load(folder, "dino_vitl16")
    with pytest.raises(UserError, match="crop or squeeze, not 'stretch'"):
        dino.load(folder, spec, "stretch")
    with pytest.raises(
        UserError,
        match=r"dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/.*needs torch"
        r".*facebook/dinov2-large from https://huggingface.co",
    ):
        dino.load(tmp_path / "nowhere.pth", "dinov2_vitl14")
    with pytest.raises(UserError, match="config.json describes .*width=24.* but dino_vits16 is"):
        dino.load(folder, "dino_vits16")
    with pytest.raises(UserError, match="batch of 3 does not divide over 8 devices"):
        dino.load(folder, spec, batch=3)
    network = dino.load(folder, spec)
    for picture in (np.zeros((32, 32, 3)), np.zeros((32, 32), np.uint8), np.zeros((0, 9, 3), "u1")):
        with pytest.raises(UserError, match=r"uint8 pictures \[H, W, 3\]"):
            network.features([picture])
    with pytest.raises(UserError, match="the layer 'class', not 'trunk'"):
        network.layer_hash("trunk")
    config = json.loads((folder / "config.json").read_text())
    for change, says in (
        ({"model_type": "clip"}, "model_type is 'clip'"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not supported"),
        ({"num_attention_heads": 5}, "must divide by 5 heads"),
        ({"patch_size": [14, 14]}, "patch is a whole number"),
    ):
        with pytest.raises(UserError, match=says):
            dino_vit.spec_of(config | change)
