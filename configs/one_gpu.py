"""A study of 200,000 captioned pictures of your own on one GPU of 24 GB, or a host of few chips.

    ldm-scaling prepare --config=configs/one_gpu.py --source=folder:~/pictures --to=~/shards
    ldm-scaling study --config=configs/one_gpu.py --workdir=runs/mine \
        --config.data.source=shards:~/shards --config.autoencoder.weights=~/sd-vae-ft-mse

The autoencoder is a published one of 8 pixels a latent and 4 channels, here the folder of
https://huggingface.co/stabilityai/sd-vae-ft-mse. So may be the text encoder,
--config.data.text_weights=DIR, of width 1024 at most; MiniLM's states stand in for it. Without a
source 216,000 pictures are composed as the demo's are; without an autoencoder a narrow one is
trained first, for a third of the members' operations.

Pictures of 256 px in latents of 32x32x4, and of the paper's family the four smallest, with the
paper's loss and learning rate. 40,000 steps of 256 are 10 million examples: 56 passes over the
184,000 pictures of 200,000 that are not held back. The rate is constant after the warm-up, so that
the middle of a run is the end of a shorter one: its checkpoints are measured by 20-step DDIM, and
from 13,000 steps of the narrowest to its end all four have the same training compute at some
checkpoint, from 20,000 on with losses past the first tenth of a run (`law_isoflop`). A fifth size
makes laws surer: 318m_s32 may be added to `members` when the others are trained.

Guidance is raced for. Two blocks of 5,000 prompts fit in the pictures that are held back where
125,000 pairs or more are left by prepare; of fewer, lower `sweep.num_images` or raise
`data.prepare.validation_share`. Of a larger collection --config.data.train_pictures=0 takes all.

Hardware: a GPU of 24 GB. The step of 223m_s32, of 64 pictures at a time (`train.micro_batches`),
takes 12.8 GB of the 18.9 that JAX has of an RTX 4090, and 0.41 s at least: by `ldm-scaling plan
--config=configs/one_gpu.py --topology=rtx4090:1 --member=223m_s32 --kind=train`, not run. Stable
Diffusion's decoder takes 11 GB for the 64 pictures of `sweep.batch_size`. With more memory, or on a
v5e-8, --config.train.micro_batches=1. Caches take 20 GB of disk, twice that with text states of
width 1024, and checkpoints 50 GB.
Hours: estimated, not run. Training takes 3.2e18 operations, the sweep 0.7e18 and its decoding, in
float32, 0.5e18. At 35% of the peaks, which the 866M network reached on an H200, that is 24 on an
RTX 4090 (7 of them for training 223m_s32, of which the plan's bound is 4.6), 4 on an H100, 2 to 3
on a v5e-8. Narrow networks may well reach less.

`configs/one_gpu.py:tiny` is two small networks on a CPU for a few steps, for tests.
"""

from ldm_scaling import recipes
from ldm_scaling.errors import UserError


def get_config(arg: str = ""):
    if arg not in ("", "tiny"):
        raise UserError(f"configs/one_gpu.py:{arg}: the argument is one of: (none), tiny")
    config = recipes.text_to_image("39m_s32", "local" if arg else "")
    config.name = "one_gpu"
    config.sweep.strategy = "racing"

    if arg == "tiny":
        config.members = ("c8", "c12")
        config.reference = "c12"
        config.data.validation_pictures = 64
        config.sweep.num_images = 32
        config.sweep.saving = 1.0
        return config

    config.members = ("39m_s32", "83m_s32", "145m_s32", "223m_s32")
    config.reference = "866m_s32"

    config.data.side = 256
    config.data.train_pictures = 200_000
    config.data.validation_pictures = 16_000
    config.data.prepare.validation_share = 0.08

    config.autoencoder.base_channels = 64
    config.autoencoder.kl_weight = recipes.kl_weight(config.data.side)
    run = config.autoencoder.train
    run.steps = 50_000
    run.batch_size = 32
    run.micro_batches = 4

    run = config.train
    run.steps = 40_000
    run.batch_size = 256
    run.micro_batches = 4
    run.warmup_steps = 1_000
    run.keep_steps = (2_500, 5_000, 10_000, 20_000)
    run.validate_every = 1_000

    config.sweep.steps = (4, 6, 8, 10, 20, 50)
    config.sweep.batch_size = 64
    config.sweep.num_images = 5_000
    config.sweep.saving = 8.0
    config.early.steps = 20
    return config
