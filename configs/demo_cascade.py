"""Cascades on a laptop: two single networks of pictures of 64 px, and cascades of networks as large
whose first stage draws them at 32 px; all trained for as long, compared at equal sampling cost.

    ldm-scaling study --config=configs/demo_cascade.py --workdir=runs/cascade

Hours: about 14 minutes on two free cores, reckoned. Expected: docs/cascades.md has what it found.

What it shares with other demos is in ldm_scaling/recipes.py.

`configs/demo_cascade.py:tiny` is one cascade in a minute, for tests: its pictures are noise.
"""

from ldm_scaling import recipes


def get_config(arg: str = ""):
    if arg not in ("", "tiny"):
        raise ValueError(f"configs/demo_cascade.py:{arg}: the argument is one of: (none), tiny")
    config = recipes.demo("demo_cascade")
    config.members = ("c8_s16", "c16_s16")
    config.reference = "c16_s16"

    config.data.side = 64
    config.data.train_pictures = 5_000
    config.data.validation_pictures = 1_000
    config.autoencoder.mid_attention = False
    run = config.autoencoder.train
    run.steps = 500
    run.batch_size = 16
    run.warmup_steps = 30

    cascade = config.cascade
    cascade.base = ("c8", "c16")
    cascade.start = "nothing"
    cascade.augment = 0.5
    cascade.level = 0.1
    for run in (config.train, cascade.base_train, cascade.train):
        run.steps = 400
        run.batch_size = 16
        run.learning_rate = 2e-3
        run.warmup_steps = 50
    for run in (config.autoencoder.train, config.train, cascade.base_train, cascade.train):
        run.ema_decay = 0.99
        run.log_every = 20
        run.validate_every = 200
        run.checkpoint_every = 200
        run.sample_every = 0

    for sample in (config.sample, cascade.sample):
        sample.steps = 20
        sample.spacing = "trailing"
        sample.guidance = 2.0
    for sweep in (config.sweep, cascade.sweep):
        sweep.samplers = ("ddim",)
        sweep.guidance = (1.0, 3.0)
        sweep.num_images = 128
        sweep.batch_size = 64
        sweep.feature_side = 96
        sweep.spacing = "trailing"
    config.sweep.steps = (1, 2, 3, 4, 6, 8, 12, 16)
    cascade.first_steps = (4, 16)
    cascade.first_spacing = "trailing"
    cascade.sweep.steps = (2, 8)

    if arg == "tiny":
        recipes.tiny(
            config, "c8_s16", runs=(cascade.base_train, cascade.train), samples=[cascade.sample],
            sweeps=[cascade.sweep],
        )
        cascade.base = ("c8",)
        cascade.first_steps = (1, 2)
        config.sweep.steps = (1, 2, 3)
    return config
