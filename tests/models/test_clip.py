"""CLIP's towers equal transformers' and open_clip's at random weights, in every layout of file."""

import dataclasses
import functools
import importlib.util
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import similarity
from ldm_scaling.models import clip_checkpoint, clip_image, clip_text
from ldm_scaling.models.clip import PUBLISHED, ImageSpec
from ldm_scaling.models.pretrained import hash_of

PARITY = "the peer is missing: pip install -e '.[parity]'"
OPEN_CLIP = PARITY + "; then  pip install --no-deps open_clip_torch"
LETTERS = 512  # ids of bytes and of bytes that end a word
VOCABULARY = LETTERS + 2

TEXT = {
    "vocab_size": VOCABULARY, "max_position_embeddings": 12, "hidden_size": 24,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3,
    "hidden_act": "quick_gelu", "bos_token_id": LETTERS, "eos_token_id": LETTERS + 1,
    "pad_token_id": 1, "projection_dim": 16,
}  # fmt: skip
IMAGE = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": "quick_gelu",
    "projection_dim": 16,
}  # fmt: skip
END = 300  # of texts in these: not the highest id, so that the rules for the end differ
GELU_TEXT = {**TEXT, "hidden_act": "gelu", "num_attention_heads": 2, "eos_token_id": END}
# Patches of 14 pixels, heads of width 88 and an odd ratio of widths, as ViT-g/14 has them.
GELU_IMAGE = {
    **IMAGE, "hidden_act": "gelu", "image_size": 28, "patch_size": 14, "hidden_size": 176,
    "intermediate_size": int(176 * 4.3637), "num_attention_heads": 2,
}  # fmt: skip
TEXTS = ["a red apple", "", "x" * 50, "two\ttrees, & a lake"]


def peers():
    torch = pytest.importorskip("torch", reason=PARITY)
    transformers = pytest.importorskip("transformers", reason=PARITY)
    torch.set_num_threads(1)
    return torch, transformers


def randomise(model, seed=0):
    """Weights that make every part of the network matter."""
    torch, _ = peers()
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.1
        if "norm" in name.lower() or ".ln_" in name:
            p.data += name.endswith("weight")
    return model.eval()


@functools.cache
def transformers_clip(kind):
    """A model of each kind of class, activation, end rule and projection."""
    _, t = peers()
    both = {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 16}
    gelu = {"text_config": GELU_TEXT, "vision_config": GELU_IMAGE, "projection_dim": 8}
    config = {
        "openai": lambda: t.CLIPModel(t.CLIPConfig(**both)),
        "laion": lambda: t.CLIPModel(t.CLIPConfig(**gelu)),
        "sd1": lambda: t.CLIPTextModel(t.CLIPTextConfig(**{**TEXT, "eos_token_id": 2})),
        "sd2": lambda: t.CLIPTextModel(t.CLIPTextConfig(**GELU_TEXT)),
        "text": lambda: t.CLIPTextModelWithProjection(t.CLIPTextConfig(**TEXT)),
        "image": lambda: t.CLIPVisionModelWithProjection(t.CLIPVisionConfig(**GELU_IMAGE)),
        "trunk": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**IMAGE)),
    }
    return randomise(config[kind]())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Saves a model as its owners publish it, with a vocabulary beside it."""

    @functools.cache
    def folder(kind):
        path = tmp_path_factory.mktemp(kind)
        transformers_clip(kind).save_pretrained(path)
        write_vocabulary(path)
        return path

    return folder


def write_vocabulary(path):
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (path / "merges.txt").write_text("#version: 0.2\n")


def three():
    """Batches of three over as many devices: five rows take two, the last filled up."""
    return {"batch": 3, "devices": jax.devices()[:3]}


def text(path, **kw):
    return clip_text.load_text(path, behaviour="transformers", **{**three(), **kw})


def random_ids(rows=5, seed=0):
    """Each end stands twice, the higher before the lower in every other row."""
    ids_BL = np.random.default_rng(seed).integers(2, END, (rows, 12)).astype(np.int32)
    ids_BL[:, [4, 9]] = END
    ids_BL[::2, [2, 7]] = LETTERS + 1
    ids_BL[1::2, [6, 11]] = LETTERS + 1
    return ids_BL


def pictures(sizes=((32, 32), (50, 33), (29, 71), (20, 20)), seed=0):
    rng = np.random.default_rng(seed)
    small = [rng.integers(0, 256, (-(-h // 6), -(-w // 6), 3), np.uint8) for h, w in sizes]
    images = [Image.fromarray(s).resize((w, h)) for s, (h, w) in zip(small, sizes)]
    return [np.asarray(image) for image in images]


def close(ours, theirs):
    """Within 1e-4 absolute, and 1e-5 of the largest."""
    theirs = np.asarray(theirs.detach())
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=min(1e-4, 1e-5 * np.abs(theirs).max()))


@pytest.mark.parametrize("kind", ["openai", "laion", "sd1", "sd2", "text"])
def test_text_equals_transformers(folder, kind):
    torch, _ = peers()
    model, mine = transformers_clip(kind), text(folder(kind))
    ids_BL = random_ids()
    tower = getattr(model, "text_model", model)
    with torch.no_grad():
        theirs = tower(torch.tensor(ids_BL), output_hidden_states=True)
        penultimate = tower.final_layer_norm(theirs.hidden_states[-2])
    projection = getattr(model, "text_projection", None)
    names = ("last", "penultimate", "pooled", *(["projected"] if projection else []))
    ours = mine._run(ids_BL, names)
    close(ours["last"], theirs.last_hidden_state)
    close(ours["penultimate"], penultimate)
    close(ours["pooled"], theirs.pooler_output)
    ends = {"sd1": None, "openai": LETTERS + 1, "text": LETTERS + 1}
    assert mine.spec.eot == ends.get(kind, END)
    assert (projection is None) == (mine.spec.projection is None) == (kind in ("sd1", "sd2"))
    if projection is None:
        with pytest.raises(UserError, match="without its projection"):
            mine.outputs(TEXTS, ["projected"])
    else:
        close(ours["projected"], projection(theirs.pooler_output))


def test_texts_end_to_end(folder):
    """Tokens, states and embeddings of texts, in more batches than one."""
    torch, transformers = peers()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(folder("openai")))
    model, mine = transformers_clip("openai"), text(folder("openai"))
    batch = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=12)
    ids = torch.tensor(batch["input_ids"])
    with torch.no_grad():  # as Stable Diffusion's pipeline, without the mask
        theirs = model.text_model(ids)
        embeddings = model.text_projection(theirs.pooler_output)
    ctx_BLD, mask_BL, e_BP = mine.encode(TEXTS)
    close(ctx_BLD, theirs.last_hidden_state)
    np.testing.assert_array_equal(mask_BL, np.array(batch["attention_mask"], bool))
    close(mine.outputs(TEXTS, ["projected"])["projected"], embeddings)
    close(e_BP, torch.nn.functional.normalize(embeddings, dim=-1))
    np.testing.assert_array_equal(mine.states(TEXTS)[0], ctx_BLD)
    np.testing.assert_array_equal(mine.sentence(TEXTS), e_BP)
    assert mine.states([])[0].shape == (0, 12, 24) and (mine.max_length, mine.width) == (12, 24)


def test_penultimate_is_a_config_of_one_layer_less(folder, tmp_path):
    """Stable Diffusion 2 stores 23 of 24 layers: the same states either way."""
    _, transformers = peers()
    whole = transformers_clip("sd2")
    less = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(**{**GELU_TEXT, "num_hidden_layers": 1})
    )
    less.load_state_dict(whole.state_dict(), strict=False)
    less.save_pretrained(tmp_path / "text_encoder")
    (tmp_path / "tokenizer").mkdir()
    write_vocabulary(tmp_path / "tokenizer")
    ours, _ = text(folder("sd2"), layer="penultimate").states(TEXTS)
    np.testing.assert_allclose(ours, text(tmp_path / "text_encoder").states(TEXTS)[0], atol=1e-6)


def test_an_added_token_needs_its_embedding(folder, tmp_path):
    write_vocabulary(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<cat-toy>": VOCABULARY}))
    with pytest.raises(UserError, match=f"ids up to {VOCABULARY}, .* of {VOCABULARY} tokens only"):
        text(folder("openai"), vocabulary=tmp_path)


def test_bfloat16(folder):
    """A narrow type changes little, and says so in the hash."""
    wide, narrow = text(folder("openai")), text(folder("openai"), dtype=jnp.bfloat16)
    a, b = (m.outputs(TEXTS, ["projected"])["projected"] for m in (wide, narrow))
    assert b.dtype == np.float32 and 0 < np.abs(a - b).max() < 0.05 * np.abs(a).max()
    assert wide.hash != narrow.hash == text(folder("openai"), dtype=jnp.bfloat16).hash
    assert wide.hash != text(folder("openai"), layer="penultimate").hash


@pytest.mark.parametrize("kind", ["openai", "laion", "image", "trunk"])
def test_image_equals_transformers(folder, kind):
    torch, transformers = peers()
    model, mine = transformers_clip(kind), clip_image.load_image(folder(kind), **three())
    images, side = pictures(), mine.spec.side
    x_BCHW = pillow_processor(side)(images, return_tensors="pt")["pixel_values"]
    tower = getattr(model, "vision_model", model)
    with torch.no_grad():
        theirs = tower(x_BCHW)
    ours = mine.features(images, list(mine.layers))
    close(ours["tokens"], theirs.last_hidden_state[:, 1:])
    close(ours["pooled"], theirs.pooler_output)
    if kind == "trunk":
        with pytest.raises(UserError, match="has the layers pooled, tokens, not 'projected'"):
            mine.features(images, ["projected"])
    else:
        close(ours["projected"], model.visual_projection(theirs.pooler_output))
    scaled = np.stack([mine.preprocess(image) for image in images])
    again = mine.features_of_scaled(scaled, list(mine.layers))
    np.testing.assert_array_equal(again["pooled"], ours["pooled"])
    assert mine.features([], list(mine.layers))["tokens"].shape == (0, *ours["tokens"].shape[1:])


def test_score_equals_transformers(folder):
    """The cosine of a picture and a text is that of CLIPModel's logits."""
    torch, transformers = peers()
    model, images = transformers_clip("openai"), pictures()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(folder("openai")))
    ids = tokenizer(TEXTS, padding="max_length", max_length=12, truncation=True)["input_ids"]
    x = pillow_processor(32)(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model(torch.tensor(ids), x).logits_per_image.diagonal() / model.logit_scale.exp()
    ours = similarity.pair_cosines(
        clip_image.load_image(folder("openai")).features(images)["projected"],
        text(folder("openai")).outputs(TEXTS, ["projected"])["projected"],
    )
    np.testing.assert_allclose(ours, logits, atol=1e-5)


# --- pictures ---------------------------------------------------------------------------------


def pillow_processor(side):
    """transformers' processor that resizes with Pillow: its name changed in version 5."""
    _, transformers = peers()
    name = "CLIPImageProcessorPil"
    if not hasattr(transformers, name):
        name = "CLIPImageProcessor"
    crop = {"height": side, "width": side}
    return getattr(transformers, name)(size={"shortest_edge": side}, crop_size=crop)


def test_preprocessing_equals_transformers():
    sizes = [(224, 224), (225, 227), (640, 481), (37, 600), (300, 224), (223, 1000), (50, 50)]
    images = pictures([*sizes, *((w, h) for h, w in sizes)])
    for side in (224, 336):
        ours = np.stack([clip_image.Preprocess(side)(image) for image in images])
        theirs = np.stack(pillow_processor(side)(images)["pixel_values"])
        np.testing.assert_allclose(ours, theirs.transpose(0, 2, 3, 1), rtol=0, atol=1e-6)


def test_fits_name_what_is_done():
    """torchvision's crop keeps other pixels where the margin is odd; squashing keeps all."""
    image = pictures([(32, 35)])[0]
    ours = {fit: clip_image.Preprocess(32, fit).resize(image) for fit in clip_image.FITS}
    np.testing.assert_array_equal(ours["transformers"], image[:, 1:33])
    np.testing.assert_array_equal(ours["open_clip"], image[:, 2:34])  # round(1.5)
    whole = Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(ours["squash"], whole)
    with pytest.raises(UserError, match="transformers, open_clip, squash, not 'pad'"):
        clip_image.Preprocess(32, "pad")
    with pytest.raises(UserError, match="not float32"):
        clip_image.Preprocess(32)(image.astype(np.float32))


def test_preprocessing_is_read_from_the_folder(folder):
    path = folder("image")
    config = path / "preprocessor_config.json"
    plain = clip_image.load_image(path)
    assert plain.preprocess == clip_image.Preprocess(28)
    crop = {"height": 28, "width": 28}
    stored = {"do_resize": True, "resample": 3, "size": 28, "crop_size": crop}
    config.write_text(json.dumps({**stored, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    other = clip_image.load_image(path)
    assert other.preprocess == clip_image.Preprocess(28, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert len({plain.hash, other.hash, plain.layer_hash("pooled")}) == 3
    config.write_text(json.dumps({**stored, "resample": 2}))
    with pytest.raises(UserError, match="resample=2 is not supported, 3 is"):
        clip_image.load_image(path)
    assert clip_image.load_image(path, fit="squash").preprocess.fit == "squash"
    config.unlink()


# --- layouts ----------------------------------------------------------------------------------


def as_open_clip(tensors):
    """transformers' tensors of a CLIPModel under OpenCLIP's names."""
    blocks = {
        "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2":
        "mlp.c_proj", "self_attn.out_proj": "attn.out_proj",
    }  # fmt: skip
    names = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "logit_scale": "logit_scale",
    }
    stems = {
        "text_model.encoder.layers": "transformer.resblocks", "text_model.final_layer_norm":
        "ln_final", "vision_model.encoder.layers": "visual.transformer.resblocks",
        "vision_model.pre_layrnorm": "visual.ln_pre", "vision_model.post_layernorm":
        "visual.ln_post",
    }  # fmt: skip
    out = {
        "text_projection": np.ascontiguousarray(tensors["text_projection.weight"].T),
        "visual.proj": np.ascontiguousarray(tensors["visual_projection.weight"].T),
    }
    for name, t in tensors.items():
        if name in names:
            out[names[name]] = t
        elif "q_proj" in name:
            key, leaf = name.replace("q_proj", "k_proj"), name.rpartition(".")[2]
            packed = [t, tensors[key], tensors[name.replace("q_proj", "v_proj")]]
            new = name.replace("self_attn.q_proj." + leaf, "attn.in_proj_" + leaf)
            out[renamed(new, stems)] = np.concatenate(packed)
        elif not any(part in name for part in ("k_proj", "v_proj", "_projection")):
            out[renamed(name, {**stems, **blocks})] = t
    return out


def renamed(name, table):
    for old, new in table.items():
        name = name.replace(old, new)
    return name


def open_clip_config(gelu=False):
    t, v = (GELU_TEXT, GELU_IMAGE) if gelu else (TEXT, IMAGE)
    vision = {
        "image_size": v["image_size"], "patch_size": v["patch_size"], "width": v["hidden_size"],
        "layers": v["num_hidden_layers"], "head_width": v["hidden_size"] //
        v["num_attention_heads"], "mlp_ratio": 4.3637 if gelu else 3.0,
    }  # fmt: skip
    texts = {
        "context_length": t["max_position_embeddings"], "vocab_size": t["vocab_size"],
        "width": t["hidden_size"], "heads": t["num_attention_heads"],
        "layers": t["num_hidden_layers"], "mlp_ratio": 64 / 24 + 1e-6,
    }  # fmt: skip
    model = {"embed_dim": 8 if gelu else 16, "vision_cfg": vision, "text_cfg": texts}
    return {"model_cfg": model if gelu else {**model, "quick_gelu": True}}


@pytest.mark.parametrize("kind", ["openai", "laion"])
def test_layouts_hold_the_same_model(folder, tmp_path, kind):
    """Hashes are of values: OpenCLIP's layout, torch's format, parts in several files, and the
    indices that transformers once stored change none. (OpenCLIP's texts end by another rule, which
    is hashed too.)
    """
    torch, _ = peers()
    tensors = safetensors.numpy.load_file(folder(kind) / "model.safetensors")
    config = (folder(kind) / "config.json").read_text()
    image, words = clip_image.load_image(folder(kind), fit="open_clip"), text(folder(kind))

    native = tmp_path / "native"
    native.mkdir()
    whole = as_open_clip(tensors) | {"input_resolution": np.array(32), "vocab_size": np.array(514)}
    safetensors.numpy.save_file(whole, native / "open_clip_model.safetensors")
    stored = open_clip_config(gelu=kind == "laion")
    (native / "open_clip_config.json").write_text(json.dumps(stored))
    write_vocabulary(native)
    other = clip_image.load_image(native)
    assert (other.spec, other.hash) == (image.spec, image.hash)
    assert dataclasses.replace(words.spec, eot=None) == text(native).spec
    assert hash_of(words._params) == hash_of(text(native)._params)

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text(config)
    torch.save(transformers_clip(kind).state_dict(), pickled / "pytorch_model.bin")
    assert clip_image.load_image(pickled, fit="open_clip").hash == image.hash

    parts = tmp_path / "parts"
    parts.mkdir()
    old = tensors | {"text_model.embeddings.position_ids": np.arange(12)[None]}
    (parts / "config.json").write_text(config)
    files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(old)}
    for file in set(files.values()):
        some = {name: old[name] for name in old if files[name] == file}
        safetensors.numpy.save_file(some, parts / file)
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    write_vocabulary(parts)
    assert text(parts).hash == words.hash


@pytest.fixture
def open_clip():
    """open_clip's CLIP without the package around it, which needs torchvision and timm."""
    torch, transformers = peers()
    transformers.AutoModel, transformers.AutoConfig  # noqa: B018 (looked up before the stand-ins)
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        pytest.skip(OPEN_CLIP)
    before = dict(sys.modules)
    package = types.ModuleType("open_clip")
    package.__path__ = list(spec.submodule_search_locations)
    misc = types.ModuleType("torchvision.ops.misc")
    misc.FrozenBatchNorm2d = torch.nn.Identity
    stand_ins = {"open_clip": package, "torchvision.ops.misc": misc, "timm": None}
    stand_ins |= {name: types.ModuleType(name) for name in ("torchvision", "torchvision.ops")}
    sys.modules.update(stand_ins)
    try:
        yield importlib.import_module("open_clip.model")
    finally:
        for name in [n for n in sys.modules if n.partition(".")[0] in ("open_clip", "torchvision")]:
            del sys.modules[name]
        sys.modules.pop("timm")
        sys.modules.update({n: m for n, m in before.items() if n not in sys.modules})


@pytest.mark.parametrize("gelu", [False, True])
def test_equals_open_clip(open_clip, tmp_path, gelu):
    torch, _ = peers()
    config = open_clip_config(gelu)
    model = randomise(open_clip.CLIP(**config["model_cfg"]))
    tensors = {name: t.numpy() for name, t in model.state_dict().items()}
    safetensors.numpy.save_file(tensors, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    write_vocabulary(tmp_path)
    image = clip_image.load_image(tmp_path, **three())
    scaled = np.stack([image.preprocess(p) for p in pictures()])
    ids_BL = random_ids()
    mine = text(tmp_path)
    ours = mine._run(ids_BL, ("projected",))["projected"]
    with torch.no_grad():
        close(ours, model.encode_text(torch.tensor(ids_BL).long()))
        pixels = torch.tensor(scaled.transpose(0, 3, 1, 2))
        close(image.features_of_scaled(scaled)["projected"], model.encode_image(pixels))


# --- sizes ------------------------------------------------------------------------------------

# Millions of parameters of the image tower, the text tower and both, with projections and
# temperature: open_clip's docs/model_profile.csv.
MILLIONS = {
    "ViT-B/32": (87.85, 63.43, 151.28), "ViT-L/14": (303.97, 123.65, 427.62),
    "ViT-L/14@336": (304.29, 123.65, 427.94), "ViT-H/14": (632.08, 354.03, 986.11),
    "ViT-g/14": (1012.65, 354.03, 1366.68),
}  # fmt: skip


def count(module, example):
    shapes = jax.eval_shape(module.init, jax.random.key(0), example)["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def count_text(spec):
    return count(clip_text.TextTower(spec), jax.ShapeDtypeStruct((1, spec.positions), jnp.int32))


def count_image(spec):
    x = jax.ShapeDtypeStruct((1, spec.side, spec.side, 3), jnp.float32)
    return count(clip_image.ImageTower(spec), x)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    text, image = count_text(PUBLISHED[name].text), count_image(PUBLISHED[name].image)
    counts = [round(n / 1e6, 2) for n in (image, text, image + text + 1)]
    np.testing.assert_allclose(counts, MILLIONS[name], atol=0.011)


# The text encoders of Stable Diffusion, from their config.json.
SD1 = {
    "model_type": "clip_text_model", "hidden_size": 768, "intermediate_size": 3072,
    "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "quick_gelu",
    "projection_dim": 768, "vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 2,
}  # fmt: skip
SD2 = {
    **SD1, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
    "num_attention_heads": 16, "hidden_act": "gelu", "projection_dim": 512,
}  # fmt: skip


@pytest.mark.parametrize(("config", "parameters"), [(SD1, 123_060_480), (SD2, 340_387_840)])
def test_sizes_of_stable_diffusion(config, parameters):
    torch, transformers = peers()
    options = {k: v for k, v in config.items() if k != "model_type"}
    with torch.device("meta"):
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**options))
    spec = clip_checkpoint.transformers_spec(config, "text")
    assert spec.eot is None
    ours = count_text(dataclasses.replace(spec, projection=None))
    assert ours == sum(p.numel() for p in model.parameters()) == parameters


def test_older_configs():
    """`text_config_dict`, where there is one, wins over `text_config`, as transformers has it."""
    _, transformers = peers()
    config = {
        "model_type": "clip", "projection_dim": 768,
        "text_config": {"hidden_size": 512, "eos_token_id": 2, "vocab_size": 7},
        "text_config_dict": {"hidden_size": 768, "num_attention_heads": 12},
        "vision_config": {"patch_size": 14},
    }  # fmt: skip
    options = {k: v for k, v in config.items() if k != "model_type"}
    theirs = transformers.CLIPConfig(**json.loads(json.dumps(options)))
    ours = clip_checkpoint.transformers_spec(config, "text")
    t = theirs.text_config
    assert (ours.width, ours.heads, ours.vocabulary, ours.eot, ours.hidden) == (
        t.hidden_size, t.num_attention_heads, t.vocab_size, t.eos_token_id, t.intermediate_size,
    )  # fmt: skip
    assert ours.projection == 768
    assert clip_checkpoint.transformers_spec(config, "image").patch == 14


# --- mistakes ---------------------------------------------------------------------------------


def test_missing_files_say_what_to_fetch(tmp_path):
    for load in (text, clip_image.load_image):
        with pytest.raises(UserError, match="openai/clip-vit-large-patch14 .*ViT-L/14") as e:
            load(tmp_path / "clip")
        assert f"no CLIP weights at {tmp_path / 'clip'}" in str(e.value)
        assert "laion/CLIP-ViT-g-14-laion2B-s34B-b88K (ViT-g/14)" in str(e.value)
    with pytest.raises(UserError, match="laion/CLIP-ViT-H-14-laion2B-s32B-b79K") as e:
        text(tmp_path, model="ViT-H/14")
    assert "openai" not in str(e.value)
    other = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"conv.weight": np.ones(3, np.float32)}, other)
    with pytest.raises(UserError, match="holds no CLIP text tower, but conv.weight"):
        text(tmp_path)
    with pytest.raises(UserError, match="no CLIP is called 'ViT-X'"):
        clip_checkpoint.spec_of(clip_checkpoint.Checkpoint(other, "open_clip", {}), "text", "ViT-X")
    with pytest.raises(UserError, match="does not tell its sizes: put the open_clip_config.json"):
        clip_checkpoint.spec_of(clip_checkpoint.Checkpoint(other, "open_clip", {}), "image")


def test_what_does_not_fit_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="holds no CLIP image tower: fetch"):
        clip_image.load_image(folder("text"))
    with pytest.raises(UserError, match="describes no CLIP image tower: model_type='clip_text"):
        clip_image.load_image(folder("sd1"))
    with pytest.raises(UserError, match="leave out the name"):
        text(folder("openai"), model="ViT-B/32")
    with pytest.raises(UserError, match="last or penultimate, not 'first'"):
        text(folder("openai"), layer="first")
    tensors = safetensors.numpy.load_file(folder("text") / "model.safetensors")
    del tensors["text_model.final_layer_norm.bias"]
    safetensors.numpy.save_file(tensors | {"extra": np.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder("text") / "config.json").read_text())
    with pytest.raises(UserError, match="1 missing, 1 surplus, 0 misshapen"):
        text(tmp_path)
    config = open_clip_config()["model_cfg"]
    with pytest.raises(UserError, match="'timm_model_name': 'x'.* is not supported"):
        clip_checkpoint.open_clip_spec({**config, "vision_cfg": {"timm_model_name": "x"}}, "image")
    with pytest.raises(UserError, match="hidden_act|activation is one of quick_gelu, gelu"):
        clip_checkpoint.transformers_spec({**SD1, "hidden_act": "silu"}, "text")
    for bad in ({"width": 10}, {"layers": 0}, {"heads": "x"}, {"side": 15}):
        with pytest.raises(UserError, match="CLIP tower|patches"):
            ImageSpec(**{"side": 14, "patch": 7, "width": 8, "layers": 1, "heads": 4, "hidden": 8,
                         "activation": "gelu", "projection": None} | bad)  # fmt: skip


def test_one_compilation_for_any_number(folder):
    mine = clip_image.load_image(folder("openai"), batch=2, devices=jax.devices()[:2])
    images = pictures()
    whole = mine.features(images)["projected"]
    for n in (0, 1, 3):
        np.testing.assert_allclose(mine.features(images[:n])["projected"], whole[:n], atol=1e-6)
    assert mine._apply._cache_size() == 1
    np.testing.assert_allclose(mine.features(images[::-1])["projected"][::-1], whole, atol=1e-6)
    assert "(2 layers, width 32, patch 8), projected (16 features)" in mine.describe("projected")


def test_equal_over_any_devices(folder):
    # Eight devices hold a row each of the first batch, and the outputs are those of one device.
    images, ids_BL = pictures() * 3, random_ids(12)
    one, eight = ({"batch": 8, "devices": jax.devices()[:n]} for n in (1, 8))
    towers = [
        (lambda t: t.features(images), [clip_image.load_image(folder("openai"), **kw)
                                        for kw in (one, eight, {})]),
        (lambda t: t._run(ids_BL, ("last", "projected")), [text(folder("openai"), **kw)
                                                           for kw in (one, eight)]),
    ]  # fmt: skip
    for run, (alone, *others) in towers:
        wanted = run(alone)
        for other in others:
            assert alone.spread.mesh.size == 1 and other.spread.mesh.size == 8
            for name, found in run(other).items():
                np.testing.assert_allclose(found, wanted[name], atol=5e-6)
    assert towers[0][1][2].spread.batch == 64
    image, names = towers[0][1][1], ("projected",)
    scaled = image.spread.rows(np.zeros((8, 32, 32, 3), np.float32))
    out = image._apply(image._params, scaled, names)["projected"]
    assert [shard.data.shape for shard in out.addressable_shards] == [(1, 16)] * 8
    for load in (clip_image.load_image, text):
        with pytest.raises(UserError, match="batch of 3 does not divide over 8 devices"):
            load(folder("openai"), batch=3, devices=jax.devices())
