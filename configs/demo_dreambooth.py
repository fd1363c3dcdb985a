"""DreamBooth on a laptop: two widths are taught a blue mushroom by five pictures of it, on 2 cores.

    ldm-scaling dreambooth --config=configs/demo_dreambooth.py --workdir=runs/dreambooth

The networks are those of configs/demo.py, trained on OpenMoji's pictograms in their own colours:
red mushrooms. The subject is the mushroom with its hues turned. In a workdir where the demo ran
before, such as runs/demo, its networks are taught at once.

Hours: 18 CPU minutes, about 10 minutes where both cores are free.
Expected: one line of scores for each width, and the path of a grid (samples/dreambooth_*.png). The
cosine to the subject's pictures rises from .17 to .26 (c16) and from .18 to .36 (c32), and the blue
mushroom stands on the background that is asked for. Agreement with captions falls (.17 to .10, .25
to .17): no mushroom that the probe knows is blue. "Two mushrooms" stay one.
`configs/demo_dreambooth.py:tiny` is the same in about a minute, for tests: its pictures are noise.
"""

from ldm_scaling import recipes
from ldm_scaling.errors import UserError


def get_config(arg: str = ""):
    if arg not in ("", "tiny"):
        raise UserError(f"configs/demo_dreambooth.py:{arg}: the argument is one of: (none), tiny")
    config = recipes.demo("demo_dreambooth")
    config.members = ("c16", "c32")
    config.reference = "c32"

    booth = config.dreambooth
    booth.subjects = "openmoji:1F344:200"
    booth.class_images = 64
    booth.prompts = (
        "a {0} {1} on a white background", "a {0} {1} on a black background",
        "a {0} {1} on a red background", "a {0} {1} on an orange background",
        "a {0} {1} on a beige background", "two {0} {1}s on a white background",
    )
    booth.images_per_prompt = 8
    run = booth.train
    run.steps = 300
    run.batch_size = 8
    run.learning_rate = 3e-4
    run.checkpoint_every = 100
    booth.sample.steps = 20
    booth.sample.spacing = "trailing"
    booth.sample.guidance = 4.0
    booth.sample.num_images = 48

    if arg == "tiny":
        config.members = ("c8",)
        config.reference = "c8"
        config.data.train_pictures = 128
        config.data.validation_pictures = 32
        config.autoencoder.base_channels = 8
        for run in (config.autoencoder.train, config.train):
            run.steps = 4
            run.batch_size = 16
            run.warmup_steps = 2
            run.log_every = 2
            run.validate_every = 0
            run.checkpoint_every = 4
            run.sample_every = 0
        config.sweep.num_images = 16
        config.sweep.batch_size = 16
        config.sweep.replicates = 20
        booth.class_images = 4
        booth.prompts = booth.prompts[:2]
        booth.images_per_prompt = 2
        booth.train.steps = 4
        booth.train.batch_size = 2
        booth.train.checkpoint_every = 2
        booth.train.log_every = 1
        booth.sample.steps = 2
        booth.sample.num_images = 4
    return config
