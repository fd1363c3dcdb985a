"""The table: shapes, keys, and what each condition keeps of its image."""

from __future__ import annotations

import dataclasses
import json
import math
import sys

import numpy as np
import pytest
from scipy import stats

from ldm_scaling.data.conditions import masks, pixels, table
from ldm_scaling.data.loading import draws
from ldm_scaling.errors import MissingPackageError, UserError
from tests.data.conditions import made

NAMES = list(table.CONDITIONS)


def keys(count: int, seed: int = 0) -> list[int]:
    found = draws.keys(seed, 0, np.zeros(count, np.int64), np.arange(count))
    return [int(key) for key in found]


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return made.photograph(64, 96)


@pytest.mark.parametrize("name", NAMES)
def test_every_row_gives_what_it_says_and_leaves_the_image_alone(name, picture):
    condition = table.named(name)
    before = picture.copy()
    for key in keys(5):
        given = condition(picture, key)
        assert given.image.shape == (64 // condition.scale, 96 // condition.scale, 3)
        assert given.image.dtype == np.uint8
        assert (given.mask is not None) == condition.masked
        assert condition.channels == 3 + (given.mask is not None)
        if given.mask is not None:
            assert given.mask.shape == (64, 96, 1) and given.mask.dtype == np.uint8
    np.testing.assert_array_equal(picture, before)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "colourisation"])
def test_a_condition_is_a_function_of_image_and_key(name, picture):
    condition = table.named(name)
    first = [condition(picture, key) for key in keys(6)]
    again = [condition(picture, key) for key in reversed(keys(6))][::-1]
    for a, b in zip(first, again):
        np.testing.assert_array_equal(a.image, b.image)
    assert len({given.image.tobytes() for given in first}) >= 5
    drawn = {condition.parameters(key, (64, 96)) for key in keys(200)}
    assert len(drawn) > 20  # frozen: they can be put in sets, and logged
    json.dumps([dataclasses.asdict(parameters) for parameters in drawn])


def test_keys_and_names_give_independent_streams():
    """Each correlation is below five standard errors: one false alarm in a million."""
    streams = [draws.generator(key, name).random(4000) for key in (0, 1, 2**64 - 1)
               for name in ("a", "b")]  # fmt: skip
    off = np.corrcoef(streams) - np.eye(len(streams))
    assert np.abs(off).max() < 5 / 4000**0.5
    first = [draws.generator(key, "a").random() for key in keys(4000)]
    assert stats.kstest(first, "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 5 / 4000**0.5


@pytest.mark.parametrize("name", ["inpainting", "outpainting"])
def test_what_is_not_masked_is_the_image(name, picture):
    for key in keys(20):
        given = table.named(name)(picture, key)
        seen = given.mask[..., 0] == 0
        np.testing.assert_array_equal(given.image[seen], picture[seen])
        assert (given.image[~seen] == masks.GREY).all() and not seen.all()


def test_grey_is_the_luma_that_jpeg_has(picture):
    from PIL import Image

    given = table.named("colourisation")(picture, 0).image
    np.testing.assert_array_equal(given[..., 0], given[..., 1])
    np.testing.assert_array_equal(given[..., 0], given[..., 2])
    pillow = np.asarray(Image.fromarray(picture).convert("L")).astype(int)
    assert np.abs(given[..., 0] - pillow).max() <= 1


def test_blurs_are_of_both_kinds_over_their_ranges_and_keep_an_even_image():
    rng = np.random.default_rng(0)
    blurs = [table.draw_blur(rng, (512, 768)) for _ in range(3000)]
    motion = np.array([blur.kind == "motion" for blur in blurs])
    assert stats.binomtest(int(motion.sum()), len(blurs), 0.5).pvalue > 1e-4
    extent = np.array([blur.extent for blur in blurs]) / 2  # 512 is twice the side of the ranges
    for values, low, high in (
        (extent[motion], 5, 25), (extent[~motion], 1, 4),
        (np.array([blur.angle for blur in blurs])[motion], 0, math.pi),
    ):  # fmt: skip
        assert low <= values.min() and values.max() <= high
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-4
    even = np.full((64, 64, 3), 77, np.uint8)
    for key in keys(10):
        np.testing.assert_array_equal(table.named("deblurring")(even, key).image, even)


def test_jpegs_qualities_are_palettes():
    rng = np.random.default_rng(0)
    found = [table.draw_jpeg(rng, (64, 64)).quality for _ in range(5000)]
    values, counts = np.unique(found, return_counts=True)
    assert values.tolist() == list(range(5, 31))
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_images_that_are_too_small_or_no_multiple_are_refused(name):
    condition = table.named(name)
    with pytest.raises(UserError, match="of images of 31x64 pixels: .* 32 at least"):
        condition(np.zeros((31, 64, 3), np.uint8), 0)
    if condition.scale > 1:
        with pytest.raises(UserError, match="multiples of 4"):
            condition(np.zeros((66, 64, 3), np.uint8), 0)
    with pytest.raises(ValueError, match="not uint8"):
        condition(np.zeros((64, 64, 3), np.float32), 0)
    assert condition(np.zeros((32, 32, 3), np.uint8), 0).image.size


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'inpainting'"):
        table.named("inpaint")
    with pytest.raises(UserError, match="use one of super_resolution, "):
        table.named("xyz")


def test_without_opencv_the_extra_is_named(monkeypatch, picture):
    monkeypatch.setitem(sys.modules, "cv2", None)
    pixels.opencv.cache_clear()
    try:
        with pytest.raises(MissingPackageError, match=r"\.\[downstream\]"):
            table.named("deblurring")(picture, 0)
    finally:
        pixels.opencv.cache_clear()
