"""The T5 encoder and its tokens equal their peers', from every layout its files come in."""

import io
import json
import pydoc_data.topics
import random
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.models import pretrained, t5, t5_tokenizer

WHY = "compares with transformers: pip install -e '.[parity]'"
transformers = pytest.importorskip("transformers", reason=WHY)
torch = pytest.importorskip("torch", reason=WHY)
sentencepiece = pytest.importorskip("sentencepiece", reason=WHY)

LENGTH = 24
PIECES = [
    "a photo of", "an octopus", "two apples left of a house", "&amp;", "&#39;", "&lt;b&gt;", "<b>",
    "</s>", "<pad>", "<unk>", "<extra_id_0>", "<extra_id_99>", "▁", "\u200b", "\u200d", "\ufeff",
    "\u00ad", "\u2028", "\x00", "\x07", "\x1b", "\x7f", "\x85", "\xa0", "\u3000", "\t", "\n",
    "\r\n", " ", "  ", "👩🏽\u200d🚀", "🇺🇳", "❤️", "é", "e\u0301", "ﬁ", "ǅ", "İ", "ß", "①", "½",
    "日本語", "кириллица", "مرحبا", "ไทย", "한국어", "각", "𝔘𝔫𝔦", "\U0010ffff", "\ue000",
    "\u0600", "…", "“quoted”", "--", "$1,000?!", "3.14%", "w" * 150, "\u202e", "\u0300", "㌔",
    "\ufffd", "\u180e", "～", "Straßencafé", "semi-colons; isn't", "THE END",
]  # fmt: skip
PROSE = [t for text in pydoc_data.topics.topics.values() for t in text.split("\n")][:3000]
WORDS = " ".join(PROSE).split()
TEXTS = ["two apples", "", "an octopus on a dark blue background of a house " * 9, "👩🏽 é"]


@pytest.fixture(autouse=True, scope="module")
def _threads():
    torch.set_num_threads(1)


def awkward(n: int) -> list[str]:
    """Emoji, accents, overlong, empty, entities, control characters, mixed scripts."""
    rng = random.Random(0)
    texts = ["", "   ", "x", "</s></s>", "<pad> a", "a <extra_id_5>b", " lead", "trail ", "▁▁a",
             "a" * 3000, "a photo of " * 400]  # fmt: skip
    ranges = [(1, 0x2FF), (0x300, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x1FFFF)]
    while len(texts) < n:
        text = ""
        for _ in range(rng.randint(1, 15)):
            letter = chr(rng.randint(*rng.choice(ranges)))
            text += rng.choice((rng.choice(PIECES), rng.choice(WORDS), letter))
            text += " " * rng.randint(0, 1)
        texts.append(text)
    return texts


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A folder with a small spiece.model of the published ones' kind."""
    folder = tmp_path_factory.mktemp("vocabulary")
    rng, model = random.Random(1), io.BytesIO()
    plain = [p for p in PIECES if p.isprintable() and "<" not in p]
    lines = [*PROSE, *(" ".join(rng.choices(plain, k=8)) for _ in range(100))]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=1000, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, character_coverage=0.9995, num_threads=1,
        minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="module")
def peer_tokenizer(vocabulary):
    return transformers.T5Tokenizer.from_pretrained(vocabulary)


def config(**kw):
    sizes = {
        "d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 3, "num_heads": 4, "vocab_size": 1200,
        "feed_forward_proj": "gated-gelu",
    }  # fmt: skip
    return transformers.T5Config(**sizes | kw)


def save(model, folder, vocabulary, **kw):
    """Norms off 1, weights as initialised; with the vocabulary, as repositories hold it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(p + 0.3 * torch.randn(p.shape, generator=generator))
    model.eval().save_pretrained(folder, **kw)
    shutil.copy(vocabulary / "spiece.model", folder)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory, vocabulary):
    """A whole T5, its folder, and the wrapper around its encoder."""
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(1)
    model = save(transformers.T5ForConditionalGeneration(config()), folder, vocabulary)
    return model, folder, t5.load(folder, LENGTH, batch=3)


# --- tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["spiece.model", "tokenizer.json"])
def test_tokens_equal_transformers(vocabulary, peer_tokenizer, tmp_path, file):
    peer, folder = peer_tokenizer, vocabulary
    if file == "tokenizer.json":
        folder = tmp_path
        padded = transformers.T5Tokenizer.from_pretrained(vocabulary)
        padded("a", padding="max_length", truncation=True, max_length=3)  # and saves that too
        padded.save_pretrained(folder)
        assert json.loads((folder / file).read_text())["padding"]["strategy"] == {"Fixed": 3}
        peer = transformers.T5Tokenizer.from_pretrained(folder)
    assert (folder / file).is_file()
    texts = awkward(1000)
    ours = t5_tokenizer.load(folder)
    theirs = peer(texts).input_ids
    assert [e.ids for e in ours.encode_batch(texts)] == theirs
    assert len({i for ids in theirs for i in ids}) > 500 and min(map(len, theirs)) == 1


@pytest.mark.parametrize("newer", [False, True])
def test_added_tokens_equal_transformers(vocabulary, tmp_path, newer):
    """Beside spiece.model, as transformers wrote them before 4.34 and later, some of them twice."""
    shutil.copy(vocabulary / "spiece.model", tmp_path)
    ids = {"<extra_id_0>": 1099, "<New>": 1101, "<cat-toy>": 1100}
    if newer:
        own = {"lstrip": False, "rstrip": True, "normalized": False, "single_word": False}
        stored = {str(i): {"content": text, "special": False, **own} for text, i in ids.items()}
        table, name = {"added_tokens_decoder": stored}, "tokenizer_config.json"
    else:
        table, name = ids, "added_tokens.json"
    (tmp_path / name).write_text(json.dumps(table))
    peer = transformers.T5Tokenizer.from_pretrained(tmp_path)
    texts = ["a <cat-toy> b", "<New><cat-toy>", "<new> x", "x<New> y", *awkward(100)]
    theirs = peer(texts).input_ids
    assert [e.ids for e in t5_tokenizer.load(tmp_path).encode_batch(texts)] == theirs
    assert {1100, 1101} <= {i for row in theirs for i in row}


def test_tokens_added_beside_a_tokenizer_equal_transformers(vocabulary, tmp_path):
    """Of a slow tokenizer, to which a tokenizer.json of the same vocabulary was put."""
    shutil.copy(vocabulary / "spiece.model", tmp_path)
    plain = t5_tokenizer.load(tmp_path)
    (tmp_path / "spiece.model").unlink()
    plain.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<cat-toy>": plain.get_vocab_size()}))
    found = t5_tokenizer.load(tmp_path)
    ids = found.encode("a <cat-toy> b").ids
    assert ids == transformers.T5Tokenizer.from_pretrained(tmp_path)("a <cat-toy> b").input_ids
    assert plain.get_vocab_size() in ids


def test_added_tokens_follow_the_vocabulary(vocabulary, saved, tmp_path):
    """An id that a model of pieces cannot give, and one that has no embedding."""
    shutil.copy(vocabulary / "spiece.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<new>": 1200}))
    with pytest.raises(UserError, match="'<new>' has the id 1200, and what follows .* is 1100"):
        t5_tokenizer.load(tmp_path)
    (tmp_path / "added_tokens.json").write_text(
        json.dumps({f"<new-{i}>": 1100 + i for i in range(101)})
    )
    with pytest.raises(UserError, match="has 1201 tokens, but .* only 1200"):
        t5.load(saved[1], LENGTH, tokenizer=tmp_path)


def test_cut_and_padded_tokens_equal_transformers(saved, peer_tokenizer):
    texts = awkward(1000)
    theirs = peer_tokenizer(
        texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="np"
    )
    ids_BL, mask_BL = saved[2].tokenize(texts)
    np.testing.assert_array_equal(ids_BL, theirs["input_ids"])
    np.testing.assert_array_equal(mask_BL, theirs["attention_mask"].astype(bool))
    assert mask_BL.all(1).any() and not mask_BL.all()


def test_plain_texts_equal_sentencepiece(vocabulary):
    """What the models were trained on."""
    peer = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary / "spiece.model"))
    rng, ours = random.Random(2), t5_tokenizer.load(vocabulary)
    plain = [p for p in PIECES if p.isprintable() and not {*"<▁\u0300"} & {*p}]
    for _ in range(300):
        text = " ".join(rng.choices(plain, k=3) + rng.choices(WORDS, k=5))
        assert ours.encode(text).ids == [*peer.encode(text), 1], text


# --- the network ------------------------------------------------------------------------------


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (16, 64), (64, 200), (8, 20)])
def test_buckets_equal_transformers(buckets, distance):
    bucket = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
    distance_LM = torch.arange(1500)[None] - torch.arange(1500)[:, None]
    theirs = bucket(distance_LM, True, buckets, distance).numpy()
    np.testing.assert_array_equal(t5.position_buckets(1500, buckets, distance), theirs)


@pytest.mark.parametrize(
    ("kw", "shards"),
    [({}, "5GB"), ({"feed_forward_proj": "relu", "layer_norm_epsilon": 1e-3}, "20KB"),
     ({"feed_forward_proj": "gated-silu", "relative_attention_num_buckets": 8,
       "relative_attention_max_distance": 30}, "20KB"), ({"feed_forward_proj": "gelu"}, "5GB")],
)  # fmt: skip
def test_states_equal_transformers(tmp_path, vocabulary, kw, shards):
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(config(**kw))
    save(model, tmp_path, vocabulary, max_shard_size=shards)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (shards == "20KB")
    spec = t5.spec_of(json.loads((tmp_path / "config.json").read_text()))
    params = t5.params_of(spec, pretrained.read_weights(tmp_path), tmp_path)
    rng = np.random.default_rng(0)
    ids_BL = rng.integers(0, 1200, (2, 150), dtype=np.int32)  # beyond the farthest bucket
    mask_BL = np.arange(150) < np.array([[150], [40]])
    with torch.no_grad():
        theirs_BLD = model(torch.tensor(ids_BL), torch.tensor(mask_BL)).last_hidden_state.numpy()
    apply = jax.jit(lambda p, *a: t5.T5Encoder(spec).apply({"params": p}, *a))
    assert theirs_BLD.std() > 0.5 and np.abs(theirs_BLD[0] - theirs_BLD[1]).max() > 1
    np.testing.assert_allclose(apply(params, ids_BL, mask_BL), theirs_BLD, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "sizes",
    [(512, 64, 2048, 6, 8, "relu"), (512, 64, 1024, 8, 6, "gated-gelu"),
     (768, 64, 2048, 12, 12, "gated-gelu"), (1024, 64, 2816, 24, 16, "gated-gelu"),
     (2048, 64, 5120, 24, 32, "gated-gelu"), (4096, 64, 10240, 24, 64, "gated-gelu")],
    ids=["t5-small", "v1_1-small", "v1_1-base", "v1_1-large", "v1_1-xl", "v1_1-xxl"],
)  # fmt: skip
def test_parameters_of_the_published_sizes(sizes):
    names = ("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "feed_forward_proj")
    c = transformers.T5Config(**dict(zip(names, sizes)))
    with torch.device("meta"):
        want = sum(p.numel() for p in transformers.T5EncoderModel(c).parameters())
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    encoder = t5.T5Encoder(t5.spec_of(c.to_dict()))
    tree = jax.eval_shape(encoder.init, jax.random.key(0), tokens, tokens)
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == want


# --- files and the wrapper --------------------------------------------------------------------


def test_states_of_texts_equal_transformers(saved, peer_tokenizer):
    model, _, ours = saved
    theirs = peer_tokenizer(
        TEXTS, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    with torch.no_grad():
        hidden_BLD = model.encoder(**theirs).last_hidden_state.numpy()
    ctx_BLD, mask_BL = ours.states(TEXTS)
    np.testing.assert_allclose(ctx_BLD, hidden_BLD * mask_BL[..., None], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(np.any(ctx_BLD != 0, axis=-1), mask_BL)
    assert ctx_BLD.shape == (len(TEXTS), LENGTH, ours.width) and ours._encode._cache_size() == 1
    assert ours.states([])[0].shape == (0, LENGTH, ours.width)


def test_every_file_of_the_same_weights_gives_the_same(saved, tmp_path, vocabulary, peer_tokenizer):
    """The encoder alone in parts, and torch's own file; the tokenizer in a folder of its own."""
    model, folder, ours = saved
    parts, pickled = tmp_path / "parts", tmp_path / "pickled"
    encoder = transformers.T5EncoderModel(config())
    encoder.load_state_dict(model.state_dict(), strict=False)
    encoder.save_pretrained(parts, max_shard_size="10KB")
    assert not (parts / "model.safetensors").is_file()
    pickled.mkdir()
    shutil.copy(folder / "config.json", pickled)
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    for other in (parts, pickled):
        again = t5.load(other, LENGTH, tokenizer=vocabulary)
        assert again.hash == ours.hash
        np.testing.assert_allclose(again.states(TEXTS)[0], ours.states(TEXTS)[0], atol=1e-5)
    assert t5.load(folder, LENGTH + 1).hash != ours.hash


def test_bfloat16(saved):
    _, folder, ours = saved
    half = t5.load(folder, LENGTH, dtype="bfloat16")
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(half._params["layer_0"]["query"])}
    assert kinds == {"bfloat16"} and half._params["norm"]["scale"].dtype == jnp.float32
    got, want = half.states(TEXTS)[0], ours.states(TEXTS)[0]
    assert got.dtype == np.float32 and half.hash != ours.hash
    assert 0 < np.linalg.norm(got - want) < 0.03 * np.linalg.norm(want)
    with pytest.raises(UserError, match="float32 or bfloat16, not in 'float16'"):
        t5.load(folder, LENGTH, dtype="float16")


def test_embedding_under_both_names(saved):
    model, _, ours = saved
    tensors = {k: v.numpy() for k, v in model.state_dict().items()}
    assert {"shared.weight", "encoder.embed_tokens.weight"} <= set(tensors)
    for gone in ("shared.weight", "encoder.embed_tokens.weight", "decoder.final_layer_norm.weight"):
        params = t5.params_of(ours.spec, {k: v for k, v in tensors.items() if k != gone}, "here")
        np.testing.assert_array_equal(params["tokens"]["embedding"], tensors["shared.weight"])
    tensors["shared.weight"] = tensors["shared.weight"] + 1
    with pytest.raises(UserError, match="1 surplus"):
        t5.params_of(ours.spec, tensors, "here")
    tensors = {k: v for k, v in tensors.items() if "block.1" not in k and k != "shared.weight"}
    with pytest.raises(UserError, match="9 missing, 0 surplus"):
        t5.params_of(ours.spec, tensors, "here")


def test_loads_without_torch(saved):
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from ldm_scaling.models import t5; print(t5.load(sys.argv[1], 8).states(['x'])[0].shape)"
    )
    done = subprocess.run([sys.executable, "-c", code, saved[1]], capture_output=True, text=True)
    assert done.stdout == "(1, 8, 32)\n", done.stderr


# --- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [({"model_type": "umt5"}, "model_type is 'umt5'"), ({"d_kv": None}, "head_width .* not None"),
     ({"feed_forward_proj": "gated-tanh"}, "'gated-tanh' is none of"),
     ({"relative_attention_num_buckets": 6}, "6 buckets must divide by 4"),
     ({"vocab_size": 300}, "the tokenizer in .* tokens, but .* only 300")],
)  # fmt: skip
def test_a_config_that_does_not_fit_is_refused(saved, tmp_path, change, says):
    table = json.loads((saved[1] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(table | change))
    with pytest.raises(UserError, match=says):
        t5.load(tmp_path, 8, tokenizer=saved[1])


def test_what_is_missing_is_named(saved, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"config\.json .*fetch .*google/t5-v1_1-large"):
        t5.load(tmp_path, 8)
    shutil.copy(saved[1] / "config.json", tmp_path)
    with pytest.raises(UserError, match="no T5 vocabulary in .*put spiece.model"):
        t5.load(tmp_path, 8)
    with pytest.raises(UserError, match="no weights in .*one of model.safetensors, .*model.bin"):
        t5.load(tmp_path, 8, tokenizer=saved[1])
    (tmp_path / "spiece.model").write_bytes(b"\x0a\x05none")
    with pytest.raises(UserError, match="spiece.model is not the vocabulary of a T5"):
        t5.load(tmp_path, 8)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json is not a whole tokenizer"):
        t5.load(tmp_path, 8)
    with pytest.raises(UserError, match="max_length = 1"):
        t5.load(saved[1], 1)
    with pytest.raises(UserError, match="text 1 of 2 is not Unicode"):
        saved[2].states(["fine", "\ud800"])
    with pytest.raises(UserError, match="a list of texts"):
        saved[2].states("a cat")
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    with pytest.raises(UserError, match="pip install sentencepiece .* or put tokenizer.json"):
        t5.load(saved[1], 8)
