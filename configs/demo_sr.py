"""Super-resolution on a laptop: four widths pretrained from text, each fine-tuned to enlarge images
four times and measured after three lengths of fine-tuning.

    ldm-scaling study --config=configs/demo_sr.py --workdir=runs/sr

Hours: about 24 minutes on two free cores. Expected: docs/finetuning.md has what it found.

`configs/demo_sr.py:tiny` is one width in a minute or two, for tests: its pictures are noise.
"""

from ldm_scaling import config as config_lib


def get_config(arg: str = ""):
    if arg not in ("", "tiny"):
        raise ValueError(f"configs/demo_sr.py:{arg}: the argument is one of: (none), tiny")
    config = config_lib.default()
    config.name = "demo_sr"
    config.members = ("c8_s16", "c12_s16", "c16_s16", "c24_s16")
    config.reference = "c24_s16"

    config.data.side = 64
    config.data.train_pictures = 5_000
    config.data.validation_pictures = 1_000
    config.data.text_length = 18

    config.autoencoder.base_channels = 16
    config.autoencoder.channel_mults = (1, 2, 2)
    config.autoencoder.blocks_per_level = 1
    config.autoencoder.groups = 8
    config.autoencoder.mid_attention = False
    run = config.autoencoder.train
    run.steps = 500
    run.batch_size = 16
    run.learning_rate = 2e-3

    config.diffusion.prediction = "v"
    config.train.steps = 400
    config.train.batch_size = 16
    config.train.learning_rate = 2e-3

    tune = config.finetune
    tune.task = "super_resolution"
    tune.budgets = (120, 240, 480)
    tune.train.steps = 480
    tune.train.batch_size = 16
    tune.train.learning_rate = 2e-3

    for run in (config.autoencoder.train, config.train, tune.train):
        run.warmup_steps = 30
        run.ema_decay = 0.99
        run.log_every = 20
        run.validate_every = 120
        run.checkpoint_every = 240
        run.sample_every = 0

    config.sample.steps = 20
    config.sample.spacing = "trailing"
    config.sample.guidance = 2.0
    config.sweep.samplers = ("ddim",)
    config.sweep.steps = (4, 16)
    config.sweep.guidance = (1.0, 3.0)
    config.sweep.num_images = 128
    config.sweep.batch_size = 64
    config.sweep.feature_side = 96
    config.sweep.spacing = "trailing"

    tune.sample.steps = 20
    tune.sample.spacing = "trailing"
    tune.sweep.steps = (2, 4, 8, 24)
    tune.sweep.num_images = 128
    tune.sweep.batch_size = 64
    tune.sweep.feature_side = 96
    tune.sweep.spacing = "trailing"

    if arg == "tiny":
        config.members = ("c8_s16",)
        config.reference = "c8_s16"
        config.data.train_pictures = 64
        config.data.validation_pictures = 32
        config.autoencoder.base_channels = 8
        tune.budgets = (1, 2, 4)
        for run in (config.autoencoder.train, config.train, tune.train):
            run.steps = 4
            run.batch_size = 16
            run.warmup_steps = 2
            run.log_every = 2
            run.validate_every = 4
            run.checkpoint_every = 4
        for sweep in (config.sweep, tune.sweep):
            sweep.steps = (1, 2)
            sweep.num_images = 16
            sweep.batch_size = 16
            sweep.replicates = 20
            sweep.feature_side = 32
        config.sweep.guidance = (1.5, 3.0)
        config.sample.num_images = 4
        config.sample.steps = tune.sample.steps = 2
        tune.sample.num_images = 4
    return config
