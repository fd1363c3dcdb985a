"""Which learning rate is best at which width, with width transfer and without: three widths, five
rates, 25 runs of 200 steps: in about a quarter of an hour on 2 CPU cores.

    ldm-scaling rates --config=configs/demo_width.py --workdir=runs/demo_width

Expected: `rates/best_rate.png` in the workdir, and what it shows in words: docs/width_transfer.md.
What it shares with other demos is in ldm_scaling/recipes.py.

`configs/demo_width.py:tiny` is the same in seconds, for tests.
"""

from ldm_scaling import recipes


def get_config(arg: str = ""):
    if arg not in ("", "tiny"):
        raise ValueError(f"configs/demo_width.py:{arg}: the argument is tiny, or none")
    config = recipes.demo("demo_width")
    config.members = ("c8", "c16", "c32")
    config.reference = "c32"
    config.train.width_transfer = "mup"
    config.train.base_member = "c8"
    run = config.train
    run.steps = 200
    run.batch_size = 16
    run.learning_rate = 4e-3
    run.warmup_steps = 20

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
        config.sweep.num_images = 16
        config.sweep.batch_size = 16
    return config
