"""What members begin with."""

from __future__ import annotations

import dataclasses

from ldm_scaling.config.check import require

LENGTH = ("steps", "learning_rate_decay")
"""What of `train` may differ between a run and another that goes on from it."""


@dataclasses.dataclass(frozen=True)
class Start:
    """Members begin with those of the same names that another study has trained, not with weights
    that are drawn; see docs/training.md.

    Attributes:
      workdir: of that study, whose autoencoder comes along. Empty is none.
      step: of its checkpoints; 0 is the last.
      take: `average`, the averaged parameters, or `weights`, those that were averaged: a run of its
        own begins with them, at its step 0, with an optimiser, average and data of its own. Or
        `run`: all that their run carried. It goes on in this one, whose first steps these were,
        with the numbers that this one would have alone; their length and the rate's decay may
        differ, where the rate was the same so far.
      hash: of how what they begin with was trained, filled in when the workdir is read; given, it
        is what that must have. Empty with `run`, where their training is this one's own.
    """

    workdir: str = ""
    step: int = 0
    take: str = "average"
    hash: str = ""

    def __post_init__(self):
        require(self.take in ("average", "weights", "run"), "start.take", self.take,
                "choose average, weights or run")
        require(self.step >= 0, "start.step", self.step, "not below 0")
        for name in ("step", "hash"):
            value = getattr(self, name)
            require(bool(self.workdir) or not value, f"start.{name}", value,
                    "give start.workdir too, or leave it out")

    @property
    def passed(self) -> int:
        """Steps of members' runs that another study has made."""
        return self.step if self.workdir and self.take == "run" else 0
