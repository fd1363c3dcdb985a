"""Holes: LaMa's ranges, and that only what the mask covers is hidden."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage, stats

from ldm_scaling.data.conditions import masks
from ldm_scaling.errors import UserError
from tests.data.conditions import made

ALARM = 1e-4  # p-value: of ten thousand seeds of right code one would fail


@pytest.mark.parametrize("size", [(256, 256), (512, 512), (64, 96)])
def test_boxes_keep_their_ranges_and_their_distance_from_the_sides(size):
    rng = np.random.default_rng(0)
    unit = min(size) / 256
    counts = []
    for _ in range(500):
        boxes = masks.draw_boxes(rng, size).boxes
        counts.append(len(boxes))
        for top, left, height, width in boxes:
            for side, start, length in zip(size, (top, left), (height, width)):
                assert 30 * unit - 1 <= length <= 150 * unit + 1
                assert 10 * unit - 1 <= start and start + length <= side - 10 * unit + 1
    assert set(counts) == {1, 2, 3, 4}
    assert stats.chisquare(np.bincount(counts)[1:]).pvalue > ALARM


@pytest.mark.parametrize("size", [(256, 256), (512, 512), (64, 96)])
def test_strokes_are_joined_lines_of_the_published_lengths_and_breadths(size):
    rng = np.random.default_rng(0)
    unit = min(size) / 256
    for _ in range(300):
        strokes = masks.draw_strokes(rng, size)
        assert 1 <= len(strokes.segments) <= 30
        for x0, y0, x1, y1, width in strokes.segments:
            assert 5 * unit - 1 <= width <= 104 * unit + 1
            assert np.hypot(x1 - x0, y1 - y0) <= 209 * unit + 1.5  # both in whole pixels
            assert min(x0, y0, x1, y1) >= 0 and max(x0, x1) <= size[1] and max(y0, y1) <= size[0]
        mask = strokes.mask(size)
        assert mask.shape == (*size, 1) and mask.dtype == np.uint8
        assert set(np.unique(mask)) <= {0, 1} and mask.any()
        lines = 1 + sum(a[2:4] != b[:2] for a, b in zip(strokes.segments, strokes.segments[1:]))
        assert ndimage.label(mask[..., 0], np.ones((3, 3)))[1] <= lines <= 6


def test_holes_cover_the_same_share_at_any_size():
    """In the mean of 400; the two differ by rounding to pixels alone."""
    shares = []
    for size in ((256, 256), (512, 512)):
        rng = np.random.default_rng(0)
        covered = [masks.draw_boxes(rng, size).mask(size).mean() for _ in range(400)]
        shares.append(np.mean(covered))
    assert abs(shares[0] - shares[1]) < 0.05


def test_strokes_and_boxes_are_as_frequent():
    rng = np.random.default_rng(0)
    kinds = [type(masks.draw(rng, (64, 64))) for _ in range(2000)]
    assert stats.binomtest(kinds.count(masks.Boxes), len(kinds), 0.5).pvalue > ALARM
    assert set(kinds) == {masks.Boxes, masks.Strokes}


def test_a_border_leaves_one_rectangle_that_is_seen():
    size, rng = (200, 300), np.random.default_rng(0)
    borders = [masks.draw_border(rng, size) for _ in range(3000)]
    sides = np.array([(b.top, b.bottom, b.left, b.right) for b in borders])
    assert (sides.max(axis=1) > 0).all()
    # A side has one as often as not; where none would, which happens once in 16, one of four does.
    expected = 0.5 + 1 / 16 / 4
    for column, length in zip(sides.T, (200, 200, 300, 300)):
        there = column > 0
        assert stats.binomtest(int(there.sum()), len(there), expected).pvalue > ALARM
        assert column[there].min() >= 0.04 * length - 0.5
        assert column[there].max() <= 0.25 * length + 0.5
    for border in borders[:50]:
        seen = border.mask(size)[..., 0] == 0
        rows, columns = seen.any(axis=1), seen.any(axis=0)
        np.testing.assert_array_equal(seen, rows[:, None] & columns)
        assert rows.sum() == 200 - border.top - border.bottom
        assert columns.sum() == 300 - border.left - border.right


def test_only_what_the_mask_covers_is_hidden():
    picture = made.photograph(40, 60)
    mask = np.zeros((40, 60, 1), np.uint8)
    mask[5:9, 7:20] = 1
    hidden = masks.hidden(picture, mask)
    assert hidden.dtype == np.uint8 and (hidden[5:9, 7:20] == 128).all()
    np.testing.assert_array_equal(hidden[mask[..., 0] == 0], picture[mask[..., 0] == 0])


def test_masks_of_another_size_or_of_other_values_are_refused():
    picture = made.photograph(40, 60)
    for shape in ((40, 40, 1), (60, 40, 1), (40, 60), (40, 60, 3)):
        with pytest.raises(UserError, match=r"a mask of shape .* it should be \(40, 60, 1\)"):
            masks.hidden(picture, np.zeros(shape, np.uint8))
    with pytest.raises(UserError, match="values 0 to 255: use 1"):
        mask = np.zeros((40, 60, 1), np.uint8)
        mask[0, 0] = 255
        masks.hidden(picture, mask)
