"""Super-resolution on a laptop: four widths pretrained from text, each fine-tuned to enlarge images
four times and measured after three lengths of fine-tuning.

    ldm-scaling study --config=configs/demo_sr.py --workdir=runs/sr

Hours: about 24 minutes on two free cores. Expected: docs/finetuning.md has what it found.

What it shares with other demos is in ldm_scaling/recipes.py.

`configs/demo_sr.py:tiny` is one width in a minute or two, for tests: its pictures are noise.
"""

from ldm_scaling import recipes


def get_config(arg: str = ""):
    if arg not in ("", "tiny"):
        raise ValueError(f"configs/demo_sr.py:{arg}: the argument is one of: (none), tiny")
    config = recipes.demo("demo_sr")
    config.members = ("c8_s16", "c12_s16", "c16_s16", "c24_s16")
    config.reference = "c24_s16"

    config.data.side = 64
    config.data.train_pictures = 5_000
    config.data.validation_pictures = 1_000
    config.autoencoder.mid_attention = False
    run = config.autoencoder.train
    run.steps = 500
    run.batch_size = 16

    config.train.steps = 400
    config.train.batch_size = 16

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

    config.sweep.samplers = ("ddim",)
    config.sweep.steps = (4, 16)
    config.sweep.guidance = (1.0, 3.0)

    tune.sample.steps = 20
    tune.sample.spacing = "trailing"
    tune.sweep.steps = (2, 4, 8, 24)
    tune.sweep.num_images = 128
    tune.sweep.batch_size = 64
    tune.sweep.feature_side = 96
    tune.sweep.spacing = "trailing"

    if arg == "tiny":
        unguided = tune.sweep.guidance
        recipes.tiny(
            config, "c8_s16", runs=[tune.train], samples=[tune.sample], sweeps=[tune.sweep],
            sample_every=0,
        )
        tune.budgets = (1, 2, 4)
        tune.sweep.guidance = unguided
    return config
