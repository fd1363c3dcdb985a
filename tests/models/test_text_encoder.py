"""The text encoder equals its peers on odd strings, and depends on nothing but the text."""

import functools

import numpy as np
import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.models import pretrained, text_encoder

TEXTS = [
    "an octopus on a dark blue background",
    "",
    "   ",
    "x",
    "Ein Straßencafé, naïve façade; ǅ İ ﬁ",
    "e\u0301 o\u0308 decomposed, é ö composed",
    "日本語のテキスト и кириллица مرحبا",
    "👩🏽\u200d🚀 and a flag 🇺🇳\ufe0f",
    "\u200d\ufeff\u00ad\u2028",
    "\x00\x07 tab\tline\nreturn\r",
    "[MASK] [CLS] [SEP] [PAD] [UNK] ##s",
    "w" * 150,
    "semi-colons; isn't 'quoted' \"it\" -- 3.14% of $1,000?!",
    "two apples left of a house " * 20,
]
PARITY = "the peer is missing: pip install -e '.[parity]'"
LENGTH = 24


@functools.cache
def encoder(max_length=LENGTH, batch=8):
    return text_encoder.load(max_length, batch)


@functools.cache
def folder() -> str:
    path = pretrained.package_file(text_encoder.PACKAGE, "model/config.json", "a test")
    return str(path.parent)


def test_equals_transformers():
    transformers = pytest.importorskip("transformers", reason=PARITY)
    torch = pytest.importorskip("torch", reason=PARITY)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder(), local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder(), local_files_only=True).eval()
    theirs = tokenizer(
        TEXTS, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    ids_BL, mask_BL = encoder().tokenize(TEXTS)
    np.testing.assert_array_equal(ids_BL, theirs["input_ids"].numpy())
    np.testing.assert_array_equal(mask_BL, theirs["attention_mask"].numpy().astype(bool))
    assert mask_BL.all(1).any() and not mask_BL.all()  # cut and padded texts both
    with torch.no_grad():
        hidden_BLD = model(**theirs).last_hidden_state.numpy()
    ctx_BLD, states_mask_BL = encoder().states(TEXTS)
    np.testing.assert_array_equal(states_mask_BL, mask_BL)
    np.testing.assert_allclose(ctx_BLD, hidden_BLD * mask_BL[..., None], rtol=0, atol=1e-4)


def test_sentences_equal_sentence_transformers():
    peer = pytest.importorskip("sentence_transformers", reason=PARITY)
    model = peer.SentenceTransformer(folder(), device="cpu", local_files_only=True)
    model.max_seq_length = LENGTH
    theirs_BD = model.encode(TEXTS, show_progress_bar=False)
    np.testing.assert_allclose(encoder().sentence(TEXTS), theirs_BD, rtol=0, atol=1e-5)


def test_states_are_zero_at_padding_and_only_there():
    ctx_BLD, mask_BL = encoder().states(TEXTS)
    assert ctx_BLD.dtype == np.float32 and ctx_BLD.shape == (len(TEXTS), LENGTH, 384)
    assert mask_BL.dtype == bool
    np.testing.assert_array_equal(np.any(ctx_BLD != 0, axis=-1), mask_BL)


def test_neighbours_batch_and_length_do_not_matter():
    short = [t for t in TEXTS if encoder().tokenize([t])[1].sum() < LENGTH]
    ctx_BLD, mask_BL = encoder().states(short)
    for change in (encoder(LENGTH, 3), encoder(LENGTH + 9)):
        other_BLD, other_BL = change.states(short[::-1])
        assert not other_BLD[:, LENGTH:].any() and not other_BL[:, LENGTH:].any()
        np.testing.assert_allclose(other_BLD[::-1, :LENGTH], ctx_BLD, rtol=0, atol=2e-5)
        np.testing.assert_allclose(
            change.sentence(short[::-1])[::-1], encoder().sentence(short), rtol=0, atol=1e-5
        )


def test_one_compilation_for_any_number_of_texts_and_of_encoders():
    mine, another = (text_encoder.load(8, batch=4) for _ in range(2))
    assert another._encode is mine._encode
    before = mine._encode._cache_size()
    for n in (0, 1, 4, 9):
        assert mine.states(TEXTS[:n])[0].shape == (n, 8, 384)
        assert another.sentence(TEXTS[:n]).shape == (n, 384)
    assert mine._encode._cache_size() <= before + 1


def test_meaning():
    """Unit vectors, closer for captions that mean the same."""
    pairs = ["a red apple", "an apple which is red", "a truck in the snow"]
    e_BD = encoder().sentence(pairs)
    np.testing.assert_allclose(np.linalg.norm(e_BD, axis=1), 1, atol=1e-6)
    cosines = e_BD @ e_BD.T
    assert cosines[0, 1] > 0.8 > 0.4 > cosines[0, 2]


def test_hash_names_what_decides_the_states():
    assert encoder().hash == encoder(LENGTH, 3).hash != encoder(LENGTH + 9).hash


@pytest.mark.parametrize("max_length", [2, 513])
def test_refuses_lengths(max_length):
    with pytest.raises(UserError, match=f"3 to 512 tokens.*max_length = {max_length}"):
        text_encoder.load(max_length)


def test_refuses_what_is_no_text():
    for texts in (["fine", None], ["fine", "\ud800"]):
        with pytest.raises(UserError, match="text 1 of 2 is not Unicode"):
            encoder().states(texts)
    with pytest.raises(UserError, match="a list of texts"):
        encoder().states("a cat")
