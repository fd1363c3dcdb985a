"""DreamBooth of the 866M network of arXiv 2404.01367, or of a published Stable Diffusion.

    ldm-scaling dreambooth --config=configs/dreambooth_866m.py --workdir=/mnt/disk/t2i_866m \
        --config.dreambooth.subjects=DIR
    ldm-scaling dreambooth --config=configs/dreambooth_866m.py --config.weights=SD \
        --workdir=runs/dreambooth --config.dreambooth.subjects=DIR

DIR is the folder `dataset` of https://github.com/google/dreambooth, or one of your own, see
docs/dreambooth.md. The first line teaches the network that configs/t2i_866m.py trained in that
workdir (and trains it first where it is not there); the second a Stable Diffusion 1 or 2 in
diffusers' layout (of one that predicts v: --config.diffusion.prediction=auto). `:lora` teaches
adapters of rank 4 with a learning rate of 1e-4, as diffusers' example, in place of all parameters.

Theirs: rate 5e-6 and about 1000 steps for Stable Diffusion (arXiv 2208.12242), pictures by 50-step
DDIM at guidance 7.5 (arXiv 2404.01367, Fig. 6). Not stated in the latter, so diffusers': batch 1
beside 1 of the class, 200 pictures of the class, no warm-up, no average.

Hardware: an accelerator with 40 GB for all parameters: 24 bytes each (gradient, two moments, the
average and the pretrained ones among them) are 21 GB, activations come on top; with `:lora` one
with 16 GB. Both are reckoned. Of several devices each needs an example:
--config.dreambooth.train.batch_size=N.
Hours: 1000 steps and 200 pictures a subject, 30 subjects; nothing of it is measured.
Expected: of a Stable Diffusion taught so, arXiv 2208.12242 has DINO .668, CLIP-I .803, CLIP-T .305
over DreamBench; of the 866M network there are pictures only.
"""

from ldm_scaling import recipes
from ldm_scaling.errors import UserError


def get_config(arg: str = ""):
    if arg not in ("", "lora"):
        raise UserError(f"configs/dreambooth_866m.py:{arg}: the argument is one of: (none), lora")
    config = recipes.text_to_image("866m")
    booth = config.dreambooth
    booth.class_images = 200
    booth.images_per_prompt = 4
    booth.train.steps = 1_000
    booth.train.batch_size = 1
    booth.train.learning_rate = 5e-6
    booth.sample.sampler = "ddim"
    booth.sample.steps = 50
    booth.sample.guidance = 7.5
    booth.sample.num_images = 16
    if arg == "lora":
        booth.lora_rank = 4
        booth.train.learning_rate = 1e-4
    return config
