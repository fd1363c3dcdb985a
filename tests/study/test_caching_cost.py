"""What caching costs and saves: FLOPs and bytes against what the networks and caches really do."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from ldm_scaling.data import cache
from ldm_scaling.errors import UserError
from ldm_scaling.models import autoencoder, clip, cost, t5, text_encoder, zoo
from ldm_scaling.study import caching_cost

SMALL = autoencoder.AutoencoderSpec(8, (1, 2, 2), 1, 4, 4, mid_attention=False)
SOME = ("c8", "dit_w40", "uvit_w32", "mmdit_d5", "edm2_c14")
RENEW = "networks, their loss or the zoo have changed: python -m ldm_scaling.study.counted"
PLAN = caching_cost.Plan(
    images=1000, captions=1000, side=32, autoencoder=SMALL, text=text_encoder.BertSpec(layers=1),
    length=18, examples_per_second=100,
)


def changed(**kw):
    return dataclasses.replace(PLAN, **kw)


@pytest.fixture(scope="module")
def row():
    (row,) = caching_cost.rows(PLAN, ["c8"])
    return row


def test_training_costs_that_are_kept_are_of_the_zoos_networks():
    kept = json.loads(caching_cost.COUNTED.read_text("utf-8"))
    assert set(kept) == {cost.key(member.spec) for member in zoo.MEMBERS.values()}, RENEW


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in SOME else pytest.mark.long) for name in zoo.MEMBERS
])
def test_training_costs_that_are_kept_are_what_is_counted(name):
    """And found at the spec's own number of tokens alone. With LDM_SCALING_LONG=1 of all."""
    spec = zoo.get(name).spec
    caching_cost.train_gflops.cache_clear()
    kept = caching_cost.train_gflops(spec)
    assert kept == cost.kept(caching_cost.COUNTED, spec)["train_gflops"]
    assert caching_cost.count_train(spec) == pytest.approx(kept), RENEW
    assert cost.kept(caching_cost.COUNTED, spec, spec.context_length + 1) is None


def test_a_training_step_is_about_three_passes(row):
    """Backward is two products where forward is one, but for what needs no gradient."""
    ratio = row.train_gflops / cost.gflops(zoo.get("c8").spec)
    assert 2.3 < ratio < 3.0


def test_shares_add_up(row):
    frozen = row.image_gflops + row.text_gflops
    assert row.frozen_share == pytest.approx(frozen / (frozen + row.train_gflops))
    # A step without the encoders is what is left of it.
    assert row.speedup == pytest.approx(1 / (1 - row.frozen_share))
    assert row.pass_gflops == pytest.approx(1000 * frozen) == row.saved_gflops_per_epoch


def test_breaking_even():
    """With one caption an image after one epoch; more is encoded, the later."""
    for plan, low, high in (
        (PLAN, 1, 1), (changed(captions=5000), 1, 5), (changed(mirrored=True), 1, 2),
        (changed(captions=5000, mirrored=True), 2, 5),
    ):
        (row,) = caching_cost.rows(plan, ["c8"])
        assert low - 1e-9 <= row.break_even_epochs <= high + 1e-9
        # What is encoded up to then is what epochs without caches would have encoded.
        spent = row.saved_gflops_per_epoch * row.break_even_epochs
        images, captions = plan.images * (1 + plan.mirrored), plan.captions
        assert spent == pytest.approx(images * row.image_gflops + captions * row.text_gflops)


def test_flops_of_the_text_encoders_are_two_a_weight_and_token():
    """Products of tokens and matrices are all but a few hundredths of them."""
    bert = text_encoder.BertSpec(layers=2, width=192, heads=6, hidden=768, vocabulary=50)
    tower = clip.TextSpec(192, 2, 6, 768, "gelu", None, vocabulary=50)
    encoder = t5.T5Spec(192, 2, 6, 32, 512, vocabulary=50)
    block = 4 * 192 * 192 + 2 * 192 * 768  # attention, MLP
    for spec, weights in ((bert, block), (tower, block), (encoder, block)):
        count = 1e9 * caching_cost.text_gflops(spec, 16) / (2 * 16 * 2 * weights)
        extra = 3 * 512 * 192 / block - 2 * 768 * 192 / block if spec is encoder else 0
        assert 1 + extra < count < 1.08 + extra


def test_flops_of_the_encoder_grow_with_the_picture():
    one, four = (caching_cost.image_gflops(SMALL, side) for side in (64, 128))
    # Taps on the border's padding are not counted, and the smaller one has more border.
    assert 4 * one < four < 4.2 * one


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_bytes_are_those_of_the_caches(tmp_path, dtype):
    latent, text = np.zeros(PLAN.latent_shape, dtype), np.zeros((18, 384), dtype)
    cache.write(tmp_path / "latents", [{"mean": latent, "logvar": latent}] * 1000)
    cache.write(tmp_path / "text", [{"context": text}] * 1000)
    sources = [cache.CacheSource(tmp_path / name) for name in ("latents", "text")]
    sizes = [sum(field.size for field in source.fields) for source in sources]
    assert sizes == [PLAN.latent_bytes(dtype), PLAN.text_bytes(dtype)]
    on_disk = sum((tmp_path / name).stat().st_size for name in ("latents", "text"))
    assert PLAN.total_bytes(dtype) < on_disk < 1.1 * PLAN.total_bytes(dtype)
    assert PLAN.read_bytes_per_second(dtype) == 100 * sum(sizes)
    assert changed(mirrored=True).latent_bytes(dtype) == 2 * sizes[0]
    assert changed(mirrored=True).read_bytes_per_second(dtype) == 100 * sum(sizes)


def test_nothing_of_a_large_encoder_is_allocated():
    """CLIP ViT-H/14's text tower: 0.3 billion parameters."""
    before = sum(x.nbytes for x in jax.live_arrays())
    gflops = caching_cost.text_gflops(dataclasses.replace(caching_cost.TEXTS["clip_h"]), 77)
    assert 24 * 12 * 1024**2 * 2 * 77 < 1e9 * gflops < 1.1 * 24 * 12 * 1024**2 * 2 * 77
    assert sum(x.nbytes for x in jax.live_arrays()) - before < 1e6


def test_text_and_json(row):
    found = [row, dataclasses.replace(row, name="c12")]
    text = caching_cost.text(PLAN, found)
    assert all(len(line) <= 100 for line in text.splitlines())
    for part in ("1,000 images of 32x32", "latents 8x8x4", "text states 18x384", "c8", "c12",
                 f"{row.frozen_share:.1%}", "100 examples/s", "1.02 kB in float16"):  # fmt: skip
        assert part in text
    assert json.loads(json.dumps([dataclasses.asdict(r) for r in found]))[0]["name"] == "c8"
    assert all(math.isfinite(v) for v in dataclasses.asdict(row).values() if v != "c8")


def test_what_does_not_fit_is_named():
    for match, kw in {
        "images=0 must be above 0": {"images": 0},
        "999 captions are fewer than the 1000 images": {"captions": 999},
        "side=30 is not a multiple .* 4": {"side": 30},
        "length=600, but the text encoder takes 512": {"length": 600},
    }.items():
        with pytest.raises(UserError, match=match):
            changed(**kw)
    for match, plan, member in (
        ("c8 takes text states up to 384 wide, the encoder's are 1024",
         changed(text=caching_cost.TEXTS["clip_h"]), "c8"),
        ("c8 takes latents of 4 channels, the autoencoder makes 8",
         changed(autoencoder=dataclasses.replace(SMALL, latent_channels=8)), "c8"),
        ("no network is called 'c9'", PLAN, "c9"),
        ("must halve", changed(side=28), "c8"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=match):
            caching_cost.rows(plan, [member])
