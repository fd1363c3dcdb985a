"""How checkpoints along members' training are measured."""

from __future__ import annotations

import dataclasses

from ldm_scaling.config.check import positive


@dataclasses.dataclass(frozen=True)
class Early:
    """Members are measured at `train.keep_steps` as at the end, but with one sampler at one step
    count: quality against training compute, the paper's Fig. 3.

    Attributes:
      sampler: one of `sweep.samplers`; empty measures the end alone.
      steps: one of `sweep.steps`. Guidance rates, blocks and all else are the sweep's.
    """

    sampler: str = ""
    steps: int = 50

    def __post_init__(self):
        positive(self, "steps")
