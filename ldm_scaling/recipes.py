"""Recipes that several files in `configs/` share: the paper's training of one member."""

from __future__ import annotations

from collections.abc import Iterable

import ml_collections

from ldm_scaling import config as config_lib
from ldm_scaling.errors import UserError
from ldm_scaling.models import backbone_tables, zoo

# What of a member is computed again in the backward pass, so that it fits all of launch/plans.
_REMAT = {"mmdit_30": "block", "mmdit_38": "block"}
# What stands for each family on a CPU.
_SMALLEST = {"unet": "c8", "dit": "dit_w40", "sit": "sit_w40", "uvit": "uvit_w32",
             "mmdit": "mmdit_d5", "edm2": "edm2_c14"}
# Training steps that a member is measured after, before its end. Sampling steps of Fig. 7 and 8.
_EARLY = (10_000, 25_000, 50_000, 100_000, 200_000)
_STEPS = (4, 6, 8, 10, 20, 50)


def text_to_image(member: str, arg: str = "") -> ml_collections.ConfigDict:
    """The training of arXiv 2404.01367 for one member of Table 1, and its sweep.

    Theirs: 500k steps, batch 2048, learning rate 1e-4, pictures of 512 px in latents of 64x64x4,
    50-step DDIM at guidance 7.5, and the grids of Fig. 8, 9 and 11 (DDIM to 500 steps, DDPM to 50,
    DPM-Solver++ to 20) on two blocks of 30k samples. Not stated there, so ours: AdamW, 10k steps of
    warm-up and then a constant rate (as Stable Diffusion's model card), EMA of 0.9999, 10% of
    captions dropped, the autoencoder's training, and the checkpoints that Fig. 3 is drawn through:
    of 10k, 25k, 50k, 100k and 200k steps, measured by 50-step DDIM.

    On disk a checkpoint takes 16 bytes a parameter, 14 GB of 866M and 78 GB of 5B, and seven are
    kept. Measuring takes 24% of the operations of training: 4% along the run, 19% at its end, of
    which nearly half for 500 steps. Racing (--config.sweep.strategy=racing) makes it 8%.

    Not to be had: their 600M image-text pairs, their text encoder, COCO. A million composed
    pictures with MiniLM's text states (widened with zeros to 1024) stand in; their caches take
    about 125 GB, see  ldm-scaling prepare --dry-run. Nearer to the paper, on pairs of your own, are
    --config.data.source=shards:DIR, --config.autoencoder.weights=DIR (Stable Diffusion's) and
    --config.data.text_weights=DIR (of a text encoder of width 1024, such as OpenCLIP's ViT-H/14).

    Args:
      member: its name in the zoo.
      arg: what follows the colon of `--config=FILE:`; `local` trains the smallest member for a
        few steps on a CPU, in a minute or two, to see that everything runs.
    Raises:
      UserError: for another argument.
    """
    if arg not in ("", "local"):
        raise UserError(f"config argument {arg!r}: choose local, or none")
    config = config_lib.default()
    config.name = f"t2i_{member}"
    config.members = (member,)
    config.reference = "866m"

    config.data.side = 512
    config.data.train_pictures = 1_000_000
    config.data.validation_pictures = 60_000
    config.data.text_length = 77
    config.data.latent_dtype = "float16"

    config.autoencoder.kl_weight = kl_weight(config.data.side)
    run = config.autoencoder.train
    run.steps = 100_000
    run.batch_size = 256
    run.learning_rate = 1e-4
    run.warmup_steps = 1_000
    run.ema_decay = 0.999

    config.diffusion.schedule = "sd"
    config.diffusion.prediction = "epsilon"
    run = config.train
    run.steps = 500_000
    run.batch_size = 2_048
    run.learning_rate = 1e-4
    run.warmup_steps = 10_000
    run.ema_decay = 0.9999
    run.caption_dropout = 0.1
    run.keep_steps = _EARLY
    run.remat = _REMAT.get(member, "none")
    config.mesh.data = 1
    config.mesh.fsdp = -1

    config.sample.sampler = "ddim"
    config.sample.steps = 50
    config.sample.guidance = 7.5
    config.sweep.steps = (*_STEPS, 100, 250, 500)
    config.sweep.max_steps = {"ddpm": 50, "dpmpp_2m": 20}
    config.sweep.guidance = (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
    config.sweep.num_images = 30_000
    config.sweep.batch_size = 256
    config.early.sampler, config.early.steps = "ddim", 50

    if zoo.family_of(member) == "sit":
        straight(config)
    if arg == "local":
        _shrink(config, _SMALLEST.get(zoo.family_of(member), member))
    return config


def straight(config: ml_collections.ConfigDict) -> None:
    """SiT's training (Ma et al. 2024, arXiv 2401.08740): the linear interpolant, whose velocity is
    predicted, at timesteps that are even. Samples start at the last one, pure noise."""
    config.diffusion.schedule = "flow"
    config.diffusion.prediction = "flow"
    config.sample.spacing = "trailing"
    config.sweep.spacing = "trailing"


def _from_noise(config: ml_collections.ConfigDict, part: ml_collections.ConfigDict) -> None:
    """What goes on from a SiT is drawn from pure noise too."""
    if config.diffusion.schedule == "flow":
        part.sample.spacing = part.sweep.spacing = config.sample.spacing


def kl_weight(side: int) -> float:
    """LDM's 1e-6 of loss terms that are summed over a picture of this side, for their means."""
    return 1e-6 / (3 * side**2)


def demo(name: str) -> ml_collections.ConfigDict:
    """What the demos share: all that decides the networks of configs/demo.py, so that one workdir
    may serve those that go on from them. Others set what they have otherwise.

    Pictures of 32 px composed of pictograms, an autoencoder and U-Nets that two CPU cores train in
    a minute or two each, and a sweep of a few hundred configurations.

    Args:
      name: of the study.
    """
    config = config_lib.default()
    config.name = name

    config.data.side = 32
    config.data.train_pictures = 10_000
    config.data.validation_pictures = 2_000
    config.data.text_length = 18

    config.autoencoder.base_channels = 16
    config.autoencoder.channel_mults = (1, 2, 2)
    config.autoencoder.blocks_per_level = 1
    config.autoencoder.groups = 8
    run = config.autoencoder.train
    run.steps = 1000
    run.batch_size = 32
    run.learning_rate = 2e-3
    run.warmup_steps = 50
    run.ema_decay = 0.995

    config.diffusion.prediction = "v"
    run = config.train
    run.steps = 600
    run.batch_size = 64
    run.learning_rate = 2e-3
    run.warmup_steps = 50
    run.ema_decay = 0.995

    for run in (config.autoencoder.train, config.train):
        run.log_every = 20
        run.validate_every = 200
        run.checkpoint_every = 200
        run.sample_every = 400

    config.sample.steps = 20
    config.sample.spacing = "trailing"
    config.sample.guidance = 2.0
    config.sweep.steps = (1, 2, 4, 10, 50)
    config.sweep.guidance = (1.0, 2.0, 4.0, 8.0)
    config.sweep.num_images = 128
    config.sweep.batch_size = 64
    config.sweep.feature_side = 96
    config.sweep.spacing = "trailing"
    return config


def tiny(
    config: ml_collections.ConfigDict, *members: str, pictures: int = 64,
    runs: Iterable[ml_collections.ConfigDict] = (),
    samples: Iterable[ml_collections.ConfigDict] = (),
    sweeps: Iterable[ml_collections.ConfigDict] = (), **training: int,
) -> None:
    """Makes of a demo what goes the same ways in a minute, for tests: its pictures are noise.

    Args:
      config: to be changed.
      members: that it has; the last is of cost 1.
      pictures: to train on.
      runs, samples, sweeps: parts of the config, beside its own `train`, `sample` and `sweep`.
      training: keys of all runs that are other here, such as `sample_every=0`.
    """
    config.members = members
    config.reference = members[-1]
    config.data.train_pictures = pictures
    config.data.validation_pictures = 32
    config.autoencoder.base_channels = 8
    short = {"steps": 4, "batch_size": 16, "warmup_steps": 2, "log_every": 2, "validate_every": 4,
             "checkpoint_every": 4, "sample_every": 4, **training}
    for run in (config.autoencoder.train, config.train, *runs):
        run.update(short)
    for sample in (config.sample, *samples):
        sample.steps = 2
        sample.num_images = 4
    for sweep in (config.sweep, *sweeps):
        sweep.steps = (1, 2)
        sweep.guidance = (1.5, 3.0)
        sweep.num_images = 16
        sweep.batch_size = 16
        sweep.replicates = 20
        sweep.feature_side = 32


def conditioned(task: str, arg: str = "") -> ml_collections.ConfigDict:
    """The fine-tuning of one network of configs/t2i_*.py for an image-conditioned task, as section
    3.2 of arXiv 2404.01367 has it for super-resolution.

    Theirs: the condition's latents beside the noise, 50-step DDIM without guidance, steps from 4 to
    250, quality over fine-tuning compute. Not stated there, so ours: batch 256, learning rate 5e-5
    after 1k steps of warm-up, 50k steps measured at five lengths, EMA of 0.999.

    The member is that of a study which has trained it, --config.finetune.pretrained=WORKDIR, or
    --config.weights=DIR, a published Stable Diffusion; without either it is trained here first. The
    images are those of the config's data: give photographs of your own by --config.data.source=
    photos:DIR or shards:DIR; they need no captions.

    Args:
      task: a name of `data.conditions.table`.
      arg: the member's name in the zoo, 866m if empty; `MEMBER,local`, or `local`, is a small arm
        for a CPU.
    Raises:
      UserError: for another argument.
    """
    member, small = _member(arg)
    config = text_to_image(member, "local" if small else "")
    config.name = f"{task}_local" if small else f"{task}_{member}"
    config.early.sampler = ""
    tune = config.finetune
    tune.task = task
    _from_noise(config, tune)
    tune.budgets = (2_000, 5_000, 10_000, 20_000, 50_000)
    run = tune.train
    run.steps = 50_000
    run.batch_size = 256
    run.learning_rate = 5e-5
    run.warmup_steps = 1_000
    run.ema_decay = 0.999
    run.remat = config.train.remat
    if small:
        tune.budgets = (2, 4)
        run.steps = 4
        run.batch_size = 16
        run.warmup_steps = 1
        run.log_every = run.validate_every = run.checkpoint_every = 2
        run.sample_every = 4
        tune.sample.steps = 2
        tune.sample.num_images = 4
        tune.sweep.steps = (1, 2)
        tune.sweep.num_images = 16
        tune.sweep.batch_size = 16
        tune.sweep.replicates = 20
        tune.sweep.feature_side = 64
    return config


def distilled(method: str, arg: str = "") -> ml_collections.ConfigDict:
    """The distillation of one network of configs/t2i_*.py, as section 3.4 of arXiv 2404.01367 has
    it for `codi` (its Fig. 13) and `guided` (its Fig. 19).

    Stated there: the method, 4 steps, the best guidance rate; for guided distillation students of
    16, 8 and 4 steps. Not stated there, so ours, after the methods' own papers and public code:

    - codi: v, learnt from the teacher's epsilon in 10k steps first; 200k steps at learning rate
      1e-5, EMA of 0.999, 20 timesteps between the points (the public code's, of a ControlNet).
    - lcm: 100k steps at 8e-6, EMA of 0.999943, guidance rates from 3 to 15, 20 timesteps (Luo et
      al. 2023).
    - guided: rates from 1.5 to 15, so that the paper's are among them; 50k steps to imitate
      guidance, then 50k for each halving, the rate falling to 0 (Salimans & Ho 2022's number).
    - progressive: v, learnt first; then as guided. Its students are guided by two evaluations.

    A SiT's students say flow, as it does, where others' say v, and have nothing to learn first.
    Batches hold 256. The workdir is that of the study that trained the member; or give
    --config.weights=DIR, a published Stable Diffusion, which is its own teacher.

    Args:
      method: `codi`, `lcm`, `guided` or `progressive`.
      arg: as `conditioned`'s.
    Raises:
      UserError: for another argument.
    """
    member, small = _member(arg)
    config = text_to_image(member, "local" if small else "")
    config.name = f"{method}_local" if small else f"{method}_{member}"
    config.early.sampler = ""
    config.sweep.samplers = ("ddim",)
    if not small:  # Teachers in more steps are no match for students.
        config.sweep.steps = _STEPS
    # Students of halving have trailing nodes; so have those that they are held against.
    config.sweep.spacing = "trailing"
    halves = method in ("guided", "progressive")
    part = config.halving if halves else config.consistency
    part.method = method
    rates = tuple(config.sweep.guidance)
    part.sweep.guidance = rates
    part.sample.guidance = 3.0
    if method != "lcm" and config.diffusion.prediction == "epsilon":
        part.prediction = "v"
    if halves:
        part.sample.spacing = "trailing"
    if method == "codi":
        _from_noise(config, part)
        part.train.steps = 200_000
        part.imitation.steps = 10_000
    if method == "lcm":
        part.rates = (3.0, 15.0)
        part.train.steps = 100_000
        part.train.learning_rate = 8e-6
        part.train.ema_decay = 0.999943
        part.sample.sampler = "lcm"
        part.sweep.samplers = ("lcm",)
        part.sweep.guidance = tuple(w for w in rates if w >= 3)
    if halves:
        part.rates = (1.5, 15.0)
        part.sweep.steps = (4, 6, 8, 10)
        part.train.learning_rate = 5e-5
        part.imitation.learning_rate = 5e-5
        if method == "progressive":
            part.imitation.steps = 10_000
    for run in (part.imitation, part.train):
        run.remat = config.train.remat
    if small:
        _shrink_distilled(part)
    for name in ("num_images", "batch_size", "replicates", "feature_side"):
        part.sweep[name] = config.sweep[name]
    return config


def _member(arg: str) -> tuple[str, bool]:
    """The member that an argument names, and whether it asks for a small arm."""
    member, _, rest = arg.partition(",")
    if member == "local" and not rest:
        member, rest = "", "local"
    member = member or "866m"
    names = [m.name for m in (*zoo.PAPER, *backbone_tables.LARGE)]
    if member not in names or rest not in ("", "local"):
        raise UserError(
            f"config argument {arg!r}: choose one of {', '.join(names)}, or that and ,local")
    return member, bool(rest)


def _shrink_distilled(part: ml_collections.ConfigDict) -> None:
    part.guidance_dim = 8
    for run in (part.imitation, part.train):
        run.steps = 4
        run.batch_size = 16
        run.warmup_steps = 1
        run.log_every = run.validate_every = run.checkpoint_every = 2
        run.sample_every = 4
    if "steps" in part:  # Of halving.
        part.steps = (2, 1)
    part.sample.steps = 2
    part.sample.num_images = 4
    part.sweep.steps = (1, 2)
    part.sweep.guidance = (3.0, 7.5)


def _shrink(config: ml_collections.ConfigDict, member: str) -> None:
    """The same code paths at a size that a CPU trains in seconds."""
    config.name += "_local"
    config.members = (member,)
    config.reference = member
    config.data.side = 32
    config.data.train_pictures = 64
    config.data.validation_pictures = 32
    config.data.text_length = 16
    config.autoencoder.base_channels = 8
    config.autoencoder.channel_mults = (1, 1, 1)
    config.autoencoder.blocks_per_level = 1
    config.autoencoder.groups = 4
    config.autoencoder.kl_weight = kl_weight(config.data.side)
    config.train.keep_steps = (3,)
    for run in (config.autoencoder.train, config.train):
        run.steps = 6
        run.batch_size = 16
        run.warmup_steps = 2
        run.remat = "none"
        run.log_every = 1
        run.validate_every = 3
        run.checkpoint_every = 3
        run.sample_every = 6
    config.sample.steps = 2
    config.sample.num_images = 4
    config.sweep.steps = (1, 2)
    config.early.steps = 2
    config.sweep.guidance = (1.5, 7.5)
    config.sweep.num_images = 16
    config.sweep.batch_size = 16
    config.sweep.replicates = 20
    config.sweep.feature_side = 64
