"""Transformers against their papers' printed figures, and beside the U-Nets."""

import pytest

from ldm_scaling.models import cost, zoo
from ldm_scaling.models.backbone_tables import BACKBONES, PRINTED, SMALL, SMALL_16

# arXiv 2212.09748, Table 1, at patches of 2: millions of parameters, Gflops.
DIT = {
    "dit_s2": ("33", 6.06), "dit_b2": ("130", 23.01), "dit_l2": ("458", 80.71),
    "dit_xl2": ("675", 118.64),
}


@pytest.mark.parametrize("name", DIT)
def test_dit(name):
    printed, gmacs = DIT[name]
    row = PRINTED[name]
    assert str(round(cost.of(row.spec).params / 1e6)) == printed == f"{row.params:.0f}"
    # The papers' Gflops are multiply-adds; XLA counts norms and activations too.
    assert row.gmacs == gmacs
    assert cost.gflops(row.spec) == pytest.approx(2 * gmacs, rel=0.01)


# arXiv 2401.08740, Table 1; arXiv 2209.12152, Table 1; arXiv 2310.00426, section 2.3; arXiv
# 2403.03206 and the model card of Stable Diffusion 3 Medium.
@pytest.mark.parametrize("name, printed, unit", [
    ("sit_s2", "33", 1e6), ("sit_b2", "130", 1e6), ("sit_l2", "458", 1e6), ("sit_xl2", "675", 1e6),
    ("uvit_s", "44", 1e6), ("uvit_s_deep", "58", 1e6), ("uvit_m", "131", 1e6),
    ("uvit_l", "287", 1e6), ("uvit_h", "501", 1e6), ("pixart_xl2", "611", 1e6),
    ("mmdit_24", "2", 1e9), ("mmdit_38", "8", 1e9),
])
def test_parameters(name, printed, unit):
    row = PRINTED[name]
    count = cost.of(row.spec).params
    if name == "uvit_s":  # Printed of one that draws without text: less its layer and places.
        count -= (768 + 1 + 77) * 512
    assert str(round(count / unit)) == printed == f"{row.params * 1e6 / unit:.0f}"


def test_every_printed_network_is_one_of_the_lists():
    assert set(DIT) | {name.replace("dit", "sit") for name in DIT} | {
        "uvit_s", "uvit_s_deep", "uvit_m", "uvit_l", "uvit_h", "pixart_xl2", "mmdit_24", "mmdit_38",
    } == set(PRINTED)
    for name, row in PRINTED.items():
        if name in BACKBONES:
            for field in ("base_channels", "depth", "heads", "patch"):
                assert getattr(BACKBONES[name].spec, field) == getattr(row.spec, field)


def test_members_for_cpus_cost_about_what_the_unets_do():
    for family in ("dit_", "sit_", "uvit_", "mmdit_"):
        own = [cost.gflops(b.spec) for b in SMALL if b.name.startswith(family)]
        assert len(own) == 5 and own == sorted(own)
        for got, unet in ((own[0], "c8"), (own[2], "c16"), (own[-1], "c32")):
            assert got == pytest.approx(cost.gflops(zoo.get(unet).spec), rel=0.2)


def test_members():
    for name, backbone in BACKBONES.items():
        assert backbone.name == name
        reference = BACKBONES[backbone.reference].spec
        assert (type(reference), reference.latent_shape) == (
            type(backbone.spec), backbone.spec.latent_shape
        )
        # The study's text and latents are the U-Nets'.
        unet = zoo.get("866m" if backbone not in SMALL + SMALL_16 else "c8").spec
        side = 16 if backbone in SMALL_16 else unet.sample_size
        assert backbone.spec.latent_shape == (side, side, unet.out_channels)
        assert backbone.spec.context_dim == unet.context_dim
        assert backbone.spec.context_length == unet.context_length
