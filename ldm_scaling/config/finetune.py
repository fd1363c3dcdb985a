"""What trained members are trained further for."""

from __future__ import annotations

import dataclasses
from typing import Any

from ldm_scaling import files
from ldm_scaling.config.check import require
from ldm_scaling.config.measuring import Sample, Sweep
from ldm_scaling.config.training import BOOKKEEPING, NEUTRAL, Train


def _train() -> Train:
    return Train(
        steps=50_000, batch_size=256, learning_rate=5e-5, warmup_steps=1_000, caption_dropout=0.0,
        keep_steps=(),
    )


def _sample() -> Sample:
    return Sample(guidance=1.0, num_images=8)


def _sweep() -> Sweep:
    return Sweep(
        samplers=("ddim",), steps=(4, 6, 8, 10, 20, 50, 100, 250), guidance=(1.0,),
        num_images=3_000, batch_size=256,
    )


@dataclasses.dataclass(frozen=True)
class FineTune:
    """Fine-tuning of trained members for another task, and how that is measured.

    Attributes:
      task: the image-conditioned task, a name of `data.conditions.table`; empty is none.
      pretrained: workdir of the study whose members are fine-tuned; empty is this one, which trains
        them first.
      pretrained_hash: of how these members were trained, filled in when the workdir is read;
        given, it is what they must have.
      budgets: steps of fine-tuning after which a member is measured, as the paper does over
        fine-tuning compute; the last is `train.steps`. Empty is that alone. See `measured`.
      source_side: side of the images that conditions are made of; the training examples are cut out
        of both at `data.side`. 0 is `data.side`, with nothing cut.
      condition_dropout: share of examples whose condition is left out (zeros), so that there is
        something to guide away from. 0 is the paper's: no guidance.
      train: the run; `caption_dropout` has no meaning where there are no captions.
      sample: what is drawn along the way.
      sweep: what is measured of the fine-tuned networks.
    """

    task: str = ""
    pretrained: str = ""
    pretrained_hash: str = ""
    budgets: tuple[int, ...] = ()
    source_side: int = 0
    condition_dropout: float = 0.0
    train: Train = dataclasses.field(default_factory=_train)
    sample: Sample = dataclasses.field(default_factory=_sample)
    sweep: Sweep = dataclasses.field(default_factory=_sweep)

    def __post_init__(self):
        require(list(self.budgets) == sorted(set(self.budgets)), "finetune.budgets", self.budgets,
                "ascending, none twice")
        require(all(b > 0 for b in self.budgets), "finetune.budgets", self.budgets, "above 0")
        require(not self.budgets or self.budgets[-1] == self.train.steps, "finetune.train.steps",
                self.train.steps, f"the last of finetune.budgets={self.budgets} ends the run: make "
                "them equal")
        require(self.source_side >= 0, "finetune.source_side", self.source_side, "not below 0")
        require(0 <= self.condition_dropout < 1, "finetune.condition_dropout",
                self.condition_dropout, "in [0, 1)")
        rates = (*self.sweep.guidance, self.sample.guidance)
        require(not self.task or self.condition_dropout > 0 or all(w == 1 for w in rates),
                "finetune.sweep.guidance", rates, "there is nothing to guide away from: 1, or give "
                "finetune.condition_dropout, e.g. 0.1")
        require(not self.task or self.sweep.strategy == "grid", "finetune.sweep.strategy",
                self.sweep.strategy, "restored pictures do not race: grid")
        require(not self.pretrained or bool(self.task), "finetune.task", self.task,
                "finetune.pretrained is given: say for what its members are fine-tuned")

    @property
    def steps(self) -> tuple[int, ...]:
        """Those after which a member is measured."""
        return self.budgets or (self.train.steps,)

    @property
    def run(self) -> Train:
        """The run, which keeps the checkpoints that are measured."""
        kept = tuple(sorted({*self.train.keep_steps, *self.steps}))
        return dataclasses.replace(self.train, keep_steps=kept)

    def measured(self, steps: int) -> Sweep:
        """What is measured after so many steps of fine-tuning: at the end all of `sweep`, before it
        one number of sampling steps, `sample`'s, or the sweep's largest where that is none of it.
        """
        if steps == self.train.steps:
            return self.sweep
        own, every = self.sample.steps, self.sweep.steps
        return dataclasses.replace(self.sweep, steps=(own if own in every else max(every),))

    @property
    def setting(self) -> str:
        """The task and what decides it, in a word."""
        return f"{self.task}_{self.hash[:8]}"

    @property
    def hash(self) -> str:
        """Of all that decides a fine-tuned network but the pretrained one. A run may be made
        longer, so its length is not part of it, unless the learning rate falls to its end."""
        free = (*BOOKKEEPING, "caption_dropout")
        if self.train.any_length:
            free += ("steps",)
        run = {k: v for k, v in dataclasses.asdict(self.train).items()
               if k not in free and NEUTRAL.get(k) != v}
        decides: dict[str, Any] = {"task": self.task, "train": run}
        for name in ("source_side", "condition_dropout"):
            if getattr(self, name):
                decides[name] = getattr(self, name)
        return files.sha256_of(decides)
