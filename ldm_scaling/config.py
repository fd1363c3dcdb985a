"""The settings of a study: frozen dataclasses inside, an `ml_collections.ConfigDict` at the edge.

`default()` gives the locked ConfigDict that a file in `configs/` fills in, so a misspelt key fails
there; `parse` turns it into a validated `Study` once, and nothing else in the package sees a
ConfigDict. The dataclasses are the reference of every key.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from typing import Any

import ml_collections

from ldm_scaling import files
from ldm_scaling.errors import UserError

# A value of `Diffusion` that the weights of a published model decide.
AUTO = "auto"


def _require(condition: bool, name: str, value: Any, remedy: str) -> None:
    if not condition:
        raise UserError(f"config: {name}={value!r}: {remedy}")


def _positive(obj: Any, *names: str) -> None:
    for name in names:
        value = getattr(obj, name)
        _require(value > 0, f"{type(obj).__name__.lower()}.{name}", value, "must be above 0")


@dataclasses.dataclass(frozen=True)
class Data:
    """The pictures.

    Attributes:
      source: `openmoji`, pictograms composed into captioned pictures.
      side: side of a picture in pixels.
      train_pictures, validation_pictures: how many; the two share no concept.
      seed: what they are composed from.
      text_length: tokens of a caption, longer ones are cut.
    """

    source: str = "openmoji"
    side: int = 32
    train_pictures: int = 100_000
    validation_pictures: int = 10_000
    seed: int = 0
    text_length: int = 20

    def __post_init__(self):
        _positive(self, "side", "train_pictures", "validation_pictures")
        _require(self.source == "openmoji", "data.source", self.source, "choose openmoji")
        _require(16 <= self.side <= 1024, "data.side", self.side, "use 16..1024")
        _require(self.seed >= 0, "data.seed", self.seed, "not below 0")
        _require(3 <= self.text_length <= 512, "data.text_length", self.text_length, "use 3..512")


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
        _positive(self, "steps", "batch_size", "learning_rate", "clip_norm", "log_every",
                  "checkpoint_every", "keep")
        for name in ("warmup_steps", "weight_decay", "validate_every", "sample_every"):
            _require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "not below 0")
        for name in ("beta1", "beta2", "ema_decay", "caption_dropout"):
            _require(0 <= getattr(self, name) < 1, f"train.{name}", getattr(self, name),
                     "must lie in [0, 1)")
        _require(self.compute_dtype in ("auto", "float32", "bfloat16"), "train.compute_dtype",
                 self.compute_dtype, "choose auto, float32 or bfloat16")
        _require(self.remat in ("none", "block"), "train.remat", self.remat, "choose none or block")


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """The first stage: the network (see `models.autoencoder.AutoencoderSpec`), its loss, its run.

    Attributes:
      base_channels, channel_mults, blocks_per_level, latent_channels, groups, mid_attention: the
        network; latents have 1 / 2 ** (levels - 1) of a picture's side.
      kl_weight: of the KL term (summed over a latent, averaged over pixel values).
      structure_weight: of the Laplacian-pyramid term.
      train: the run.
    """

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
        _require(self.kl_weight >= 0, "autoencoder.kl_weight", self.kl_weight, "not below 0")
        _require(self.structure_weight >= 0, "autoencoder.structure_weight",
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
        _require(self.schedule in ("sd", "sd_zero_snr", AUTO), "diffusion.schedule", self.schedule,
                 "choose sd or sd_zero_snr, or auto with weights")
        _require(self.prediction in ("epsilon", "v", "x0", AUTO), "diffusion.prediction",
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
        _require(all(s == -1 or s > 0 for s in sizes) and sizes.count(-1) <= 1, "mesh",
                 {"data": self.data, "fsdp": self.fsdp}, "sizes are above 0, at most one is -1")


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
        _positive(self, "steps", "num_images")


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
            _require(len(values) > 0, f"sweep.{name}", values, "give at least one")
            _require(len(set(values)) == len(values), f"sweep.{name}", values, "has a value twice")
        _require(all(s >= 1 for s in self.steps), "sweep.steps", self.steps, "must be at least 1")
        _require(all(math.isfinite(g) for g in self.guidance), "sweep.guidance", self.guidance,
                 "must be finite")
        _require(all(n >= 1 for n in self.max_steps.values()), "sweep.max_steps", self.max_steps,
                 "must be at least 1")
        _positive(self, "num_images", "batch_size", "feature_side", "replicates")
        _require(self.feature_side >= 32, "sweep.feature_side", self.feature_side, "at least 32")
        _require(self.num_images >= 4, "sweep.num_images", self.num_images,
                 "at least 4, or there is no interval")
        _require(self.select_block != self.report_block, "sweep.report_block", self.report_block,
                 "must differ from sweep.select_block, or the choice of guidance biases the report")
        _require(self.select_block >= 0 and self.report_block >= 0, "sweep.select_block",
                 (self.select_block, self.report_block), "blocks are not below 0")


@dataclasses.dataclass(frozen=True)
class Study:
    """Everything.

    Attributes:
      name: of the study, in titles.
      seed: of every training run.
      members: names of the family's members, see `ldm-scaling zoo`.
      reference: the member whose cost is 1.
      weights: folder of a published Stable Diffusion, see `models.sd_folder`: it is the only
        member, under any name, and nothing is trained. Empty where members are trained.
      weights_hash: of the folder's files. Filled in when the folder is read; given, it is what
        they must have.
      data, autoencoder, diffusion, train, mesh, sample, sweep: see their classes.
    """

    name: str = "study"
    seed: int = 0
    members: tuple[str, ...] = ("866m",)
    reference: str = "866m"
    weights: str = ""
    weights_hash: str = ""
    data: Data = dataclasses.field(default_factory=Data)
    autoencoder: Autoencoder = dataclasses.field(default_factory=Autoencoder)
    diffusion: Diffusion = dataclasses.field(default_factory=Diffusion)
    train: Train = dataclasses.field(default_factory=Train)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    sample: Sample = dataclasses.field(default_factory=Sample)
    sweep: Sweep = dataclasses.field(default_factory=Sweep)

    def __post_init__(self):
        _require(len(self.members) > 0, "members", self.members, "give at least one")
        _require(len(set(self.members)) == len(self.members), "members", self.members,
                 "has a name twice")
        if self.weights:
            _require(len(self.members) == 1, "members", self.members,
                     f"weights={self.weights!r} is one network: give one name for it")
        for name in ("schedule", "prediction"):
            value = getattr(self.diffusion, name)
            _require(bool(self.weights) or value != AUTO, f"diffusion.{name}", value,
                     "only weights decide it: give a value, or --config.weights=DIR, the folder of "
                     "a published model, such as that of https://huggingface.co/"
                     "stable-diffusion-v1-5/stable-diffusion-v1-5")
        for name, run in (("autoencoder.train", self.autoencoder.train), ("train", self.train)):
            fits = bool(self.weights) or run.batch_size <= self.data.train_pictures
            _require(fits, f"{name}.batch_size", run.batch_size,
                     f"more than data.train_pictures={self.data.train_pictures}")
        _require(self.autoencoder.train.remat == "none", "autoencoder.train.remat",
                 self.autoencoder.train.remat, "the autoencoder has no blocks to recompute: none")
        blocks = max(self.sweep.select_block, self.sweep.report_block) + 1
        _require(self.sweep.num_images * blocks <= self.data.validation_pictures,
                 "data.validation_pictures", self.data.validation_pictures,
                 f"the sweep's {blocks} blocks of {self.sweep.num_images} prompts need at least "
                 f"{self.sweep.num_images * blocks}")

    def identity(self) -> dict[str, Any]:
        """What a workdir is bound to: all that decides a trained network or a record's numbers.

        Members, the sweep's grid and bookkeeping are free: a record's own key tells them apart,
        so a sweep can be widened in the same workdir.
        """
        tree = dataclasses.asdict(self)
        for run in (tree["train"], tree["autoencoder"]["train"]):
            for name in ("log_every", "validate_every", "checkpoint_every", "sample_every", "keep"):
                del run[name]
        kept = ["seed", "reference", "data", "autoencoder", "diffusion", "train"]
        if self.weights:  # Nothing is trained.
            tree["train"] = {"compute_dtype": self.train.compute_dtype}
            kept = ["weights_hash", *(key for key in kept if key != "autoencoder")]
        # The roles of the blocks too: only the reported one's records hold intervals.
        fixed = ("replicates", "feature_side", "select_block", "report_block")
        sweep = {k: tree["sweep"][k] for k in fixed}
        return {k: tree[k] for k in kept} | {"sweep": sweep}

    def training_hash(self, member: str | None) -> str:
        """Hash of all that decides a network: the autoencoder's, or a member's."""
        tree = self.identity()
        if self.weights:
            kept = ("seed", "data", "diffusion", "train", "weights_hash")
            return files.sha256_of({k: tree[k] for k in kept})
        kept = {k: tree[k] for k in ("seed", "data", "autoencoder")}
        del kept["autoencoder"]["train"]["caption_dropout"]
        if member is not None:
            kept |= {"member": member, "diffusion": tree["diffusion"], "train": tree["train"]}
        return files.sha256_of(kept)


def _to_dict(cls: type, instance: Any) -> ml_collections.ConfigDict:
    out = ml_collections.ConfigDict()
    for field in dataclasses.fields(cls):
        value = getattr(instance, field.name)
        if dataclasses.is_dataclass(value):
            value = _to_dict(type(value), value)
        elif isinstance(value, dict):
            value = ml_collections.ConfigDict(value)
        out[field.name] = value
    return out


def default() -> ml_collections.ConfigDict:
    """The locked ConfigDict of all keys, at the paper's recipe where it gives one."""
    config = _to_dict(Study, Study())
    config.lock()
    config.sweep.max_steps.unlock()
    return config


def _coerce(name: str, kind: Any, value: Any) -> Any:
    """`value` as `kind`, or a `UserError`: JSON and flags blur tuples, lists, ints and floats."""
    origin = typing.get_origin(kind)
    if origin is tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            value = (value,)
        item = typing.get_args(kind)[0]
        return tuple(_coerce(f"{name}[{i}]", item, v) for i, v in enumerate(value))
    if origin is dict:
        item = typing.get_args(kind)[1]
        return {str(k): _coerce(f"{name}.{k}", item, v) for k, v in dict(value).items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise UserError(f"config: {name}={value!r} should be a {kind.__name__}")
    return value


def _build(cls: type, tree: Any, where: str) -> Any:
    kinds = typing.get_type_hints(cls)
    for key in tree:
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1)
            hint = f"did you mean {where}{near[0]}?" if near else f"known: {', '.join(kinds)}"
            raise UserError(f"config: unknown key {where}{key}; {hint}")
    values = {}
    for key, kind in kinds.items():
        if key not in tree:
            continue
        if dataclasses.is_dataclass(kind):
            values[key] = _build(kind, tree[key], f"{where}{key}.")
        else:
            values[key] = _coerce(f"{where}{key}", kind, tree[key])
    return cls(**values)


def parse(config: ml_collections.ConfigDict | dict[str, Any]) -> Study:
    """Validates a ConfigDict (or a plain dict) into a `Study`.

    Raises:
      UserError: naming the key, its value and what it may be; for an unknown key the nearest name.
    """
    tree = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    return _build(Study, tree, "")
