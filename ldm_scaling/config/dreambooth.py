"""Subjects that members are taught by a few pictures of each."""

from __future__ import annotations

import dataclasses
from typing import Any

from ldm_scaling import files
from ldm_scaling.config.check import require
from ldm_scaling.config.measuring import Sample
from ldm_scaling.config.training import BOOKKEEPING, NEUTRAL, Train


def _train() -> Train:
    # diffusers' example; the average over the run would hold back what is learnt in so few steps.
    return Train(
        steps=1_000, batch_size=1, learning_rate=5e-6, warmup_steps=0, ema_decay=0.0,
        caption_dropout=0.0, validate_every=0, checkpoint_every=500, sample_every=0, log_every=10,
        keep=1,
    )


@dataclasses.dataclass(frozen=True)
class DreamBooth:
    """DreamBooth (arXiv 2208.12242) of every member and every subject, see docs/dreambooth.md.

    Attributes:
      subjects: folder with a folder of pictures for each subject, such as DreamBench's, or with one
        subject's pictures; or `openmoji:CODEPOINTS:DEGREES`, a pictogram with its hues turned, see
        `data.composed.subject`. Empty is no DreamBooth.
      only: names of the subjects that are taught; none are all.
      classes: what they are, SUBJECT=WORDS of each or WORDS for all; DreamBench's folder says it.
      identifier: the word that comes to mean a subject: short, and rare to the text encoder.
      caption: of a subject's pictures, {0} is the identifier and {1} the class; of the class's
        pictures it is the same without the identifier.
      prior_weight: of the loss over the class's pictures; 0 has none.
      class_images: how many of those a member draws itself.
      lora_rank: of adapters (arXiv 2106.09685); 0 trains all parameters.
      lora_targets: regular expressions that find the network's layers with adapters; none are the
        projections of its attention.
      train_text_encoder: whether the text encoder is taught along.
      prompts: that a taught member draws, {0} and {1} as above; none are those of DreamBench's
        folder.
      images_per_prompt: pictures of each prompt.
      train: the run of each member and subject; `batch_size` counts pictures of the subject, each
        of which has one of the class beside it.
      sample: how pictures are drawn, the class's too; `num_images` is how many are drawn at a time.
    """

    subjects: str = ""
    only: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    identifier: str = "sks"
    caption: str = "a {0} {1}"
    prior_weight: float = 1.0
    class_images: int = 200
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()
    train_text_encoder: bool = False
    prompts: tuple[str, ...] = ()
    images_per_prompt: int = 4
    train: Train = dataclasses.field(default_factory=_train)
    sample: Sample = dataclasses.field(default_factory=Sample)

    def __post_init__(self):
        require(bool(self.identifier.strip()) and len(self.identifier.split()) == 1,
                "dreambooth.identifier", self.identifier, "one word, such as 'sks'")
        rest = self.caption.replace("{0}", "").replace("{1}", "")
        require("{0}" in self.caption and "{1}" in self.caption and not set("{}") & set(rest),
                "dreambooth.caption", self.caption,
                "put {0} for the identifier and {1} for the class in it, and no other braces")
        require(0 <= self.prior_weight < float("inf"), "dreambooth.prior_weight",
                self.prior_weight, "not below 0")
        require(self.class_images > 0, "dreambooth.class_images", self.class_images,
                "above 0; without prior preservation set prior_weight=0")
        require(self.lora_rank >= 0, "dreambooth.lora_rank", self.lora_rank,
                "above 0, or 0 to train all parameters")
        require(not self.lora_targets or self.lora_rank > 0, "dreambooth.lora_targets",
                self.lora_targets, "they are adapters' layers: give dreambooth.lora_rank too")
        require(self.images_per_prompt > 0, "dreambooth.images_per_prompt",
                self.images_per_prompt, "above 0")
        require(self.train.validate_every == 0, "dreambooth.train.validate_every",
                self.train.validate_every, "nothing is held back of so few pictures: 0")

    @property
    def setting(self) -> str:
        """How members are taught and what decides it, in a word; not what they are taught."""
        how = f"lora{self.lora_rank}_" if self.lora_rank else ""
        return f"dreambooth_{how}{self.hash[:8]}"

    @property
    def folder(self) -> str:
        """Of members that are taught so, in a workdir."""
        return f"finetuned/dreambooth_{self.hash[:8]}"

    @property
    def hash(self) -> str:
        """Of all that decides a taught network but the pretrained one and the subject."""
        run = {k: v for k, v in dataclasses.asdict(self.train).items()
               if k not in BOOKKEEPING and NEUTRAL.get(k) != v}
        names = ["identifier", "caption", "prior_weight", "lora_rank", "lora_targets",
                 "train_text_encoder"]
        decides: dict[str, Any] = {name: getattr(self, name) for name in names} | {"train": run}
        if self.prior_weight:
            sample = {k: v for k, v in dataclasses.asdict(self.sample).items() if k != "num_images"}
            decides |= {"class_images": self.class_images, "sample": sample}
        return files.sha256_of(decides)
