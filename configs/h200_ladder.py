"""A small scaling study for one H200: seven widths from 0.4M to 17M parameters, of which 12 minutes
are enough for four to six.

    python benchmarks/gpu/ladder.py run --workdir=runs/h200_ladder --to=runs/h200_ladder_out \
        --minutes=12

or, without stretches, `ldm-scaling study --config=configs/h200_ladder.py --workdir=...`. Pictures
of 64 px, composed of OpenMoji's pictograms, in latents of 16x16x4: at 32 px a pictogram is a blur,
and at 96 px or more (24x24 latents) the widest members alone would take the time that all have
here. The widths span a factor of 40 in cost; the widest comes last, and is not begun where the time
does not suffice: four to six are a study without it. Each sees a million examples, 26 times over
the 40,000 pictures, at a constant rate after the warmup: a rate that fell to the end would make the
checkpoints of 250, 500 and 1,000 steps, which are kept for quality against training compute (the
paper's Fig. 3), other than what a run of so many steps gives. 2,000 steps leave the narrow members
hardly past the steep part of their curves: these points are early ones. DDIM goes to 100 steps,
DDPM and DPM-Solver++ to 20: DDPM's point at 50, which the paper has, would take 15% of the sweep.

Guidance is raced for (8 rates, of which 1, no guidance, takes the place of the paper's 7: few steps
may want none), 5,000 samples stand behind every point that is reported. A race halves its rates on
104, 208 and 416 pictures. The first halving stands on fewer pictures than there are features
(320), where a distance is mostly that of too few pictures: what that adds is foretold, and all
rates of a race have the same noise, but a rate that is left out there was hardly looked at.

Budget, of what was measured of its first third (benchmarks/gpu/results/2026-11-26_h200.md), by
`python benchmarks/gpu/ladder.py budget`, and guessed where it says so; it has not been run to its
end:

| | minutes: six, and the seventh | |
|---|---|---|
| start; composing 50,000 pictures | 1 to 2 | guessed; 2 seen with more threads |
| autoencoder, latents, beside text states and programs | 1.5 | measured |
| training, 2,000 steps of 512 | 2.6 to 3.5, 1.0 | measured of six, to a third |
| sweep: 20 tables of 3 solvers, 8 rates raced, 6,700 samples a table | 3.1, 1.3 | reckoned |
| early checkpoints: DDIM of 10 steps | 0.3, 0.1 | reckoned |
| decoding, beside the rest | 2.3, 0.4 | reckoned |
| rows of each member, alone on the card, and packing | 1.5 | guessed |

Scoring (0.3 s of one core a record, 2,200 records: 11 minutes) runs behind the sampler, on a core
for each member. `c192_s16` and `c256_s16` would take five and seven minutes more.

`configs/h200_ladder.py:tiny` is two widths in minutes, for tests: its pictures are noise.
"""

from ldm_scaling import config as config_lib
from ldm_scaling import recipes

MEMBERS = ("c16_s16", "c24_s16", "c32_s16", "c48_s16", "c64_s16", "c96_s16", "c128_s16")


def get_config(arg: str = ""):
    if arg not in ("", "tiny"):
        raise ValueError(f"configs/h200_ladder.py:{arg}: the argument is one of: (none), tiny")
    config = config_lib.default()
    config.name = "ladder"
    config.members = MEMBERS
    config.reference = MEMBERS[-1]

    config.data.side = 64
    config.data.train_pictures = 40_000
    config.data.validation_pictures = 10_000
    config.data.text_length = 18
    config.data.latent_dtype = "float16"

    config.autoencoder.base_channels = 32
    config.autoencoder.channel_mults = (1, 2, 2)
    config.autoencoder.blocks_per_level = 1
    config.autoencoder.groups = 8
    config.autoencoder.mid_attention = False
    run = config.autoencoder.train
    run.steps = 3_000
    run.batch_size = 64
    run.learning_rate = 1e-3
    run.warmup_steps = 100

    config.diffusion.prediction = "v"
    run = config.train
    run.steps = 2_000
    run.batch_size = 512
    run.learning_rate = 7e-4
    run.warmup_steps = 100
    run.keep_steps = (250, 500, 1_000)

    for run in (config.autoencoder.train, config.train):
        run.ema_decay = 0.999
        run.log_every = 100
        run.validate_every = 500
        run.checkpoint_every = 1_000
        run.sample_every = 0
        run.keep = 1

    config.sample.steps = 20
    config.sample.spacing = "trailing"
    config.sample.guidance = 2.0
    config.sweep.steps = (1, 2, 4, 6, 10, 20, 50, 100)
    config.sweep.max_steps = {"ddpm": 20, "dpmpp_2m": 20}
    config.sweep.guidance = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    config.sweep.spacing = "trailing"
    config.sweep.strategy = "racing"
    config.sweep.saving = 24.0
    config.sweep.num_images = 5_000
    config.sweep.replicates = 50
    config.sweep.batch_size = 1_024
    config.sweep.feature_side = 96

    if arg == "tiny":
        recipes.tiny(config, "c8_s16", "c12_s16", warmup_steps=1, sample_every=0)
        config.data.validation_pictures = 128
        config.train.keep_steps = (2,)
        config.sweep.samplers = ("ddim", "dpmpp_2m")
        config.sweep.num_images = 64
        config.sweep.saving = 2.0
        config.sweep.batch_size = 32
    return config
