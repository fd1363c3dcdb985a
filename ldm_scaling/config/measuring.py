"""What is drawn and measured."""

from __future__ import annotations

import dataclasses
import math

from ldm_scaling.config.check import positive, require


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


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is measured.

    The guidance rate of every (model, sampler, steps) is chosen on `select_block`, where all rates
    run, and reported on `report_block`, where only the chosen one does: no figure needs the rest.

    Attributes:
      samplers: as `sampling.solvers` knows them, with options or without: `ddim:eta=0.5`.
      steps: step counts.
      max_steps: sampler, with options or without -> most steps it is run with (the paper stops
        DPM-Solver++ at 20).
      guidance: guidance rates.
      spacing: timestep spacing, see `sampling.grid`; empty is each sampler's own.
      num_images: pictures per configuration and block.
      select_block, report_block: two different blocks of validation prompts and noise.
      replicates: bootstrap replicates on the report block.
      batch_size: lanes: pictures that are sampled at a time, over all devices.
      feature_side: side that pictures are resized to for the feature network.
    """

    samplers: tuple[str, ...] = ("ddim", "ddpm", "dpmpp_2m")
    steps: tuple[int, ...] = (4, 6, 8, 10, 20, 50)
    max_steps: dict[str, int] = dataclasses.field(default_factory=lambda: {"dpmpp_2m": 20})
    guidance: tuple[float, ...] = (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
    spacing: str = ""
    num_images: int = 5_000
    select_block: int = 0
    report_block: int = 1
    replicates: int = 200
    batch_size: int = 512
    feature_side: int = 224

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
        require(self.num_images >= 4, "sweep.num_images", self.num_images,
                 "at least 4, or there is no interval")
        require(self.select_block != self.report_block, "sweep.report_block", self.report_block,
                 "must differ from sweep.select_block, or the choice of guidance biases the report")
        require(self.select_block >= 0 and self.report_block >= 0, "sweep.select_block",
                 (self.select_block, self.report_block), "blocks are not below 0")
