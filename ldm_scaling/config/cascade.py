"""Two networks in a row: one draws small pictures, one makes large ones of them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ldm_scaling import files
from ldm_scaling.config.check import require
from ldm_scaling.config.measuring import Sample, Sweep
from ldm_scaling.config.training import BOOKKEEPING, NEUTRAL, Train

TASK = "cascade"
"""Of records, and of this part of a config."""


@dataclasses.dataclass(frozen=True)
class Cascade:
    """Cascades beside a study's members: every network of `base` before every one of `upper`, see
    docs/cascades.md. They lie in the workdir of the study.

    Attributes:
      base: networks that draw pictures whose side is `factor` times smaller, names of the zoo;
        empty is no cascade.
      upper: members that are trained to enlarge these; empty is all.
      factor: how many times smaller.
      start: what the upper networks start from, the trained `member` of their name or `nothing`.
      augment: the most noise on the small latents in training: a level is drawn between 0 and this
        for each example, and told to the network (conditioning augmentation, arXiv 2106.15282). 0
        is none, and nothing is told.
      level: of the noise that they are drawn with.
      base_train, train: the runs of the base networks and of the upper ones.
      first_sampler, first_steps, first_spacing: of the first stage. Each of its step counts is
        measured; grids and `ldm-scaling sample` take the last.
      upper_guidance: the guidance rate of the second stage, which keeps the small picture and drops
        the caption; 1 is none.
      sample: how the second stage draws in grids and by `ldm-scaling sample`; its guidance is the
        first stage's. Along the way it draws so of real small pictures, unguided; base networks
        draw as the study's `sample` says.
      sweep: what is measured: the grid of the second stage, and the first stage's rates, of which
        the best is chosen as a member's is.
    """

    base: tuple[str, ...] = ()
    upper: tuple[str, ...] = ()
    factor: int = 2
    start: str = "member"
    augment: float = 0.0
    level: float = 0.0
    base_train: Train = dataclasses.field(default_factory=Train)
    train: Train = dataclasses.field(default_factory=Train)
    first_sampler: str = "ddim"
    first_steps: tuple[int, ...] = (4, 10, 20, 50)
    first_spacing: str = ""
    upper_guidance: float = 1.0
    sample: Sample = dataclasses.field(default_factory=Sample)
    sweep: Sweep = dataclasses.field(default_factory=lambda: Sweep(samplers=("ddim",)))

    def __post_init__(self):
        for name in ("base", "upper", "first_steps"):
            values = getattr(self, name)
            require(len(set(values)) == len(values), f"cascade.{name}", values, "has a value twice")
        self.sweep.require_none_of_its_own("cascade")
        require(self.factor >= 2, "cascade.factor", self.factor, "at least 2")
        require(self.start in ("member", "nothing"), "cascade.start", self.start,
                "choose member or nothing")
        require(0 <= self.augment <= 1, "cascade.augment", self.augment, "from 0 to 1")
        require(0 <= self.level <= self.augment, "cascade.level", self.level,
                f"networks know levels from 0 to cascade.augment={self.augment:g} alone")
        require(len(self.first_steps) > 0 and min(self.first_steps) >= 1, "cascade.first_steps",
                self.first_steps, "give at least one, each at least 1")
        require(math.isfinite(self.upper_guidance), "cascade.upper_guidance", self.upper_guidance,
                "must be finite")
        require(self.upper_guidance == 1 or self.train.caption_dropout > 0,
                "cascade.upper_guidance", self.upper_guidance, "there is nothing to guide away "
                "from: 1, or give cascade.train.caption_dropout, e.g. 0.1")

    @property
    def task(self) -> str:
        """Of the records."""
        return TASK

    def _of_run(self, run: str) -> dict[str, Any]:
        return {k: v for k, v in dataclasses.asdict(getattr(self, run)).items()
                if k not in BOOKKEEPING and NEUTRAL.get(k) != v}

    @property
    def setting(self) -> str:
        """All that decides what cascades of given networks draw, but steps and the first rate."""
        decides = [self.base_hash, self.upper_hash, self.upper_guidance, self.level]
        return f"{TASK}_{files.sha256_of(decides)[:8]}"

    @property
    def base_hash(self) -> str:
        """Of all that decides the base networks but the study and their names."""
        return files.sha256_of({"factor": self.factor, "train": self._of_run("base_train")})

    @property
    def upper_hash(self) -> str:
        """Of all that decides the upper networks but the members that they start from."""
        return files.sha256_of({
            "factor": self.factor, "start": self.start, "augment": self.augment,
            "train": self._of_run("train"),
        })
