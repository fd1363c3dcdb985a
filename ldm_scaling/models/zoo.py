"""The family table: every network by name, with the figures that the paper printed for it.

The paper: "Bigger is not Always Better: Scaling Properties of Latent Diffusion Models",
arXiv 2404.01367, Table 1.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence

from ldm_scaling.errors import UserError
from ldm_scaling.models import backbone, backbone_tables, cost
from ldm_scaling.models.unet import UNetSpec


@dataclasses.dataclass(frozen=True)
class Published:
    """Figures as printed; None where there is none.

    Attributes:
      params: millions of parameters.
      gflops: of one denoising step.
      norm_cost: gflops over those of the 866M member.
      fid, clip: on COCO-2014 with 50 DDIM steps at guidance 7.5, 30k samples.
    """

    params: float
    gflops: float | None = None
    norm_cost: float | None = None
    fid: float | None = None
    clip: float | None = None


@dataclasses.dataclass(frozen=True)
class Member:
    """One network.

    Attributes:
      name: what configs call it.
      spec: the network, see `backbone.Spec`.
      reference: name of the member of cost 1 in its family.
      published: the printed figures, or None.
    """

    name: str
    spec: backbone.Spec
    reference: str
    published: Published | None = None


PAPER_REFERENCE = "866m"
SMALL_REFERENCE = "c64"

# The 25.3 GFLOPs of 39m are a misprint: the number repeats the FID, and the norm. cost beside it
# needs about 56.6, which is what XLA counts. It stands here as printed.
_PAPER = (
    #  name   c    params  GFLOPs  cost  FID    CLIP
    ("39m",   64,  38.8,   25.3,   0.07, 25.30, 0.305),
    ("83m",   96,  83.4,   102.7,  0.13, 24.30, 0.308),
    ("145m", 128,  144.8,  161.5,  0.20, 24.18, 0.310),
    ("223m", 160,  223.0,  233.5,  0.30, 23.76, 0.310),
    ("318m", 192,  318.0,  318.5,  0.40, 22.83, 0.311),
    ("430m", 224,  429.8,  416.6,  0.53, 22.35, 0.312),
    ("558m", 256,  558.3,  527.8,  0.67, 22.15, 0.312),
    ("704m", 288,  703.7,  652.0,  0.83, 21.82, 0.312),
    ("866m", 320,  865.9,  789.3,  1.00, 21.55, 0.312),
    ("2b",   512,  2190.0, 1887.5, 2.39, 20.98, 0.312),
    ("5b",   768,  4900.0, 4082.6, 5.17, 20.14, 0.314),
)  # fmt: skip

# For CPUs: (name, c, groups). Text states of a MiniLM are 384 wide. Each is there for latents of
# side 8 and, as `c8_s16`, of side 16. Unlike the paper's they do not begin with zeros: the demos'
# results are of networks that were drawn so.
_SMALL = (
    ("c8",   8, 4),
    ("c12", 12, 4),
    ("c16", 16, 8),
    ("c24", 24, 8),
    ("c32", 32, 8),
    ("c48", 48, 8),
    ("c64", 64, 8),
)  # fmt: skip

# For one accelerator, in latents of side 16 alone: configs/h200_ladder.py.
_WIDE = (
    ("c96",   96, 8),
    ("c128", 128, 8),
    ("c192", 192, 8),
    ("c256", 256, 8),
)  # fmt: skip


def _small(c: int, groups: int, side: int = 8) -> UNetSpec:
    return UNetSpec(
        c, context_dim=384, channel_mults=(1, 2), attention_levels=(True, True),
        blocks_per_level=1, heads=4, groups=groups, sample_size=side, context_length=18,
    )


def _of_the_paper(c: int, side: int = 64) -> UNetSpec:
    return UNetSpec(c, sample_size=side, zero_init=True)


PAPER = tuple(
    Member(n, _of_the_paper(c), PAPER_REFERENCE, Published(*p)) for n, c, *p in _PAPER
)
PAPER_32 = tuple(  # For latents of side 32: the first stages of cascades at 512 px.
    Member(f"{n}_s32", _of_the_paper(c, 32), f"{PAPER_REFERENCE}_s32") for n, c, *_ in _PAPER
)
SD15 = Member("sd15", UNetSpec(320, context_dim=768), PAPER_REFERENCE, Published(859.5))
SMALL = tuple(Member(n, _small(c, groups), SMALL_REFERENCE) for n, c, groups in _SMALL)
SMALL_16 = tuple(
    Member(f"{n}_s16", _small(c, groups, 16), f"{SMALL_REFERENCE}_s16")
    for n, c, groups in (*_SMALL, *_WIDE)
)
UNETS = (*PAPER, SD15, *SMALL, *SMALL_16)


def _family(name: str) -> tuple[Member, ...]:
    return tuple(
        Member(b.name, b.spec, b.reference) for b in backbone_tables.BACKBONES.values()
        if b.name.startswith(f"{name}_")
    )


FAMILIES = {
    "unet": (*UNETS, *PAPER_32),
    **{name: _family(name) for name in ("dit", "sit", "uvit", "mmdit", "edm2")},
}
"""Networks by what they are called; a family's own widths and depths side by side. SiT's are DiT's,
trained otherwise."""
LABELS = {
    "unet": "U-Net", "dit": "DiT", "sit": "SiT", "uvit": "U-ViT", "mmdit": "MM-DiT", "edm2": "EDM2",
}
"""What families are called in figures and sentences."""
MEMBERS = {member.name: member for members in FAMILIES.values() for member in members}


def register(*members: Member, family: str, label: str = "") -> None:
    """Adds networks under their names, such as one's own, see docs/backbones.md.

    Args:
      members: their specs' kinds are known, see `backbone.register`; a `reference` is one of these
        or is known. There may be more of a family later.
      family: what they are compared as, a word; one that there is, for more sizes of it.
      label: what figures call a new family.
    Raises:
      UserError: for a name that there is, a reference that there is not, a spec that lacks
        something, or a label that is missing or is another.
    """
    known = MEMBERS | {member.name: member for member in members}
    names = [member.name for member in members]
    if taken := sorted(({*names} & {*MEMBERS}) | {n for n in names if names.count(n) > 1}):
        raise UserError(
            f"networks are called {', '.join(taken)} already: give other names; where the module "
            "that registers them failed half-way before, mend it and start Python anew"
        )
    called = LABELS.get(family, label)
    if not called or label not in ("", called):
        raise UserError(
            f"the family {family!r} of {', '.join(names)} is called {called!r} in figures, and "
            f"label={label!r} is given: a new family needs one, another keeps its own"
        )
    for member in members:
        backbone.check(member.spec)
        if member.reference not in known:
            raise UserError(
                f"{member.name}'s cost is to be measured by {member.reference!r}, which no network "
                "is called: name a member, it may be one of these"
            )
    LABELS[family] = called
    FAMILIES[family] = (*FAMILIES.get(family, ()), *members)
    MEMBERS.update(known)


def family_of(name: str) -> str:
    """The family of a member; empty of a network that is none of these."""
    return next((f for f, members in FAMILIES.items() if name in {m.name for m in members}), "")


def get(name: str) -> Member:
    """The member of that name.

    Raises:
      UserError: naming the nearest, or all.
    """
    if name in MEMBERS:
        return MEMBERS[name]
    near = difflib.get_close_matches(str(name).lower(), MEMBERS, n=3)
    names = ", ".join(m.name for m in UNETS)
    hint = f"did you mean {' or '.join(near)}?" if near else (
        f"choose from {names}, or of another family:  ldm-scaling zoo --family=dit; the module "
        "that registers one's own is named in config.plugins")
    raise UserError(f"no network is called {name!r}; {hint}")


def norm_costs(names: Sequence[str], reference: str) -> dict[str, float]:
    """GFLOPs of each member over the reference's."""
    one = cost.gflops(get(reference).spec)
    return {name: cost.gflops(get(name).spec) / one for name in names}
