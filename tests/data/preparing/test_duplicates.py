"""Duplicates: the buckets find exactly what comparing all with all finds."""

from __future__ import annotations

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image

from ldm_scaling import errors
from ldm_scaling.data.preparing import duplicates, facts
from tests.data.preparing.folder_of_pairs import scene


def clustered(seed: int, count: int) -> np.ndarray:
    """Hashes in clusters, some equal."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, max(1, count // 6), dtype=np.uint64)[
        rng.integers(0, max(1, count // 6), count)
    ]
    for _ in range(6):
        flips = np.uint64(1) << rng.integers(0, 64, count, dtype=np.uint64)
        hashes = np.where(rng.random(count) < 0.5, hashes ^ flips, hashes)
    return hashes


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**30), count=st.integers(1, 80), bits=st.integers(0, 12))
def test_near_ones_are_those_that_comparing_all_finds(seed, count, bits):
    hashes, rank = clustered(seed, count), np.random.default_rng(seed + 1).permutation(count)
    wanted = [
        min(
            int(rank[j]) for j in range(count)
            if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= bits
        )
        for i in range(count)
    ]  # fmt: skip
    np.testing.assert_array_equal(
        duplicates.near(hashes, rank, bits), np.minimum(wanted, rank)
    )  # fmt: skip


@pytest.mark.parametrize("bits", [1, 2, 4, 7, 12])
@pytest.mark.parametrize("count", [10, 10**5, 10**9])
def test_masks_leave_no_near_pair_apart(bits, count):
    masks = duplicates.masks(bits, count)
    rng = np.random.default_rng(0)
    for _ in range(200):
        flipped = sum(1 << int(i) for i in rng.choice(64, bits, replace=False))
        assert any(flipped & mask == 0 for mask in masks)
    assert all(0 <= mask < 2**64 for mask in masks)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**30), count=st.integers(1, 40))
def test_one_bucket_of_all_gives_the_same_as_many(seed, count):
    hashes = np.unique(clustered(seed, count))
    np.random.default_rng(seed).shuffle(hashes)
    one = duplicates.nearest(hashes, 4, [0])
    np.testing.assert_array_equal(one, duplicates.nearest(hashes, 4, duplicates.masks(4, 10**6)))


def test_what_becomes_of_one_does_not_depend_on_whether_a_better_one_stays():
    """A is like B and B like C: B goes for A, and C goes for B though B is gone."""
    a, b, c = 0, 0b1111, 0b11111111
    found = duplicates.near(np.array([c, a, b], np.uint64), np.array([2, 0, 1]), 4)
    assert found.tolist() == [1, 0, 0]


def test_the_first_of_a_group_is_the_best():
    found = duplicates.first(np.array([0, 1, 0, 1, 2]), np.array([4, 1, 2, 3, 0]))
    assert found.tolist() == [2, 1, 2, 1, 0]
    assert duplicates.first(np.zeros(0, int), np.zeros(0, int)).tolist() == []


def test_the_perceptual_hash_is_imagehashs():
    imagehash = pytest.importorskip("imagehash", reason="hashes: pip install -e '.[data]'")
    for seed in range(5):
        image_HWC = scene(seed)
        wanted = str(imagehash.phash(Image.fromarray(image_HWC)))
        assert f"{facts.perceptual_hash(image_HWC):016x}" == wanted


def test_an_image_and_its_smaller_copy_have_near_hashes_and_others_have_not():
    pytest.importorskip("imagehash", reason="hashes: pip install -e '.[data]'")
    hashes = [facts.perceptual_hash(scene(seed, 64, 64)) for seed in range(12)]
    small = [
        facts.perceptual_hash(np.asarray(Image.fromarray(scene(seed, 64, 64)).resize((40, 40))))
        for seed in range(12)
    ]
    assert all((a ^ b).bit_count() <= 4 for a, b in zip(hashes, small))
    assert all((a ^ b).bit_count() > 4 for a, b in itertools.combinations(hashes, 2))


def test_pixel_hashes_know_the_shape():
    flat = np.zeros((2, 6, 3), np.uint8)
    assert facts.pixel_hash(flat) != facts.pixel_hash(flat.reshape(6, 2, 3))
    assert facts.pixel_hash(flat) == facts.pixel_hash(np.zeros((4, 12, 3), np.uint8)[::2, ::2])


@pytest.mark.parametrize("bits", [-1, 13])
def test_distances_out_of_range_are_refused(bits):
    with pytest.raises(errors.UserError, match=f"not {bits}"):
        duplicates.Duplicates(perceptual=bits)
