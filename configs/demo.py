"""The whole study on a laptop: four widths, three samplers, in about 13 minutes on 2 CPU cores.

    ldm-scaling study --config=configs/demo.py --workdir=runs/demo

Expected: `report.html` in the workdir. `configs/demo.py:tiny` is the same in about a minute, for
tests: its pictures are noise.
"""

from ldm_scaling import config as config_lib


def get_config(arg: str = ""):
    if arg not in ("", "tiny"):
        raise ValueError(f"configs/demo.py:{arg}: the argument is one of: (none), tiny")
    config = config_lib.default()
    config.name = "demo"
    config.members = ("c8", "c16", "c24", "c32")
    config.reference = "c32"

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

    if arg == "tiny":
        config.members = ("c8", "c16")
        config.reference = "c16"
        config.data.train_pictures = 128
        config.data.validation_pictures = 32
        config.autoencoder.base_channels = 8
        for run in (config.autoencoder.train, config.train):
            run.steps = 8
            run.batch_size = 16
            run.warmup_steps = 2
            run.log_every = 2
            run.validate_every = 4
            run.checkpoint_every = 4
            run.sample_every = 8
        config.sample.steps = 2
        config.sample.num_images = 8
        config.sweep.samplers = ("ddim", "dpmpp_2m")
        config.sweep.steps = (1, 2)
        config.sweep.guidance = (1.5, 3.0)
        config.sweep.num_images = 16
        config.sweep.batch_size = 16
        config.sweep.replicates = 20
    return config
