"""Other networks than the paper's U-Nets, by name: as their papers printed them, and as members of
the study."""

from __future__ import annotations

import dataclasses

from ldm_scaling.models.dit import DiTSpec
from ldm_scaling.models.edm2 import EDM2Spec
from ldm_scaling.models.mmdit import MMDiTSpec
from ldm_scaling.models.tokens import TransformerSpec
from ldm_scaling.models.uvit import UViTSpec


@dataclasses.dataclass(frozen=True)
class Printed:
    """A network as its paper has it.

    Attributes:
      spec: the network, for the text (or classes) and the latents of the paper.
      params: millions of parameters, as printed.
      gmacs: 1e9 multiply-adds of one step, which these papers call Gflops: half of the FLOPs that
        `cost` counts. None where none is printed.
    """

    spec: TransformerSpec | EDM2Spec
    params: float
    gmacs: float | None = None


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A network as a member of the study.

    Attributes:
      name: what configs call it.
      spec: the network, for the study's text and latents.
      reference: name of the one of cost 1 in its family.
    """

    name: str
    spec: TransformerSpec | EDM2Spec
    reference: str


# Peebles & Xie 2023 (arXiv 2212.09748), Table 1; Gflops at 32 x 32 latents. Learned variances
# double the channels out; a class of ImageNet, or none, is one token of 1001 places.
_DIT = (
    #  name     width depth heads  params   GMACs
    ("dit_s2",   384,   12,    6,    33.0,    6.06),
    ("dit_b2",   768,   12,   12,   130.0,   23.01),
    ("dit_l2",  1024,   24,   16,   458.0,   80.71),
    ("dit_xl2", 1152,   28,   16,   675.0,  118.64),
)  # fmt: skip
_CLASSES = {"context_dim": 1001, "context_length": 1}

# Ma et al. 2024 (arXiv 2401.08740), Table 1: DiT's networks and parameters; what differs is how
# they are trained, see `recipes.straight`.
_SIT = tuple((name.replace("dit", "sit"), *sizes) for name, *sizes, _ in _DIT)

# Bao et al. 2023 (arXiv 2209.12152), Table 1, at 32 x 32 latents: M, L and H for ImageNet's
# classes, S and S deep for COCO's captions, 77 states of CLIP. The 44 million of S are without text
# or classes, whose layer has 0.4 more; a layer is a block.
_UVIT = (
    #  name         width layers heads conv   params
    ("uvit_s",       512,   13,    8,  True,    44.0),
    ("uvit_s_deep",  512,   17,    8,  True,    58.0),
    ("uvit_m",       768,   17,   12,  True,   131.0),
    ("uvit_l",      1024,   21,   16,  True,   287.0),
    ("uvit_h",      1152,   29,   16,  False,  501.0),
)  # fmt: skip
_UVIT_TEXT = ("uvit_s", "uvit_s_deep")

# Esser et al. 2024 (arXiv 2403.03206), section 5.3: depths; parameters were printed of two, in
# billions: Stable Diffusion 3 Medium's 2 and the largest's 8. Text is 154 states of CLIP and T5.
_MMDIT = (
    #  name       depth  params
    ("mmdit_15",   15,    None),
    ("mmdit_18",   18,    None),
    ("mmdit_21",   21,    None),
    ("mmdit_24",   24,   2000.0),
    ("mmdit_30",   30,    None),
    ("mmdit_38",   38,   8000.0),
)  # fmt: skip
_SD3 = {"context_dim": 4096, "context_length": 154, "in_channels": 16, "out_channels": 16}

# Karras et al. 2024 (arXiv 2312.02696): config G for ImageNet's 1000 classes, Gflops at 64 x 64
# latents. They are multiply-adds too, and one to two hundredths more than those of all kernels,
# with their taps on padding, and of attention.
_EDM2 = (
    #  name        c    params  GMACs
    ("edm2_xs",  128,   124.7,   46.0),
    ("edm2_s",   192,   280.2,  102.0),
    ("edm2_m",   256,   497.8,  181.0),
    ("edm2_l",   320,   777.5,  282.0),
    ("edm2_xl",  384,  1119.3,  406.0),
    ("edm2_xxl", 448,  1523.2,  552.0),
)  # fmt: skip

# Chen et al. 2023 (arXiv 2310.00426), section 2.3; T5's states, 120 of them.
_PIXART = Printed(
    DiTSpec(1152, 28, 16, context_dim=4096, context_length=120, out_channels=8), 611.0
)

PRINTED: dict[str, Printed] = {
    **{
        name: Printed(DiTSpec(*sizes, "pooled", out_channels=8, **_CLASSES), params, gmacs)
        for name, *sizes, params, gmacs in _DIT
    },
    "pixart_xl2": _PIXART,
    **{
        name: Printed(DiTSpec(*sizes, "pooled", out_channels=8, **_CLASSES), params)
        for name, *sizes, params in _SIT
    },
    **{
        name: Printed(
            UViTSpec(*sizes, **({"context_dim": 768} if name in _UVIT_TEXT else _CLASSES)), params
        )
        for name, *sizes, params in _UVIT
    },
    **{
        name: Printed(MMDiTSpec(depth, **_SD3), params)
        for name, depth, params in _MMDIT if params
    },
}

PRINTED_EDM2: dict[str, Printed] = {
    name: Printed(EDM2Spec(c, context_dim=1000, context_length=1), params, gmacs)
    for name, c, params, gmacs in _EDM2
}

# The same sizes for the text and the latents of the paper's U-Nets: `dit_xl2` is PixArt-alpha's
# then.
_LARGE = {"context_dim": 1024, "context_length": 77, "sample_size": 64}

# For CPUs, beside the U-Nets c8 to c32, whose GFLOPs they have to within a fifth: for latents of
# side 8 and, as `dit_w40_s16`, of side 16. Text states of a MiniLM are 384 wide.
_SMALL = {"context_dim": 384, "context_length": 18}


def _edm2(c: int, **kw) -> EDM2Spec:
    """Two levels, and two heads in the lower."""
    return EDM2Spec(
        c, channel_mults=(1, 2), attention_levels=(False, True), blocks_per_level=1,
        head_channels=c, **kw,
    )


_SMALL_SPECS = {
    #  beside                                           c8 c12 c16 c24  c32
    **{f"dit_w{c}": (DiTSpec, (c, 6, 4)) for c in      (40, 56, 72, 104, 128)},
    **{f"sit_w{c}": (DiTSpec, (c, 6, 4)) for c in      (40, 56, 72, 104, 128)},
    **{f"uvit_w{c}": (UViTSpec, (c, 5, 4)) for c in    (32, 44, 56, 80, 104)},
    **{f"mmdit_d{d}": (MMDiTSpec, (d, 8)) for d in     (5, 6, 7, 8, 10)},
    **{f"edm2_c{c}": (_edm2, (c,)) for c in            (14, 20, 24, 32, 44)},
}  # fmt: skip
_REFERENCES = {
    "dit": "dit_w128", "sit": "sit_w128", "uvit": "uvit_w104", "mmdit": "mmdit_d10",
    "edm2": "edm2_c44",
}


def _small(side: int, ending: str) -> tuple[Backbone, ...]:
    return tuple(
        Backbone(
            name + ending, make(*sizes, sample_size=side, **_SMALL),
            _REFERENCES[name.partition("_")[0]] + ending,
        )
        for name, (make, sizes) in _SMALL_SPECS.items()
    )


LARGE = (
    *(Backbone(name, DiTSpec(*sizes, **_LARGE), "dit_xl2") for name, *sizes, _, _ in _DIT),
    *(Backbone(name, DiTSpec(*sizes, **_LARGE), "sit_xl2") for name, *sizes, _ in _SIT),
    *(Backbone(name, UViTSpec(*sizes, **_LARGE), "uvit_h") for name, *sizes, _ in _UVIT),
    *(Backbone(name, MMDiTSpec(depth, **_LARGE), "mmdit_24") for name, depth, _ in _MMDIT),
    *(Backbone(name, EDM2Spec(c, **_LARGE), "edm2_xl") for name, c, _, _ in _EDM2),
)
SMALL = _small(8, "")
SMALL_16 = _small(16, "_s16")
BACKBONES = {backbone.name: backbone for backbone in (*LARGE, *SMALL, *SMALL_16)}
