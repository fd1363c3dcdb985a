"""Latents with one of their captions: drawn by key, evenly, and mirrored where no side is named."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from ldm_scaling.data import cache, cached_pairs
from ldm_scaling.data.corrupt import CorruptRecords
from ldm_scaling.data.loading import loader
from ldm_scaling.errors import UserError

COUNTS = [1, 5, 2, 3, 1, 4]
STARTS = np.cumsum([0, *COUNTS])
IMAGES, CAPTIONS = len(COUNTS), sum(COUNTS)
SIDED = np.arange(CAPTIONS) % 3 == 0


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Record i of each tells its number, and mirrored latents are the negative ones."""
    folder = tmp_path_factory.mktemp("caches")

    def latents(name, sign):
        arrays = [np.full((2, 2, 4), sign * (i + 1), np.float32) for i in range(IMAGES)]
        cache.write(folder / name, [{"mean": a, "logvar": a - 9} for a in arrays], {"hash": name})
        return cache.CacheSource(folder / name)

    texts = [{"context": np.full((3, 8), i, np.float16)} for i in range(CAPTIONS)]
    cache.write(folder / "text", texts, {"hash": "text"})
    return latents("plain", 1), latents("mirrored", -1), cache.CacheSource(folder / "text")


@pytest.fixture
def pairs(caches):
    plain, mirrored, text = caches
    return cached_pairs.CachedPairs(plain, text, STARTS, mirrored, SIDED)


def keys(n, seed=0):
    return np.random.default_rng(seed).integers(0, 2**64, n, np.uint64, endpoint=False)


def drawn(pairs, index, keys):
    """Caption numbers and whether mirrored, as the arrays themselves tell."""
    batch = pairs.batch(index, keys)
    caption = batch["context"][:, 0, 0].astype(int)
    np.testing.assert_array_equal(batch["caption_index"], caption)
    np.testing.assert_array_equal(batch["mean"] - 9, batch["logvar"])
    np.testing.assert_array_equal(np.abs(batch["mean"][:, 0, 0, 0]), np.asarray(index) + 1)
    return caption, batch["mean"][:, 0, 0, 0] < 0


def test_without_keys_the_first_caption_as_it_is(pairs):
    caption, mirrored = drawn(pairs, [5, 0, 1, 5], None)
    assert caption.tolist() == STARTS[[5, 0, 1, 5]].tolist() and not mirrored.any()
    assert len(pairs) == IMAGES
    assert pairs.batch([])["mean"].shape == (0, 2, 2, 4)


def test_captions_are_drawn_evenly_and_are_the_images_own(pairs):
    index = np.repeat(np.arange(IMAGES), 4000)
    caption, _ = drawn(pairs, index, keys(len(index)))
    for i, count in enumerate(COUNTS):
        found = np.bincount(caption[index == i] - STARTS[i], minlength=count)
        assert len(found) == count
        # Five standard deviations of a binomial.
        np.testing.assert_allclose(found, 4000 / count, atol=5 * np.sqrt(4000 / count))


def test_half_is_mirrored_where_no_side_is_named(pairs):
    index = np.repeat(np.arange(IMAGES), 4000)
    caption, mirrored = drawn(pairs, index, keys(len(index), 1))
    assert not mirrored[SIDED[caption]].any()
    for c in np.flatnonzero(~SIDED):  # Of each caption: the two draws are independent.
        share = mirrored[caption == c]
        assert abs(share.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(share))


def test_neighbouring_keys_are_as_good_as_any(pairs):
    """Keys may count upwards."""
    index = np.full(4000, 1)
    caption, mirrored = drawn(pairs, index, np.arange(4000, dtype=np.uint64))
    np.testing.assert_allclose(np.bincount(caption)[1:6], 800, atol=5 * np.sqrt(800))
    assert abs(np.corrcoef(caption[:-1], caption[1:])[0, 1]) < 5 / np.sqrt(4000)
    free = mirrored[~SIDED[caption]]
    assert abs(free.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(free))


def test_an_example_depends_on_its_key_alone(pairs):
    index, k = np.arange(IMAGES), keys(IMAGES, 2)
    whole = pairs.batch(index, k)
    order = np.array([3, 3, 0, 5])
    some = pickle.loads(pickle.dumps(pairs)).batch(order, k[order])
    for name, array in whole.items():
        np.testing.assert_array_equal(some[name], array[order])


def test_without_mirrored_latents_none_is(caches):
    plain, _, text = caches
    pairs = cached_pairs.CachedPairs(plain, text, STARTS)
    _, mirrored = drawn(pairs, np.repeat(np.arange(IMAGES), 50), keys(50 * IMAGES))
    assert not mirrored.any()


def test_the_hash_tells_what_is_drawn_from(caches, pairs):
    plain, mirrored, text = caches
    other = [
        cached_pairs.CachedPairs(plain, text, STARTS),
        cached_pairs.CachedPairs(mirrored, text, STARTS),
        cached_pairs.CachedPairs(plain, text, STARTS, mirrored, ~SIDED),
        cached_pairs.CachedPairs(plain, text, np.cumsum([0, *COUNTS[::-1]])),
    ]
    assert len({pairs.hash, *(o.hash for o in other)}) == 5
    assert pairs.hash == cached_pairs.CachedPairs(plain, text, STARTS, mirrored, SIDED).hash


def test_latents_of_some_of_the_images(caches):
    """Of a bucket: record r is image image_N[r]."""
    plain, _, text = caches
    counts = [2, 1, 1, 2, 1, 1, 3, 2, 1, 2]  # of ten images
    image_N = [9, 0, 3, 6, 1, 7]
    starts_N = np.cumsum([0, *counts])
    pairs = cached_pairs.CachedPairs(plain, text, starts_N, image_N=image_N)
    caption, _ = drawn(pairs, range(IMAGES), None)
    assert caption.tolist() == starts_N[image_N].tolist()


def test_buckets_are_one_source(caches):
    plain, mirrored, text = caches
    both = [cached_pairs.CachedPairs(latents, text, STARTS) for latents in (plain, mirrored)]
    source = cached_pairs.CachedBuckets(both, [(16, 8), (8, 16)])
    assert len(source) == 2 * IMAGES and source.sizes == ((16, 8), (8, 16))
    for bucket, sign in enumerate((1, -1)):
        index = np.flatnonzero(source.bucket_N == bucket)
        mean = pickle.loads(pickle.dumps(source)).batch(index, keys(IMAGES))["mean"]
        np.testing.assert_array_equal(mean[:, 0, 0, 0], sign * (np.arange(IMAGES) + 1))
    with pytest.raises(ValueError, match="one bucket"):
        source.batch([0, IMAGES])
    with pytest.raises(IndexError, match=r"0\.\.11"):
        source.batch([12])
    with pytest.raises(UserError, match="2 caches of latents for the 1 shapes"):
        cached_pairs.CachedBuckets(both, [(8, 8)])


def test_what_does_not_belong_together_is_refused(caches, tmp_path):
    plain, mirrored, text = caches
    cache.write(tmp_path / "one", cache.rows([plain.batch([0])]))
    one = cache.CacheSource(tmp_path / "one")
    short = [*STARTS[:-1], CAPTIONS - 1]
    for match, arguments in {
        "6 latents for 6 of 5 images": (plain, text, STARTS[:-1]),
        "6 latents for 2 of 6 images": (plain, text, STARTS, None, None, [0, 1]),
        "states of 16 captions, the images have 15": (plain, text, short),
        "image 2 has no caption": (plain, text, [0, 1, 6, 6, 11, 12, 16]),
        "holds no mean: it is no cache of latents": (text, text, np.arange(CAPTIONS + 1)),
        "both hold 'logvar'": (plain, mirrored, np.arange(IMAGES + 1)),
        "one does not hold the mirrored images": (plain, text, STARTS, one, SIDED),
        "each of the 16 captions": (plain, text, STARTS, mirrored, SIDED[1:]),
        "16 captions whether": (plain, text, STARTS, mirrored),
    }.items():
        with pytest.raises(UserError, match=match):
            cached_pairs.CachedPairs(*arguments)
    for index in (-1, IMAGES):
        with pytest.raises(IndexError, match=r"0\.\.5"):
            cached_pairs.CachedPairs(plain, text, STARTS).batch([index])


class Damaged:
    """A cache some of whose records are damaged."""

    def __init__(self, source, bad):
        self._source, self._bad = source, set(bad)
        self.path, self.fields, self.hash = source.path, source.fields, source.hash

    def __len__(self):
        return len(self._source)

    def batch(self, indices, keys=None):
        failures = {int(i): f"record {i} is damaged" for i in indices if int(i) in self._bad}
        if failures:
            raise CorruptRecords(failures)
        return self._source.batch(indices)


def test_damaged_records_are_left_out_whatever_was_read_before(caches):
    """Latents of image 2 and the second caption of image 1: its other captions serve, and a run
    that goes on at any step reads what an unbroken one does."""
    plain, mirrored, text = caches
    pairs = cached_pairs.CachedPairs(
        Damaged(plain, {2}), Damaged(text, {int(STARTS[1]) + 1}), STARTS, Damaged(mirrored, {2}),
        SIDED,
    )  # fmt: skip

    def steps(start, stop):
        with loader.train_loader(pairs, 4, 0, max_corrupt=0.9) as batches:
            batches.set_state({**batches.get_state(), "step": start})
            return [next(batches)["caption_index"].tolist() for _ in range(start, stop)]

    whole = steps(0, 60)
    seen = set(sum(whole, []))
    first = int(STARTS[1])
    assert first + 1 not in seen and {first, first + 2, first + 3, first + 4} <= seen
    assert not seen & set(range(int(STARTS[2]), int(STARTS[3])))
    for start in (7, 31, 50):
        assert steps(start, 60) == whole[start:]


def test_a_damaged_byte_names_the_record(tmp_path):
    arrays = [{"mean": np.full((8, 8, 4), i, np.float32)} for i in range(6)]
    cache.write(tmp_path / "a", arrays)
    data = bytearray((tmp_path / "a").read_bytes())
    at = data.index(np.full(64, 3, np.float32).tobytes())
    data[at] ^= 1
    (tmp_path / "a").write_bytes(data)
    source = cache.CacheSource(tmp_path / "a")
    with pytest.raises(CorruptRecords, match="damaged.*remove it") as e:
        source.batch(range(6))
    assert list(e.value.failures) == [3]
    assert source.batch([0, 5])["mean"][:, 0, 0, 0].tolist() == [0, 5]
