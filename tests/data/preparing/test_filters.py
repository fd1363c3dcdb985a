"""Filters: each bound holds for what is kept and fails for what is dropped, in a fixed order."""

from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import pytest

from ldm_scaling import errors
from ldm_scaling.data.preparing import facts as facts_lib
from ldm_scaling.data.preparing.filters import KEPT, REASONS, Filters

pytest.importorskip("pyarrow", reason="parquet: pip install -e '.[data]'")


def rows(*given: dict) -> facts_lib.Facts:
    """Facts of sound pairs of 100 x 50 pixels and one caption, but for what is given."""
    base = {
        "pair": 0, "tile": "", "group": "g", "error": "", "bytes": 9, "width": 100, "height": 50,
        "source_width": 100, "source_height": 50, "plain": True, "captions": ["x" * 10],
        "aesthetic": math.nan, "watermark": math.nan, "pixels": "", "perceptual": 0,
    }  # fmt: skip
    full = [{**base, "key": str(i), **row} for i, row in enumerate(given)]
    return facts_lib.Facts(
        facts_lib.as_table({name: [row[name] for row in full] for name in full[0]})
    )


def reasons(filters: Filters, *given: dict) -> list[str]:
    names = [*REASONS, "kept"]  # KEPT is -1
    assert KEPT == -1
    return [names[number] for number in filters.examine(rows(*given))]


@pytest.mark.parametrize(
    "filters, row, wanted",
    [
        (Filters(), {}, "kept"),
        (Filters(), {"error": "cut short"}, "unreadable"),
        (Filters(min_side=50), {}, "kept"),
        (Filters(min_side=51), {}, "small"),
        (Filters(max_aspect=2), {}, "kept"),
        (Filters(max_aspect=1.99), {}, "long"),
        (Filters(max_aspect=1.99), {"source_width": 50, "source_height": 100}, "long"),
        (Filters(max_pixels=5000), {}, "kept"),
        (Filters(max_pixels=4999), {}, "large"),
        (Filters(max_pixels=2**31), {"source_width": 2**17, "source_height": 2**15}, "large"),
        (Filters(), {"width": 0, "height": 0}, "tile"),
        (Filters(), {"captions": []}, "no caption"),
        (Filters(captions=False), {"captions": []}, "kept"),
        (Filters(min_caption=11), {}, "caption length"),
        (Filters(min_caption=11, captions=False), {}, "kept"),
        (Filters(max_caption=9), {"captions": ["x" * 10, "y" * 9]}, "kept"),
        (Filters(max_caption=8), {"captions": ["x" * 10, "y" * 9]}, "caption length"),
        (Filters(min_aesthetic=5), {}, "no aesthetic score"),
        (Filters(min_aesthetic=5), {"aesthetic": 5.0}, "kept"),
        (Filters(min_aesthetic=5), {"aesthetic": 4.9}, "aesthetic"),
        (Filters(max_watermark=0.5), {}, "no watermark score"),
        (Filters(max_watermark=0.5), {"watermark": 0.5}, "kept"),
        (Filters(max_watermark=0.5), {"watermark": 0.6}, "watermark"),
    ],
)
def test_each_bound(filters, row, wanted):
    assert reasons(filters, {}, row, {})[1] == wanted


def test_the_first_reason_of_the_table_is_given():
    strict = Filters(min_side=60, max_aspect=1.5, max_pixels=100, min_caption=20, min_aesthetic=5)
    assert reasons(strict, {"error": "x"}, {}, {"source_height": 60}) == [
        "unreadable", "small", "long"
    ]  # fmt: skip


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(texts=st.lists(st.text(max_size=12), max_size=4), low=st.integers(1, 6),
                  more=st.one_of(st.none(), st.integers(0, 6)))  # fmt: skip
def test_a_pair_has_a_caption_left_if_and_only_if_it_is_kept(texts, low, more):
    filters = Filters(min_caption=low, max_caption=None if more is None else low + more)
    left = [text for text in texts if filters.keeps(text)]
    (reason,) = reasons(filters, {"captions": texts})
    assert (reason == "kept") == bool(left)


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"min_side": 0}, "min_side is 0"), ({"max_aspect": 0.5}, "max_aspect is 0.5"),
        ({"max_pixels": -1}, "max_pixels is -1"), ({"min_caption": 0}, "min_caption is 0"),
        ({"min_caption": 9, "max_caption": 8}, "max_caption 8 is under min_caption 9"),
        ({"min_aesthetic": math.nan}, "min_aesthetic is nan"),
        ({"max_aspect": math.nan}, "max_aspect is nan"),
    ],
)  # fmt: skip
def test_senseless_bounds_are_refused(wrong, match):
    with pytest.raises(errors.UserError, match=match):
        Filters(**wrong)
