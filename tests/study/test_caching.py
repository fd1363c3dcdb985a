"""Caches of latents and text states: the encoders' own numbers, once, whatever interrupts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.data import cache, cached_pairs
from ldm_scaling.data.corrupt import CorruptRecords
from ldm_scaling.errors import UserError
from ldm_scaling.models import autoencoder
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.study import caching, encoders

COUNT, SIDE = 37, 16
SPEC = autoencoder.AutoencoderSpec(8, (1, 2), 1, 4, 4, mid_attention=False)


class Images:
    """Random pictures, one shape for each index, that count how often each is read."""

    def __init__(self, count=COUNT, shapes=((SIDE, SIDE),), broken=()):
        rng = np.random.default_rng(0)
        self.images = [
            rng.integers(0, 256, (*shapes[i % len(shapes)], 3)).astype(np.uint8)
            for i in range(count)
        ]
        self.broken, self.read = set(broken), []

    def __len__(self):
        return len(self.images)

    def batch(self, indices, keys=None):
        self.read += list(indices)
        if failures := {i: f"image {i} is cut" for i in indices if i in self.broken}:
            raise CorruptRecords(failures)
        return {"image": np.stack([self.images[i] for i in indices])}


@functools.cache
def params():
    shapes = jax.eval_shape(lambda: autoencoder.init(SPEC, jax.random.key(0)))
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: (rng.standard_normal(leaf.shape) / max(1, np.prod(leaf.shape[:-1])) ** 0.5)
        .astype(np.float32) + (0.5 if leaf.ndim == 1 else 0), shapes,
    )  # fmt: skip


@functools.cache
def encoder():
    return encoders.latent_encoder(SPEC, params(), compute_dtype="float32")


@functools.cache
def one_by_one():
    """The posterior of each picture by itself."""
    encode = jax.jit(lambda x: autoencoder.encode(SPEC, params(), x))
    found = [encode(x[None] / np.float32(127.5) - 1) for x in Images().images]
    return {name: np.concatenate([getattr(p, name) for p in found]) for name in ("mean", "logvar")}


@functools.cache
def mesh():
    return mesh_lib.make()


def latents(folder, images=None, **kw):
    kw = {"batch_size": 10, "what": ""} | kw
    images = Images() if images is None else images
    return caching.cache_latents(folder, images, encoder(), mesh(), "data", **kw)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(caching, "shard_size", lambda count, size: 12)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return latents(tmp_path_factory.mktemp("caches") / "latents")


# --- latents -------------------------------------------------------------------------------------


def test_latents_are_those_of_each_picture_alone(made):
    """Over eight devices, in batches that are filled up, read by threads."""
    assert len(made) == COUNT
    batch = made.batch(range(COUNT))
    for name, wanted in one_by_one().items():
        assert batch[name].dtype == np.float32
        np.testing.assert_allclose(batch[name], wanted, rtol=1e-4, atol=1e-4)
    assert made.meta["encoder"] == encoder().hash and made.meta["data"] == "data"


def test_statistics_are_those_of_sampled_latents(made):
    found = caching.latent_statistics(made)
    batch = made.batch(range(COUNT))
    keys = jax.random.split(jax.random.key(0), 200)
    posterior = autoencoder.Posterior(jnp.asarray(batch["mean"]), jnp.asarray(batch["logvar"]))
    z = np.asarray(jax.vmap(posterior.sample)(keys), np.float64)
    assert found.count == COUNT
    np.testing.assert_allclose([found.std, 1 / found.scale], z.std(), rtol=0.01)
    np.testing.assert_allclose(found.mean, z.mean(), atol=0.01 * found.std)
    assert (found.least, found.largest) == (batch["mean"].min(), batch["mean"].max())


def test_a_broken_run_goes_on_where_it_was(tmp_path, small_shards):
    whole = latents(tmp_path / "whole")
    with pytest.raises(UserError, match="image 30 is cut; remove the data set"):
        latents(tmp_path / "x", Images(broken=[30]))
    images = Images()
    found = latents(tmp_path / "x", images)
    assert sorted(set(images.read)) == [0, *range(24, COUNT)]  # the first tells the shape
    assert found.statistics == whole.statistics
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "x" / file.name).read_bytes() == file.read_bytes()
    images.read.clear()
    latents(tmp_path / "x", images)
    assert images.read == [0]


def test_mirrored_latents_are_of_mirrored_pictures(tmp_path, made):
    flipped = Images()
    flipped.images = [x[:, ::-1] for x in flipped.images]
    a = latents(tmp_path / "a", mirrored=True)
    b = latents(tmp_path / "b", flipped)
    np.testing.assert_array_equal(a.batch(range(COUNT))["mean"], b.batch(range(COUNT))["mean"])
    assert a.hash != made.hash and a.meta["mirrored"]


def test_halves_are_as_close_as_is_said(tmp_path, made):
    halves = latents(tmp_path / "x", dtype="float16").batch(range(COUNT))
    full = made.batch(range(COUNT))
    assert halves["mean"].dtype == np.float16
    error = halves["mean"].astype(np.float64) - full["mean"]
    assert (np.abs(error) <= np.maximum(2.0**-11 * np.abs(full["mean"]), 2.0**-24)).all()
    noise = 10 * np.log10(np.mean(error**2) / np.mean(full["mean"].astype(np.float64) ** 2))
    assert -76 < noise < -71
    # Whatever log variance the encoder's clip lets through.
    logvar = np.linspace(-30, 20, 10_001)
    ratio = np.exp(0.5 * (logvar.astype(np.float16).astype(np.float64) - logvar))
    assert np.abs(ratio - 1).max() < 0.004


def test_the_hash_is_of_all_that_decides(tmp_path, made):
    hashes = {made.hash, latents(tmp_path / "a", indices=range(5, 9)).hash}
    other = encoders.latent_encoder(SPEC, params(), compute_dtype="bfloat16")
    for name, arguments in {"b": (other, "data"), "c": (encoder(), "others")}.items():
        hashes.add(caching.cache_latents(
            tmp_path / name, Images(9), arguments[0], mesh(), arguments[1], what=""
        ).hash)  # fmt: skip
    assert len(hashes) == 4
    with pytest.raises(UserError, match="made from something else"):
        caching.cache_latents(made.path, Images(), encoder(), mesh(), "others", what="")


def test_buckets_of_shapes_and_their_captions(tmp_path):
    """From two shapes of pictures to pairs of one source, each with its own caption."""
    images = Images(12, shapes=((16, 8), (8, 16), (8, 16)))
    buckets = [(range(0, 12, 3), (16, 8)), ([], (16, 16)),
               (np.setdiff1d(np.arange(12), np.arange(0, 12, 3)), (8, 16))]  # fmt: skip
    found = caching.cache_latent_buckets(
        tmp_path, images, encoder(), mesh(), "data", buckets, batch_size=8, what="x"
    )
    assert {shape: len(source) for shape, source in found.items()} == {(16, 8): 4, (8, 16): 8}
    assert found[16, 8].fields[0].shape == (8, 4, 4)
    both = caching.latent_statistics(*found.values())
    assert both.count == 12
    one = [caching.latent_statistics(source) for source in found.values()]
    np.testing.assert_allclose(both.mean, (4 * one[0].mean + 8 * one[1].mean) / 12, rtol=1e-9)
    cache.write(tmp_path / "text", [{"context": np.float32([[i]])} for i in range(12)])
    text = cache.CacheSource(tmp_path / "text")
    pairs = [cached_pairs.CachedPairs(found[shape], text, np.arange(13), image_N=index)
             for index, shape in buckets if len(index)]  # fmt: skip
    source = cached_pairs.CachedBuckets(pairs, list(found))
    captions = [source.batch([i])["caption_index"][0] for i in range(12)]
    assert captions == [0, 3, 6, 9, 1, 2, 4, 5, 7, 8, 10, 11]
    with pytest.raises(UserError, match="image 1 is 8x16, not 16x8 as its bucket"):
        caching.cache_latent_buckets(
            tmp_path / "x", images, encoder(), mesh(), "data", [([1], (16, 8))]
        )


def test_what_cannot_be_encoded_is_named(tmp_path):
    with pytest.raises(UserError, match="no images to encode"):
        latents(tmp_path / "x", Images(0))
    with pytest.raises(UserError, match="16x15 are not whole multiples"):
        latents(tmp_path / "x", Images(shapes=((16, 15),)))
    with pytest.raises(UserError, match="float16 or float32, not in 'bfloat16'"):
        latents(tmp_path / "x", dtype="bfloat16")
    with pytest.raises(UserError, match=r"image 8 and those after it are \(8, 8, 3\)"):
        latents(tmp_path / "x", Images(9, shapes=((16, 16),) * 8 + ((8, 8),)))
    assert not list((tmp_path / "x").iterdir())


def test_latents_that_are_not_finite_name_the_picture(tmp_path):
    large = jax.tree.map(np.copy, params())
    large["encoder"]["quant_conv"]["kernel"] *= 1e6
    wide = encoders.latent_encoder(SPEC, large, compute_dtype="float32")
    with pytest.raises(UserError, match="image 3 has latents that are not finite in float16"):
        caching.cache_latents(
            tmp_path / "x", Images(), wide, mesh(), "data", indices=[3, 4], dtype="float16", what=""
        )
    constant = jax.tree.map(np.zeros_like, params())
    constant["encoder"]["quant_conv"]["bias"][4:] = -30.0
    flat = encoders.latent_encoder(SPEC, constant, compute_dtype="float32")
    source = caching.cache_latents(tmp_path / "y", Images(3), flat, mesh(), "data", what="")
    found = caching.latent_statistics(source)
    assert found.mean == 0 and found.std == pytest.approx(np.exp(-15), rel=1e-6)
    cache.write(tmp_path / "z", [{"mean": np.zeros(3)}])
    with pytest.raises(UserError, match="keeps no statistics"):
        caching.latent_statistics(cache.CacheSource(tmp_path / "z"))


def test_shards_are_neither_many_nor_large():
    record = 64 * 64 * 8 * 2
    assert caching.shard_size(600_000_000, record) * record == 2**30
    assert caching.shard_size(100_000, 2048) == 3125
    assert caching.shard_size(20, 2048) == 512
    assert caching.shard_size(20, 2**31) == 1


# --- text states ---------------------------------------------------------------------------------

CAPTIONS = [f"a {colour} {thing}" for colour in ("red", "blue") for thing in ("cat", "tree", "")]


@pytest.fixture(scope="module")
def minilm():
    return encoders.text_encoder_from("", 8)


def test_text_states_are_the_encoders(tmp_path, minilm):
    source = caching.cache_text(tmp_path / "x", CAPTIONS, minilm, mesh(), batch_size=4, what="")
    batch = source.batch(range(len(CAPTIONS)))
    assert list(batch) == ["context"] and batch["context"].dtype == np.float16
    np.testing.assert_allclose(batch["context"], minilm.states(CAPTIONS), rtol=1e-3, atol=1e-3)
    embedder = minilm._encoder
    both = caching.cache_text(tmp_path / "y", CAPTIONS, minilm, embedder=embedder, what="")
    batch = both.batch(range(len(CAPTIONS)))
    np.testing.assert_allclose(batch["embedding"], embedder.sentence(CAPTIONS), atol=1e-6)
    hashes = {source.hash, both.hash}
    for name, captions, kw in (("a", CAPTIONS[::-1], {}), ("b", CAPTIONS, {"dtype": "float32"})):
        hashes.add(caching.cache_text(tmp_path / name, captions, minilm, what="", **kw).hash)
    assert len(hashes) == 4
    with pytest.raises(UserError, match="no captions"):
        caching.cache_text(tmp_path / "z", [], minilm)
    with pytest.raises(UserError, match="text 1 of 2 is not Unicode"):
        caching.cache_text(tmp_path / "z", ["a", "\ud800"], minilm, what="")
    with pytest.raises(UserError, match="float16 or float32, not in 'int8'"):
        caching.cache_text(tmp_path / "z", ["a"], minilm, dtype="int8")


def test_captions_that_are_cut_are_counted_once(tmp_path, minilm, caplog):
    exact = "one two three four five six"  # and start and end: 8 tokens
    captions = ["a cat", exact, f"{exact} seven", f"{exact} " * 9] * 2
    for _ in range(2):  # the second time it is only opened
        caching.cache_text(tmp_path / "x", captions, minilm, batch_size=3, what="")
    (said,) = (r.getMessage() for r in caplog.records if "longer" in r.getMessage())
    assert "4 of 8 captions are longer than data.text_length=8 tokens" in said
    caching.cache_text(tmp_path / "y", captions[:2] * 30 + captions[2:3], minilm, what="")
    assert len([r for r in caplog.records if "longer" in r.getMessage()]) == 1  # and one noted


@pytest.mark.parametrize("most, says", [
    (512, "set --config.data.text_length to more"), (8, "the text encoder takes no more"),
])  # fmt: skip
def test_more_tokens_are_advised_where_there_are_more(
    tmp_path, minilm, caplog, monkeypatch, most, says
):
    assert minilm.longest == 512
    monkeypatch.setattr(encoders.TextStates, "longest", most)
    caching.cache_text(tmp_path / "x", ["a cat " * 9], minilm, what="")
    assert says in caplog.text and ("set --config" in caplog.text) == (most > 8)


def test_states_and_embeddings_may_be_of_two_encoders(tmp_path, minilm):
    longer = encoders.text_encoder_from("", 10)._encoder
    source = caching.cache_text(
        tmp_path / "x", CAPTIONS, minilm, embedder=longer, dtype="float32", what=""
    )
    batch = source.batch(range(len(CAPTIONS)))
    np.testing.assert_array_equal(batch["context"], minilm.states(CAPTIONS))
    np.testing.assert_array_equal(batch["embedding"], longer.sentence(CAPTIONS))
