"""The whole study on a laptop: four widths, three samplers, in about 13 minutes on 2 CPU cores.

    ldm-scaling study --config=configs/demo.py --workdir=runs/demo

Expected: `report.html` in the workdir. `configs/demo.py:tiny` is the same in about a minute, for
tests: its pictures are noise. What it shares with other demos is in ldm_scaling/recipes.py.
"""

from ldm_scaling import recipes


def get_config(arg: str = ""):
    if arg not in ("", "tiny"):
        raise ValueError(f"configs/demo.py:{arg}: the argument is one of: (none), tiny")
    config = recipes.demo("demo")
    config.members = ("c8", "c16", "c24", "c32")
    config.reference = "c32"

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
