"""What is trained, and how."""

from __future__ import annotations

import dataclasses

from ldm_scaling.config.check import positive, require

# A value of `Diffusion` that the weights of a published model decide.
AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class Train:
    """One training run: AdamW, linear warm-up then constant, EMA, clipping by global norm.

    Attributes:
      steps: optimiser steps.
      batch_size: examples a step, over all devices.
      learning_rate: after the warm-up.
      warmup_steps: steps of linear warm-up.
      weight_decay: AdamW's, on kernels only.
      beta1, beta2: AdamW's.
      clip_norm: largest global norm of the gradient.
      ema_decay: of the averaged parameters; below it the average is taken over a tenth of the run.
      caption_dropout: share of captions replaced by the empty one (U-Nets only).
      compute_dtype: `float32`, `bfloat16`, or `auto`: bfloat16 on TPU and GPU, float32 on a CPU.
      remat: `none` or `block`.
      log_every, validate_every, checkpoint_every, sample_every: in steps; 0 is never. A run's last
        step always does all that are not 0.
      keep: checkpoints kept.
    """

    steps: int = 500_000
    batch_size: int = 2_048
    learning_rate: float = 1e-4
    warmup_steps: int = 10_000
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    clip_norm: float = 1.0
    ema_decay: float = 0.9999
    caption_dropout: float = 0.1
    compute_dtype: str = "auto"
    remat: str = "none"
    log_every: int = 100
    validate_every: int = 5_000
    checkpoint_every: int = 5_000
    sample_every: int = 10_000
    keep: int = 2

    def __post_init__(self):
        positive(self, "steps", "batch_size", "learning_rate", "clip_norm", "log_every",
                  "checkpoint_every", "keep")
        for name in ("warmup_steps", "weight_decay", "validate_every", "sample_every"):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "not below 0")
        for name in ("beta1", "beta2", "ema_decay", "caption_dropout"):
            require(0 <= getattr(self, name) < 1, f"train.{name}", getattr(self, name),
                     "must lie in [0, 1)")
        require(self.compute_dtype in ("auto", "float32", "bfloat16"), "train.compute_dtype",
                 self.compute_dtype, "choose auto, float32 or bfloat16")
        require(self.remat in ("none", "block"), "train.remat", self.remat, "choose none or block")


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """The first stage: the network (see `models.autoencoder.AutoencoderSpec`), its loss, its run.

    Attributes:
      weights: of a published one, see `study.encoders`: nothing of the following counts then.
        Empty where it is trained.
      weights_hash: of its parameters. Filled in when they are read; given, it is what they must
        have.
      base_channels, channel_mults, blocks_per_level, latent_channels, groups, mid_attention: the
        network; latents have 1 / 2 ** (levels - 1) of a picture's side.
      kl_weight: of the KL term (summed over a latent, averaged over pixel values).
      structure_weight: of the Laplacian-pyramid term.
      train: the run.
    """

    weights: str = ""
    weights_hash: str = ""
    base_channels: int = 128
    channel_mults: tuple[int, ...] = (1, 2, 4, 4)
    blocks_per_level: int = 2
    latent_channels: int = 4
    groups: int = 32
    mid_attention: bool = True
    kl_weight: float = 1e-6
    structure_weight: float = 1.0
    train: Train = dataclasses.field(default_factory=Train)

    def __post_init__(self):
        require(self.kl_weight >= 0, "autoencoder.kl_weight", self.kl_weight, "not below 0")
        require(self.structure_weight >= 0, "autoencoder.structure_weight",
                 self.structure_weight, "not below 0")


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """The noise and what the network predicts.

    Attributes:
      schedule: `sd` (Stable Diffusion's) or `sd_zero_snr`; `auto` is what `Study.weights` says.
      prediction: `epsilon`, `v` or `x0`; `auto` likewise.
    """

    schedule: str = "sd"
    prediction: str = "epsilon"

    def __post_init__(self):
        require(self.schedule in ("sd", "sd_zero_snr", AUTO), "diffusion.schedule", self.schedule,
                 "choose sd or sd_zero_snr, or auto with weights")
        require(self.prediction in ("epsilon", "v", "x0", AUTO), "diffusion.prediction",
                 self.prediction, "choose epsilon, v or x0, or auto with weights")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices by axis; -1 takes what is left.

    Attributes:
      data: replicas of the parameters; each sees its share of the batch.
      fsdp: shards of the parameters, the optimiser and the average; these share the batch too.
    """

    data: int = -1
    fsdp: int = 1

    def __post_init__(self):
        sizes = (self.data, self.fsdp)
        require(all(s == -1 or s > 0 for s in sizes) and sizes.count(-1) <= 1, "mesh",
                 {"data": self.data, "fsdp": self.fsdp}, "sizes are above 0, at most one is -1")
