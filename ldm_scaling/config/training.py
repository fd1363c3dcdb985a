"""What is trained, and how."""

from __future__ import annotations

import dataclasses
import itertools
import re

from ldm_scaling.config import named
from ldm_scaling.config.check import positive, require

# A value of `Diffusion` that the weights of a published model decide.
AUTO = "auto"
# Keys of `Train` that decide no number of a run: a workdir is not bound to them.
BOOKKEEPING = (
    "log_every", "validate_every", "checkpoint_every", "sample_every", "keep", "keep_every",
    "keep_best", "keep_metric", "keep_steps", "checkpoint_patience", "stall_seconds",
    "profile_steps", "attention", "averages", "averages_every",
)
# Keys that decide numbers, but came later: at these values a run is what it was without them.
NEUTRAL = {"micro_batches": 1, "moment_dtype": "float32", "learning_rate_decay": "none",
           "ema_ramp": True, "width_transfer": "none", "base_member": "", "optimizer": "adamw",
           "rate_factors": ()}
LENGTHS = (0.005, 0.285)
"""Shortest and longest average, as `Train.averages`: its relative standard deviation. A plain mean
over all of a run has 1 / root 12 = 0.289."""
SNAPSHOTS = 16
"""Of the averages in a run, where `Train.averages_every` is not given."""
NEUTRAL_DIFFUSION = {"timesteps": "uniform", "weighting": "none"}


@dataclasses.dataclass(frozen=True)
class Train:
    """One training run: clipping by norm, an optimiser, linear warm-up, a rate's decay, EMA.

    Attributes:
      steps: optimiser steps.
      batch_size: examples a step, over all devices.
      learning_rate: after the warm-up.
      warmup_steps: steps of linear warm-up, fewer than `steps`.
      learning_rate_decay: from there on: `none`; `linear` or `cosine`, to 0 at the last step;
        `wsd` (warm-up, stable, decay: to 0 over the last `share` of the steps) or `inverse_sqrt`
        (from step `after` on), see `training.optimizer`.
      optimizer: `adamw` or `lion`, see `training.optimizer`. It and the decay take options, as in
        `wsd:share=0.1`, see `config.named`.
      rate_factors: REGEX=FACTOR of parameters that take smaller steps, or with 0 none: the first
        whose expression is found in a parameter's path, as `mid_res_0/conv1/kernel`, counts.
      width_transfer: `none`, or `mup`: first weights and rates such that a rate that is best at one
        width is best at others, see `models.width`. Of `Study.train` alone.
      base_member: with `mup` the member at whose width nothing changes, such as the one that the
        rate was chosen for.
      weight_decay: decoupled, times the learning rate, see `training.optimizer.decays` for of what.
      beta1, beta2: the optimiser's.
      clip_norm: largest global norm of the gradient.
      ema_decay: of the averaged parameters.
      ema_ramp: whether a run's first average is shorter: over a tenth of the run so far. A run that
        starts from trained parameters needs none.
      averages: lengths of averages that are tracked beside, from which those of other lengths are
        made after training, see `training.averages`: relative standard deviations, EDM2's are 0.05
        and 0.1. Of `Study.train` alone.
      averages_every: steps between two snapshots of them; 0 is a sixteenth of the run. There is one
        at the last step and at `keep_steps` too, and training waits for each.
      caption_dropout: share of captions replaced by the empty one (not of autoencoders).
      compute_dtype: `float32`, `bfloat16`, or `auto`: bfloat16 on TPU and GPU, float32 on a CPU.
        Pictures are encoded in float32 under `auto`. It is the type of operands: what multiplies
        float32 ones on a TPU or GPU rounds them (to bfloat16, to TF32), unless
        JAX_DEFAULT_MATMUL_PRECISION=highest is set.
      remat: `none` or `block`: what is computed again in the backward pass rather than kept.
      attention: `auto`, or `plain`, `chunked`, `splash` (TPU), `cudnn` (GPU) wherever its shapes
        allow it, see `models.attention`. Of an autoencoder `auto` is `plain`, and `chunked` is the
        other choice.
      micro_batches: parts that a batch is worked off in, one after the other: memory for time.
      moment_dtype: of the optimiser's first moment, `float32` or `bfloat16`.
      log_every, validate_every, checkpoint_every, sample_every: in steps; 0, of validate_every and
        sample_every, is never. A run's last step always does all that are not 0.
      keep: newest checkpoints kept.
      keep_every: checkpoints of these steps are kept for ever; 0 is none.
      keep_best: best checkpoints kept, by `keep_metric`; 0 is none.
      keep_metric: a validation scalar, lower is better: `loss`, and of an autoencoder `l1`.
      keep_steps: checkpoints of these steps, none beyond `steps`, are written and kept for ever,
        whatever `checkpoint_every` is; training waits for each.
      checkpoint_patience: steps that may be at stake while checkpoints cannot be written, then the
        run stops; 0 is twice `checkpoint_every`. At a step of `keep_steps`, which could not be made
        later, it stops after ten minutes, as at its last.
      stall_seconds: without a finished step, after which the process ends itself so that a launcher
        starts it again; 0 is never. What compiles has 4 times as long.
      profile_steps: first and last step of a window, within `steps`, that `jax.profiler` records;
        empty is none.
    """

    steps: int = 500_000
    batch_size: int = 2_048
    learning_rate: float = 1e-4
    warmup_steps: int = 10_000
    learning_rate_decay: str = "none"
    optimizer: str = "adamw"
    rate_factors: tuple[str, ...] = ()
    width_transfer: str = "none"
    base_member: str = ""
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    clip_norm: float = 1.0
    ema_decay: float = 0.9999
    ema_ramp: bool = True
    averages: tuple[float, ...] = ()
    averages_every: int = 0
    caption_dropout: float = 0.1
    compute_dtype: str = "auto"
    remat: str = "none"
    attention: str = "auto"
    micro_batches: int = 1
    moment_dtype: str = "float32"
    log_every: int = 100
    validate_every: int = 5_000
    checkpoint_every: int = 5_000
    sample_every: int = 10_000
    keep: int = 2
    keep_every: int = 0
    keep_best: int = 0
    keep_metric: str = "loss"
    keep_steps: tuple[int, ...] = ()
    checkpoint_patience: int = 0
    stall_seconds: float = 900.0
    profile_steps: tuple[int, ...] = ()

    def __post_init__(self):
        positive(self, "steps", "batch_size", "learning_rate", "clip_norm", "log_every",
                  "checkpoint_every", "keep", "micro_batches")
        for name in ("warmup_steps", "weight_decay", "validate_every", "sample_every", "keep_every",
                     "keep_best", "stall_seconds", "averages_every"):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "not below 0")
        require(self.keep_every % self.checkpoint_every == 0, "train.keep_every", self.keep_every,
                 f"a multiple of checkpoint_every={self.checkpoint_every}: others are not written")
        require(not self.keep_best or 0 < self.validate_every, "train.keep_best", self.keep_best,
                 "the best are found by validation: set validate_every")
        require(not self.keep_best or not self.checkpoint_every % self.validate_every,
                 "train.checkpoint_every", self.checkpoint_every, "with keep_best a multiple of "
                 f"validate_every={self.validate_every}: a checkpoint's metric is of its own step")
        require(self.checkpoint_patience == 0 or self.checkpoint_patience > self.checkpoint_every,
                 "train.checkpoint_patience", self.checkpoint_patience,
                 f"above checkpoint_every={self.checkpoint_every}, or 0")
        require(all(0 < step <= self.steps for step in self.keep_steps), "train.keep_steps",
                 self.keep_steps, f"steps are above 0 and at most steps={self.steps}: leave out "
                 "others")
        window = self.profile_steps
        require(not window or (len(window) == 2 and 0 < window[0] <= window[1]),
                 "train.profile_steps", window, "the first and the last step, or nothing")
        require(not window or window[1] <= self.steps, "train.profile_steps", window,
                 f"at most steps={self.steps}")
        self._check_averages()
        for name in ("beta1", "beta2", "ema_decay", "caption_dropout"):
            require(0 <= getattr(self, name) < 1, f"train.{name}", getattr(self, name),
                     "must lie in [0, 1)")
        require(self.compute_dtype in ("auto", "float32", "bfloat16"), "train.compute_dtype",
                 self.compute_dtype, "choose auto, float32 or bfloat16")
        require(self.remat in ("none", "block"), "train.remat", self.remat, "choose none or block")
        require(self.attention in ("auto", "plain", "chunked", "splash", "cudnn"),
                 "train.attention", self.attention, "choose auto, plain, chunked, splash or cudnn")
        require(self.warmup_steps < self.steps, "train.warmup_steps", self.warmup_steps,
                 f"below steps={self.steps}, or training ends before it is at learning_rate="
                 f"{self.learning_rate:g}: lower it with the steps")
        self._check_named()
        require(self.width_transfer in ("none", "mup"), "train.width_transfer",
                 self.width_transfer, "choose none or mup")
        require((self.width_transfer == "mup") == bool(self.base_member), "train.base_member",
                 self.base_member, "name a member with width_transfer=mup, and none without")
        require(self.moment_dtype in ("float32", "bfloat16"), "train.moment_dtype",
                 self.moment_dtype, "choose float32 or bfloat16")
        require(self.batch_size % self.micro_batches == 0, "train.micro_batches",
                 self.micro_batches, f"it must divide batch_size={self.batch_size}")

    def _check_averages(self) -> None:
        spelt = tuple(float(f"{length:g}") for length in self.averages)
        object.__setattr__(self, "averages", spelt)
        low, high = LENGTHS
        require(all(low <= length <= high for length in spelt), "train.averages", spelt,
                f"lengths are relative standard deviations from {low:g} to {high:g}, such as "
                "(0.05, 0.1)")
        require(len(set(spelt)) == len(spelt), "train.averages", spelt, "has a length twice")
        for a, b in itertools.pairwise(sorted(spelt)):
            require(b >= 1.05 * a, "train.averages", spelt, f"{a:g} and {b:g} are nearly one: "
                    "lengths that give others are apart by 5% at least, as 0.05 and 0.1 are")
        require(not self.averages_every or bool(spelt), "train.averages_every", self.averages_every,
                "of which averages? name their lengths, train.averages=(0.05, 0.1), or give 0")

    def _check_named(self) -> None:
        for name, known in (("optimizer", named.OPTIMIZERS),
                            ("learning_rate_decay", named.DECAYS)):
            spelt = named.spell(*named.parse(f"train.{name}", getattr(self, name), known), known)
            object.__setattr__(self, name, spelt)
        for text in self.rate_factors:
            require(_factor(text) is not None, "train.rate_factors", text,
                    "write REGEX=FACTOR, a regular expression and a number that is not below 0")
        decay, options = self.decay
        warm, steps = self.warmup_steps, self.steps
        if decay == "inverse_sqrt":
            require(warm <= options["after"] < steps, "train.learning_rate_decay",
                     self.learning_rate_decay, f"the rate falls from step after="
                     f"{options['after']:g}: not within warmup_steps={warm}, and before steps="
                     f"{steps}")
        if decay == "wsd":
            cool = self.cooldown_steps
            require(0 < cool <= steps - warm, "train.learning_rate_decay", self.learning_rate_decay,
                     f"the last {cool} of steps={steps} are to cool down: at least one, and none "
                     f"of warmup_steps={warm}")

    @property
    def decay(self) -> tuple[str, dict[str, float]]:
        """The rate's decay and its options."""
        return named.parse("train.learning_rate_decay", self.learning_rate_decay, named.DECAYS)

    @property
    def factors(self) -> tuple[tuple[str, float], ...]:
        """`rate_factors`: expressions and their numbers."""
        return tuple(filter(None, map(_factor, self.rate_factors)))

    @property
    def cooldown_steps(self) -> int:
        """Steps over which `wsd` lets the rate fall."""
        return round(self.decay[1].get("share", 0.0) * self.steps)

    def snapshot_due(self, step: int) -> bool:
        """Whether a snapshot of the averages is written at a step."""
        every = self.averages_every or max(1, self.steps // SNAPSHOTS)
        kept = step == self.steps or step in self.keep_steps
        return bool(self.averages) and (kept or step % every == 0)

    @property
    def any_length(self) -> bool:
        """Whether a longer run takes the same steps first: its rate does not fall to its end."""
        return self.decay[0] in ("none", "inverse_sqrt")


def _factor(text: str) -> tuple[str, float] | None:
    pattern, _, number = text.rpartition("=")
    try:
        re.compile(pattern)
        factor = float(number)
    except (re.error, ValueError):
        return None
    return (pattern, factor) if pattern and 0 <= factor < float("inf") else None


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """The first stage: the network (see `models.autoencoder.AutoencoderSpec`), its loss, its run.

    Attributes:
      weights: of a published one, see `study.encoders`: nothing of the following counts then but
        `train.compute_dtype`, in which pictures are encoded. Empty where it is trained.
      weights_hash: of its parameters. Filled in when they are read; given, it is what they must
        have.
      base_channels, channel_mults, blocks_per_level, latent_channels, groups, mid_attention: the
        network; latents have 1 / 2 ** (levels - 1) of a picture's side.
      kl_weight: of the KL term, which is summed over a latent and averaged over pictures; the other
        terms are averaged over pixel values too. LDM sums all of them over a picture, with 1e-6:
        here that is 1e-6 / (3 side^2).
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
    train: Train = dataclasses.field(default_factory=lambda: Train(keep_metric="l1"))

    def __post_init__(self):
        require(self.kl_weight >= 0, "autoencoder.kl_weight", self.kl_weight, "not below 0")
        require(self.structure_weight >= 0, "autoencoder.structure_weight",
                 self.structure_weight, "not below 0")


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """The noise and what the network predicts.

    Attributes:
      schedule: `sd` (Stable Diffusion's), `sd_zero_snr`, `linear` (DDPM's), `cosine`, `flow`
        (rectified flow) or `edm`, see `diffusion.schedule`; `auto` is what `Study.weights` says.
      prediction: `epsilon`, `v`, `x0` or `flow`; `auto` likewise.
      timesteps: how often each is trained at: `uniform`, `shifted`, `logit_normal`, `mode` or
        `log_normal`, see `diffusion.timesteps`. Validation is even over all, whatever this is.
      weighting: of the loss by timestep: `none`, `min_snr`, `snr`, `sigma_sqrt`, `cosmap`, `p2` or
        `debiased`, see `diffusion.weighting`. Validation is not weighted.

    Distillation has timesteps and weights of its own: of these two it takes none.

    All but prediction take options, as in `flow:shift=3`, see `config.named`, and may be of one's
    own, see docs/samplers.md.
    """

    schedule: str = "sd"
    prediction: str = "epsilon"
    timesteps: str = "uniform"
    weighting: str = "none"

    def __post_init__(self):
        for name, known in (("schedule", named.SCHEDULES), ("timesteps", named.DENSITIES),
                            ("weighting", named.WEIGHTINGS)):
            value = getattr(self, name)
            if value != AUTO or name != "schedule":
                spelt = named.spell(*named.parse(f"diffusion.{name}", value, known), known)
                # One spelling of all that say the same: a workdir is bound to it.
                object.__setattr__(self, name, spelt)
        require(self.prediction in ("epsilon", "v", "x0", "flow", AUTO), "diffusion.prediction",
                 self.prediction, "choose epsilon, v, x0 or flow, or auto with weights")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices by axis; -1 takes what is left.

    Attributes:
      data: replicas of the parameters; each sees its share of the batch.
      fsdp: shards of the parameters, the optimiser and the average; these share the batch too.
      tensor: shards of a layer's channels and heads; these work on the same examples.
      slices: of a TPU pod, which hold whole replicas each; 0 is as many as there are.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slices: int = 0

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in ("data", "fsdp", "tensor")}
        require(all(s == -1 or s > 0 for s in sizes.values())
                 and list(sizes.values()).count(-1) <= 1, "mesh", sizes,
                 "sizes are above 0, at most one is -1")
        require(self.slices >= 0, "mesh.slices", self.slices, "not below 0")
