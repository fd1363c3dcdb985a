"""What is drawn and measured."""

from __future__ import annotations

import dataclasses
import math

from ldm_scaling.config.check import positive, require

LEAST_IMAGES = 4
"""Pictures below which nothing is measured: there is no interval."""
LEAST_RACED = 16
"""Pictures below which a Fréchet distance and its spread say too little to drop a rate by."""

FRECHET = "fd_effnetlite0"
"""The Fréchet distance that every sweep measures."""
RESTORED = ("stlpips_alex", "psnr", "ssim", "label_score_effnetlite0")
"""What every sweep of restored pictures measures beside it, see `study.paired_scorer`."""


def race_rounds(arms: int, images: int, saving: float) -> tuple[int, ...]:
    """Pictures of an arm after each round of a race: twice as many each time, for half the arms.

    In all `saving` times fewer than `images` of every arm. That the early rounds get most of it is
    on purpose: small sets of pictures are hard to tell apart, and what is dropped does not return.
    """
    live, weight, rounds = arms, float(arms), math.ceil(math.log2(arms))
    for k in range(1, rounds):
        live = math.ceil(live / 2)
        weight += live * 2 ** (k - 1)
    first = int(arms * images / (saving * weight))
    return tuple(min(first * 2**k, images) for k in range(rounds))


@dataclasses.dataclass(frozen=True)
class Sample:
    """How pictures are drawn along the way and by `ldm-scaling sample`.

    Attributes:
      sampler, steps, spacing, guidance: see `Sweep`.
      num_images: pictures in a grid.
    """

    sampler: str = "ddim"
    steps: int = 50
    spacing: str = ""
    guidance: float = 7.5
    num_images: int = 16

    def __post_init__(self):
        positive(self, "steps", "num_images")
        require(math.isfinite(self.guidance), "sample.guidance", self.guidance, "must be finite")

    @property
    def table(self) -> tuple[str, int, str]:
        """(sampler, steps, spacing)."""
        return self.sampler, self.steps, self.spacing


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is measured.

    The guidance rate of every (model, sampler, steps) is chosen on `select_block`, where all rates
    run, and reported on `report_blocks`, where only the chosen one does: no figure needs the rest.

    Attributes:
      samplers: as `sampling.solvers` knows them, with options or without: `ddim:eta=0.5`.
      steps: step counts.
      max_steps: sampler, with options or without -> most steps it is run with (the paper stops
        DPM-Solver++ at 20).
      guidance: guidance rates.
      spacing: timestep spacing, see `sampling.grid`; empty is each sampler's own.
      strategy: "grid" draws all pictures of all rates on the selection block; "racing" draws a few
        of each and goes on with the better half, round by round, see `statistics.racing`.
      saving: how many times fewer pictures racing draws there, at least.
      num_images: pictures per configuration and block.
      select_block, report_block: two different blocks of validation prompts and noise.
      more_blocks: further blocks that are reported on, see `statistics.blocks`: what is reported is
        the mean over all of them. They may be added when the others are measured.
      replicates: bootstrap replicates on each report block.
      batch_size: lanes: pictures that are sampled at a time, over all devices.
      feature_side: side that pictures are resized to for the feature network.
      metrics: what is measured beside, of `study.scores`, which `study.sweep_checks` looks at.
        Published networks are read from the folder that the variable LDM_SCALING_WEIGHTS names, see
        `study.weights`.
      choose_by: the metric that chooses guidance, decides races and leads the report: the sweep's
        own Fréchet distance, or one of `metrics`; of fine-tuning also one of `RESTORED`.
    """

    samplers: tuple[str, ...] = ("ddim", "ddpm", "dpmpp_2m")
    steps: tuple[int, ...] = (4, 6, 8, 10, 20, 50)
    max_steps: dict[str, int] = dataclasses.field(default_factory=lambda: {"dpmpp_2m": 20})
    guidance: tuple[float, ...] = (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
    spacing: str = ""
    strategy: str = "grid"
    saving: float = 4.0
    num_images: int = 5_000
    select_block: int = 0
    report_block: int = 1
    more_blocks: tuple[int, ...] = ()
    replicates: int = 200
    batch_size: int = 512
    feature_side: int = 224
    metrics: tuple[str, ...] = ()
    choose_by: str = FRECHET

    def __post_init__(self):
        for name in ("samplers", "steps", "guidance"):
            values = getattr(self, name)
            require(len(values) > 0, f"sweep.{name}", values, "give at least one")
            require(len(set(values)) == len(values), f"sweep.{name}", values, "has a value twice")
        require(all(s >= 1 for s in self.steps), "sweep.steps", self.steps, "must be at least 1")
        require(all(math.isfinite(g) for g in self.guidance), "sweep.guidance", self.guidance,
                 "must be finite")
        require(all(n >= 1 for n in self.max_steps.values()), "sweep.max_steps", self.max_steps,
                 "must be at least 1")
        positive(self, "num_images", "batch_size", "feature_side", "replicates")
        require(self.feature_side >= 32, "sweep.feature_side", self.feature_side, "at least 32")
        require(self.num_images >= LEAST_IMAGES, "sweep.num_images", self.num_images,
                 f"at least {LEAST_IMAGES}, or there is no interval")
        require(len(set(self.metrics)) == len(self.metrics), "sweep.metrics", self.metrics,
                "has a value twice")
        require(self.choose_by in (FRECHET, *RESTORED, *self.metrics), "sweep.choose_by",
                self.choose_by, f"{FRECHET}, or one that sweep.metrics names; of fine-tuning also "
                f"{', '.join(RESTORED)}")
        require(self.strategy in ("grid", "racing"), "sweep.strategy", self.strategy,
                 "is grid or racing")
        require(math.isfinite(self.saving) and self.saving >= 1, "sweep.saving", self.saving,
                 "at least 1")
        if self.strategy == "racing":
            require(len(self.guidance) > 1, "sweep.guidance", self.guidance,
                     "a race needs two rates: give more, or sweep.strategy=grid")
            first = race_rounds(len(self.guidance), self.num_images, self.saving)[0]
            require(first >= LEAST_RACED, "sweep.num_images", self.num_images,
                     f"a race of {len(self.guidance)} rates that saves {self.saving:g} times would "
                     f"start with {first} pictures of each, {LEAST_RACED} are needed: raise it, "
                     "lower sweep.saving, or use sweep.strategy=grid")
        require(self.select_block != self.report_block, "sweep.report_block", self.report_block,
                 "must differ from sweep.select_block, or the choice of guidance biases the report")
        require(self.select_block >= 0 and self.report_block >= 0, "sweep.select_block",
                 (self.select_block, self.report_block), "blocks are not below 0")
        blocks = (self.select_block, *self.report_blocks)
        require(len(set(blocks)) == len(blocks) and min(blocks) >= 0, "sweep.more_blocks",
                 self.more_blocks, f"blocks are not below 0, and each differs from the others, "
                 f"select_block={self.select_block} and report_block={self.report_block} too")

    def judged_as(self, members: Sweep) -> Sweep:
        """This grid, with what those of the members are judged by."""
        return dataclasses.replace(self, metrics=members.metrics, choose_by=members.choose_by)

    def require_none_of_its_own(self, part: str) -> None:
        """Raises `UserError` where a part of a config says what its networks are judged by, which
        is what members are judged by."""
        for key, default in (("metrics", ()), ("choose_by", FRECHET)):
            value = getattr(self, key)
            require(value == default, f"{part}.sweep.{key}", value,
                    f"these networks are judged as members are: say it in sweep.{key}")

    @property
    def report_blocks(self) -> tuple[int, ...]:
        """All blocks that are reported on."""
        return (self.report_block, *self.more_blocks)
