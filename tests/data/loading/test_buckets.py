"""Buckets: a table of sizes of one area, and pictures in the nearest."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from ldm_scaling import errors
from ldm_scaling.data.loading import buckets


@hypothesis.given(
    of=st.integers(1, 24), step=st.sampled_from([8, 16, 64]), max_aspect=st.floats(1, 5)
)
def test_sizes_are_multiples_within_the_area_and_aspect(of, step, max_aspect):
    side = of * step
    sizes = buckets.table(side, step, max_aspect).sizes
    assert (side, side) in sizes
    for height, width in sizes:
        assert height % step == width % step == 0
        assert height * width <= side * side
        assert (width + step) * height > side * side or (height + step) * width > side * side
        assert max(height, width) <= max_aspect * min(height, width)
        assert (width, height) in sizes
    aspects = [width / height for height, width in sizes]
    assert aspects == sorted(set(aspects))


def test_sizes_that_sdxl_is_asked_for_are_there():
    """Of the sizes in SDXL's appendix I, those that fill the area of 1024 x 1024 best."""
    tall = {(1152, 896), (1216, 832), (1344, 768), (1472, 704), (1600, 640)}
    sizes = set(buckets.table(1024, 64, 2.5).sizes)
    assert {(1024, 1024), *tall, *(size[::-1] for size in tall)} <= sizes


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    sizes=st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=80),
    at_least=st.integers(1, 20),
)  # fmt: skip
def test_every_picture_goes_to_the_nearest_bucket_that_is_open(sizes, at_least):
    table = buckets.table(512, 64, 3)
    sizes_N2 = np.array(sizes)
    if len(sizes) < at_least:
        with pytest.raises(errors.UserError, match=f"batch of {at_least}"):
            table.assign(sizes_N2, at_least)
        return
    found = table.assign(sizes_N2, at_least)
    filled = np.bincount(found, minlength=len(table.sizes))
    assert all(n == 0 or n >= at_least for n in filled)
    logs_K = np.array([np.log(w / h) for h, w in table.sizes])
    candidates = np.arange(len(logs_K)) if at_least == 1 else np.flatnonzero(filled)
    for (width, height), bucket in zip(sizes, found):
        distances = np.abs(logs_K[candidates] - np.log(width / height))
        assert abs(logs_K[bucket] - np.log(width / height)) <= distances.min() + 1e-12


def test_a_million_pictures_are_assigned_at_once():
    rng = np.random.default_rng(0)
    sizes_N2 = rng.integers(200, 3000, size=(1_000_000, 2))
    found = buckets.table(512).assign(sizes_N2, 256)
    assert found.dtype == np.int16 and len(found) == 1_000_000


@pytest.mark.parametrize(
    ("values", "message"),
    [((500, 64), "500 pixels is no multiple of the step 64"), ((512, 64, 0.5), "aspect is 0.5"),
     ((512, 0), "step 0"), ((32, 64), "32 pixels"), ((512, 64, float("nan")), "aspect is nan")],
)  # fmt: skip
def test_impossible_tables_are_refused(values, message):
    with pytest.raises(errors.UserError, match=message):
        buckets.table(*values)


def test_pictures_without_pixels_are_refused():
    with pytest.raises(ValueError, match=r"picture 1 is of \[0, 5\]"):
        buckets.table(512).assign(np.array([(5, 5), (0, 5)]))
