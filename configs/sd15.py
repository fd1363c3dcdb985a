"""A published Stable Diffusion under every sampler, step count and guidance rate: no training.

    ldm-scaling study --config=configs/sd15.py --config.weights=DIR --workdir=runs/sd15
    ldm-scaling sample --workdir=runs/sd15 --prompt="a red apple" --steps=10,20,50

DIR is a Stable Diffusion 1 or 2 in diffusers' layout: unet, vae, text_encoder, tokenizer and
scheduler of https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5, for example. For a
model of 768 px add --config.data.side=768. Noise and prediction are as its scheduler says; of one
with `rescale_betas_zero_snr` spacing is trailing where nothing else is asked for.

Hardware: a GPU. Pictures of 512 px on a CPU take minutes each. Where its memory is short, lower
`sweep.batch_size`, the number of pictures under way: plain attention at 64 x 64 latents needs about
3 GB for each of them (reckoned, not measured).
Expected: Fréchet distances to OpenMoji's compositions, of a kind that Stable Diffusion was not
trained on: they tell samplers, step counts and guidance rates apart, and compare with no published
FID.
"""

from ldm_scaling import config as config_lib
from ldm_scaling.errors import UserError


def get_config(arg: str = ""):
    if arg:
        raise UserError(f"configs/sd15.py:{arg}: it takes no argument")
    config = config_lib.default()
    config.name = "sd15"
    config.members = ("sd15",)
    config.reference = "sd15"
    config.diffusion.schedule = "auto"
    config.diffusion.prediction = "auto"

    config.data.side = 512
    config.data.train_pictures = 2_000
    config.data.validation_pictures = 1_000
    config.data.text_length = 77

    config.sample.steps = 50
    config.sample.guidance = 7.5
    config.sample.num_images = 8
    config.sweep.num_images = 500
    config.sweep.batch_size = 16
    return config
