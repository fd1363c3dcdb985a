"""Captions in any encoding and type become Unicode, or an error that says why; scores numbers."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_scaling.data import sources
from ldm_scaling.data.sources import texts
from ldm_scaling.data.sources.texts import Unusable
from ldm_scaling.errors import UserError

PLAIN = sources.Options()
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=60, deadline=None)
@given(TEXT, st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))
def test_a_byte_order_mark_names_the_encoding(text, encoding):
    """Python writes a mark for the last three."""
    if encoding == "utf-8" and text.startswith("\ufeff"):
        return
    assert texts.decode(text.encode(encoding), "x.txt", PLAIN) == text


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16-le", "utf-16-be", "cp1251"])
def test_other_encodings_must_be_named(encoding):
    text = "Жук" if encoding == "cp1251" else "Über den Dächern"
    with pytest.raises(Unusable, match="x.txt.*caption_encoding"):
        texts.captions_of(text.encode(encoding), "x.txt", PLAIN)
    named = sources.Options(caption_encoding=encoding)
    assert texts.captions_of(text.encode(encoding), "x.txt", named) == (text,)


@pytest.mark.parametrize("value, captions", [
    (None, ()), (float("nan"), ()), ("", ()), (" \n ", ()), ([], ()), ([None, " a ", ""], ("a",)),
    (b" a cat\r\n", ("a cat",)), (np.array(["a", "b"]), ("a", "b")),
    (("a", ["b", "c"]), ("a", "b", "c")), ({"id": [1, 2], "text": [b"a", b"b"]}, ("a", "b")),
    (({"text": "a"}, {"text": "b"}), ("a", "b")), ([{"raw": "a", "sentid": 1}], ("a",)),
])  # fmt: skip
def test_values_that_hold_captions(value, captions):
    assert texts.captions_of(value, "x", PLAIN) == captions
    named = sources.Options(caption_columns=("sentences",))
    assert texts.row_captions({"sentences": value}, "x", named) == captions


@pytest.mark.parametrize("value, why", [
    (7, "no text but 7"), ([10**5000], "hundreds of digits"), (True, "no text but True"),
    ({"url": "a"}, "an object of url"), ("\ud83d", "half"), ("a\udcffb", "caption_encoding"),
    ("a\0c\0", "zero bytes"), ([["a"], 3.5], "3.5"),
])  # fmt: skip
def test_values_that_hold_none(value, why):
    with pytest.raises(Unusable, match=f"x.*{why}"):
        texts.captions_of(value, "x", PLAIN)


def test_columns_are_the_first_of_the_usual_or_all_that_are_named():
    row = {"url": "u", "text": "a", "caption": None, "alt": ["b", "c"]}
    assert texts.row_captions(row, "x", PLAIN) == ("a",)
    named = sources.Options(caption_columns=("alt", "text"))
    assert texts.row_captions(row, "x", named) == ("b", "c", "a")


@pytest.mark.parametrize("value, score", [
    (5, 5.0), ("4.5", 4.5), (np.float32(0.25), 0.25), (True, 1.0), (None, None), ("", None),
    (float("nan"), None), ("nan", None),
])  # fmt: skip
def test_scores(value, score):
    found = texts.row_scores({"aesthetic_score": value}, "x", PLAIN)
    assert found == ({} if score is None else {"aesthetic": score})


@pytest.mark.parametrize("value", [10**400, math.inf, "high", [1], {}])
def test_scores_that_are_no_numbers(value):
    with pytest.raises(Unusable, match="x: its pwatermark"):
        texts.row_scores({"pwatermark": value}, "x", PLAIN)


def test_scores_in_other_columns():
    options = sources.Options(score_columns={"aesthetic": "laion_a"})
    assert texts.row_scores({"laion_a": 3, "aesthetic": 9, "WATERMARK": 1}, "x", options) == {
        "aesthetic": 3, "watermark": 1,
    }  # fmt: skip


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"7", b"[" * 100_000, b'{"a": ' + b"9" * 5000])
def test_broken_json_is_named(data):
    with pytest.raises(Unusable, match="x.json"):
        texts.parse(data, "x.json", PLAIN)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(TEXT, TEXT, max_size=3), st.sampled_from(["utf-8", "utf-16", "utf-8-sig"]))
def test_json_in_any_marked_encoding(value, encoding):
    data = json.dumps(value, ensure_ascii=False).encode(encoding)
    assert texts.parse(data, "x", PLAIN) == value


@pytest.mark.parametrize("wrong", [
    {"caption_encoding": "utf-9"}, {"caption_encoding": "base64"}, {"part_size": 0},
    {"caption_columns": "text"}, {"score_columns": {"beauty": "b"}},
])  # fmt: skip
def test_options_are_checked(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        sources.Options(**wrong)
