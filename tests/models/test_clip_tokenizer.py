"""CLIP's tokens equal transformers' and open_clip's on a thousand awkward texts."""

import functools
import gzip
import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.models import clip_tokenizer

PARITY = "the peer is missing: pip install -e '.[parity]'"
OPEN_CLIP = PARITY + "; then  pip install --no-deps open_clip_torch"
BOS, EOS = "<|startoftext|>", "<|endoftext|>"

PIECES = [
    # plain, empty, overlong
    "a photo of a cat", "w" * 200, "word " * 100, "a" * 77 + " b" * 80, "", " ", "\t", "\n", "\r\n",
    # white space and control characters of every kind
    "\x00", "\x07", "\x1c", "\x1f", "\x7f", "\x85", "\u00a0", "\u1680", "\u2028", "\u3000",
    "\u200b", "\u2060", "\ufeff", "\u00ad", "\u180e", "\u202e",
    # accents, composed and not; lone marks; case that changes lengths or depends on place
    "é ö", "e\u0301 o\u0308", "\u0301", "\u0300\u0301", "ab\u0308\u0323c", "ß ẞ", "İ ı", "ſ K Å",
    "ﬁ ﬂ", "ǅ", "ΟΔΟΣ ΣΑΣ", "ͅ", "Straße",
    # scripts
    "日本語の", "한국어", "\u1100\u1161\u11a8", "кошка", "مرحبا ﷺ", "שלום", "हिन्दी", "ไทย",
    "𝔘𝔫𝔦", "𐐀", "\U0001e900", "mixed кот猫cat",
    # emoji: skin, joiners, flags, variation selectors, recent ones
    "👩🏽\u200d🚀", "🇺🇳", "❤️", "👨\u200d👩\u200d👧", "\u200d", "\ufe0f", "\U0001f9ff", "\U0001fae8",
    # numbers and signs
    "3.14159", "1234567890", "1,000", "①½²Ⅷ", "٣ ४", "$5 €6", "C++ #tag @x a_b", "?! ... —–",
    "http://x.y/z?a=b&c=d",
    # apostrophes
    "it's IT'S we'Ve 'Ll ''s", "don’t “q” ‘r’", "rock 'n' roll's 'd", "'ſ 'S'",
    # entities, whole, broken, twice escaped; broken encodings
    "&amp;", "&lt;b&gt;", "&amp;amp;lt;", "&#39;s", "&#x1F600;", "&nbsp;", "&none;",
    "&eacute &copy", "&#0; &#xD800;", "Ã©", "â€™", "ÃƒÂ©", "schÃ¶n", "\ufffd",
    # special tokens, whole, in capitals, broken
    BOS, EOS, "<|ENDOFTEXT|>", "<|end", "<start_of_text>", "<END_of_text>", "a<|endoftext|>b",
    "!", "!!", "hi! you !", "<ſtart_of_text>",
    # tokens that some folders add
    "a <cat-toy>s", "<CAT-TOY>", "x<cat-toy>", "< Dog >", "< dog >", " <pad> ", "<PAD>",
    # unassigned, private, beyond the first plane
    "\u0378", "\ue000", "\U000f0000", "\uffff", "\U0010ffff",
]  # fmt: skip


@functools.cache
def awkward(n=1000):
    r = random.Random(0)

    def letter():
        c = r.randrange(r.choice([0x80, 0x250, 0x3000, 0xD800, 0x110000]))
        return "?" if 0xD800 <= c < 0xE000 else chr(c)

    def piece():
        letters = (letter() for _ in range(r.randint(1, 8)))
        return r.choice(PIECES) if r.random() < 0.7 else "".join(letters)

    texts = list(PIECES)
    while len(texts) < n:
        texts.append(r.choice(["", " "]).join(piece() for _ in range(r.randint(1, 6))))
    return texts


@pytest.fixture(scope="module", params=["few merges", "OpenAI's"])
def vocabulary(request, tmp_path_factory):
    """One of few merges, and OpenAI's file where it is there."""
    if request.param == "OpenAI's":
        spec = importlib.util.find_spec("open_clip")
        if spec is None:
            pytest.skip("needs the parity extra: pip install -e '.[parity]'")
        return Path(spec.submodule_search_locations[0]) / clip_tokenizer.FILE
    path = tmp_path_factory.mktemp("vocabulary") / clip_tokenizer.FILE
    pairs = ["t h", "th e</w>", "i n", "in g</w>", "a t</w>", "c at</w>", "' s</w>", "Ã ©</w>"]
    path.write_bytes(gzip.compress("\n".join(["# version", *pairs, ""]).encode()))
    return path


@pytest.fixture(scope="module")
def save(tmp_path_factory, vocabulary):
    """A folder of transformers with the vocabulary in vocab.json and merges.txt."""
    lines = gzip.decompress(vocabulary.read_bytes()).decode().split("\n")[1:48895]
    merges = [line for line in lines if line]
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = [line.replace(" ", "") for line in merges]
    tokens = [*letters, *(c + "</w>" for c in letters), *words, BOS, EOS]

    def save(tables=lambda n: {}):
        path = tmp_path_factory.mktemp("tokenizer")
        (path / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
        (path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
        for name, table in tables(len(tokens)).items():
            (path / f"{name}.json").write_text(json.dumps(table))
        return path

    return save


def token(content, **kw):
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {"content": content, **flags, **kw}


def published(pad, n):
    """The tables in the `tokenizer` folders of Stable Diffusion 1 and 2, which differ in `pad`."""
    kind = {"__type": "AddedToken"}
    config = {
        "add_prefix_space": False, "bos_token": token(BOS, **kind), "do_lower_case": True,
        "eos_token": token(EOS, **kind), "model_max_length": 77, "pad_token": EOS,
        "tokenizer_class": "CLIPTokenizer", "unk_token": token(EOS, **kind),
    }  # fmt: skip
    special = {"bos_token": token(BOS), "eos_token": token(EOS), "pad_token": pad,
               "unk_token": token(EOS)}  # fmt: skip
    return {"tokenizer_config": config, "special_tokens_map": special}


def decoder(pad, n):
    """As transformers 4.34 and later write it."""
    stored = {"0": token("!", special=True, normalized=False)} if pad == "!" else {}
    stored |= {str(n - 2): token(BOS, special=True), str(n - 1): token(EOS, special=True)}
    names = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad}
    return {"tokenizer_config": {"added_tokens_decoder": stored, **names}}


ADDED = ("<cat-toy>", "< Dog >", "<pad>")


def textual_inversion(n):
    """As transformers wrote it before 4.34: three tokens beyond the vocabulary, one of them the
    padding, and one of it."""
    tables = published("<pad>", n)
    tables["tokenizer_config"]["additional_special_tokens"] = ["< Dog >"]
    ids = {text: n + i for i, text in enumerate(ADDED)}
    return tables | {"added_tokens": ids | {EOS: n - 1}}


def added_later(n):
    """The same as 4.34 and later write it, and of other flags."""
    tables = decoder("<pad>", n)
    flags = [{"lstrip": True, "normalized": False}, {"single_word": True}, {"special": True}]
    for i, (text, own) in enumerate(zip(ADDED, flags, strict=True)):
        tables["tokenizer_config"]["added_tokens_decoder"][str(n + i)] = token(text, **own)
    return tables


FOLDERS = {
    "bare": lambda n: {},
    "sd1": functools.partial(published, EOS),
    "sd2": functools.partial(published, "!"),
    "sd1, newer": functools.partial(decoder, EOS),
    "sd2, newer": functools.partial(decoder, "!"),
    "textual inversion": textual_inversion,
    "textual inversion, newer": added_later,
}


def equals_transformers(path, texts):
    transformers = pytest.importorskip("transformers", reason=PARITY)
    peer = transformers.CLIPTokenizer.from_pretrained(str(path))
    theirs = peer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="np")
    ids_BL, mask_BL = clip_tokenizer.load(path, "transformers")(texts)
    np.testing.assert_array_equal(ids_BL, theirs["input_ids"])
    np.testing.assert_array_equal(mask_BL, theirs["attention_mask"].astype(bool))
    return peer, ids_BL


@pytest.mark.parametrize("kind", FOLDERS)
def test_equals_transformers(save, kind, tmp_path):
    """In every kind of folder, and in the tokenizer.json that transformers makes of it."""
    peer, ids_BL = equals_transformers(save(FOLDERS[kind]), awkward())
    end = peer.eos_token_id
    assert (ids_BL == end).any(1).all() and (ids_BL[:, -1] == end).any()
    if "inversion" in kind:
        assert {peer.vocab[text] for text in ADDED} <= {*ids_BL.flat}
    if "sd2" in kind:  # its padding is a token of its own in texts too
        assert peer.pad_token_id == 0 and 0 in ids_BL[awkward().index("hi! you !"), 1:4]
    peer.save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    equals_transformers(tmp_path, awkward())
    (tmp_path / "tokenizer_config.json").unlink()
    equals_transformers(tmp_path, awkward())


def test_added_tokens_have_the_ids_that_their_folder_gives_them(save):
    """Where ids are left out too, as those of the weights beside; only transformers knows them."""
    path, plain = save(lambda n: {"added_tokens": {"<a>": n + 2, "<b>": n, EOS: 5}}), save()
    ours, bare = (clip_tokenizer.load(p, "transformers") for p in (path, plain))
    ids = ours(["<a> <b>"])[0][0, 1:3]
    np.testing.assert_array_equal(ids, [bare.size + 2, bare.size])
    assert ours.size == bare.size + 3 and ours.hash != bare.hash and ours.eos == bare.eos
    ours, bare = (clip_tokenizer.load(p, "open_clip") for p in (path, plain))
    assert ours.hash == bare.hash and ours.size == bare.size


@pytest.mark.parametrize("vocabulary", ["OpenAI's"], indirect=True)
def test_equals_open_clip(vocabulary, save):
    """Its tokenizer's file alone: the package around it needs torchvision."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or importlib.util.find_spec("torch") is None:
        pytest.skip(OPEN_CLIP)
    file = Path(spec.submodule_search_locations[0]) / "tokenizer.py"
    alone = importlib.util.spec_from_file_location("open_clip_tokenizer", file)
    module = importlib.util.module_from_spec(alone)
    alone.loader.exec_module(module)
    theirs = module.SimpleTokenizer()(awkward()).numpy()
    ours = clip_tokenizer.load(vocabulary, "open_clip")
    np.testing.assert_array_equal(ours(awkward())[0], theirs)
    other = clip_tokenizer.load(save(FOLDERS["sd2"]), "open_clip")  # the same words, two formats
    assert other.hash == ours.hash != clip_tokenizer.load(vocabulary, "transformers").hash
    np.testing.assert_array_equal(other(awkward())[0], theirs)


@pytest.mark.parametrize("behaviour", clip_tokenizer.BEHAVIOURS)
def test_rows(vocabulary, behaviour):
    """Start, text, end, padding; the end stays when a text is cut, at any length of row."""
    whole = clip_tokenizer.load(vocabulary, behaviour)
    ids_BL, mask_BL = whole(["the cat", "x " * 99, ""])
    assert ids_BL.dtype == np.int32 and ids_BL.shape == (3, 77)
    assert (ids_BL[:, 0] == whole.bos).all()
    assert mask_BL[1].all() and ids_BL[1, -1] == whole.eos
    assert mask_BL[2].sum() == 2 and ids_BL[2, 1] == whole.eos
    for row, mask in zip(ids_BL, mask_BL):
        assert row[mask][-1] == whole.eos and (row[~mask] == whole.pad).all()
    assert whole.pad == (0 if behaviour == "open_clip" else whole.eos)
    short = clip_tokenizer.load(vocabulary, behaviour, context=3)
    np.testing.assert_array_equal(short(["x y z"])[0], [[whole.bos, ids_BL[1, 1], whole.eos]])
    assert short.lengths(["x", "x y", "x y z", ""]) == [3, 4, 5, 2]
    assert whole.lengths(["x " * 75, "x " * 76]) == [77, 78]
    assert short.hash != whole.hash == clip_tokenizer.load(vocabulary, behaviour).hash
    assert whole([])[0].shape == (0, 77)


def test_the_behaviours_differ(vocabulary):
    """In entities and broken encodings, which only one of them mends."""
    a, b = (clip_tokenizer.load(vocabulary, name) for name in clip_tokenizer.BEHAVIOURS)
    mended = ["&lt;b&gt;", "schÃ¶n"], ["<b>", "schön"]
    np.testing.assert_array_equal(*(b(texts)[0] for texts in mended))
    assert (a(mended[0])[0] != a(mended[1])[0]).any(1).all()


def test_mistakes(vocabulary, save, tmp_path):
    load = clip_tokenizer.load
    with pytest.raises(UserError, match="transformers or open_clip, not 'openai'"):
        load(vocabulary, "openai")
    with pytest.raises(UserError, match="context = 1, give 2 or more"):
        load(vocabulary, "open_clip", context=1)
    with pytest.raises(UserError, match="fetch bpe_simple_vocab_16e6.txt.gz from https://github"):
        load(tmp_path / "x.txt.gz", "open_clip")
    (tmp_path / "y.txt.gz").write_bytes(vocabulary.read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot read the CLIP vocabulary .*y.txt.gz"):
        load(tmp_path / "y.txt.gz", "open_clip")
    with pytest.raises(UserError, match="vocab.json and merges.txt, which lie beside the weights"):
        load(tmp_path, "transformers")
    path = save(lambda n: {"special_tokens_map": {"pad_token": "<pad>"}})
    with pytest.raises(UserError, match=r"the tokens \['<pad>'\] are not in the vocabulary"):
        load(path, "transformers")
    for ids in ({"<a>": 5}, {"<a>": 10**6, "<b>": 10**6}):
        with pytest.raises(UserError, match="two tokens have one id; added are .*'<a>'"):
            load(save(lambda n, ids=ids: {"added_tokens": ids}), "transformers")
    with pytest.raises(UserError, match="cannot read its added tokens .*invalid literal"):
        load(save(lambda n: {"added_tokens": {"<a>": "first"}}), "transformers")
    path = save()
    (path / "merges.txt").write_text("#version: 0.2\nzz\u1234 yy\n")
    with pytest.raises(UserError, match="does not hold together"):
        load(path, "transformers")
    for texts in (["fine", None], ["fine", "\ud800"]):
        with pytest.raises(UserError, match="text 1 of 2 is not Unicode"):
            load(vocabulary, "transformers")(texts)
    with pytest.raises(UserError, match="a list of texts"):
        load(vocabulary, "transformers")("a cat")
